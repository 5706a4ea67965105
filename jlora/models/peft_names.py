"""Torch names of the leaves of this package's models, for `jlora.save_peft` and `jlora.load_peft`."""

from typing import Any

from jlora.models.families import family_for
from jlora.models.names import STACKS
from jlora.models.torch_parameter import TorchParameter

_STACK = rf"(?P<before>(.*/)?({'|'.join(STACKS)}))"
_NUMBERED = rf"{_STACK}_(?P<layer>\d+)"
_WEIGHT_ENDS = {"kernel": "in out", "scale": "out", "bias": "out"}


def peft_names(model: Any) -> dict[str, TorchParameter]:
    """Which torch parameter of the Hugging Face model each leaf is.

    The torch model is the one that transformers builds from the checkpoint: `LlamaForCausalLM` and the like for a model
    with a language head, else the backbone (`AutoModel`). A classifier is the backbone with a head named `classifier`.

    Args:
        model: a model of this package, or its config.

    Raises:
        TypeError: for anything else.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> names = jlora.models.peft_names(model)
    """
    if (backbone := getattr(model, "backbone", None)) is not None:
        config = backbone.config
        head = {rf"classifier/{end}": _entry(f"classifier.{_torch(end)}", end, "") for end in ("kernel", "bias")}
        return {**_table(config, "backbone/", ""), **head}
    config = getattr(model, "config", model)
    headed = not family_for(config).encoder and config.language_head
    return _table(config, "", family_for(config).prefixes[0] if headed else "")


def _table(config: Any, before: str, prefix: str) -> dict[str, TorchParameter]:
    family, table = family_for(config), {}
    tied = not family.encoder and config.language_head and config.tie_word_embeddings
    linear = "linear" if family.transposed else "conv1d_gpt2"
    for position, end in enumerate(family.merged):
        name = f"{prefix}{{before}}.{{layer}}.{{module}}.{end}"
        for stack, stacked in ((_STACK, "layer "), (_NUMBERED, "")):
            entry = TorchParameter(name, f"{stacked}expert in out", "experts", position=position)
            table[rf"{before}{stack}/(?P<module>.+)/{end}"] = entry
    for module in family.bare:
        name, path = f"{prefix}{{before}}.{{layer}}.{module}.weight", f"{module.replace('.', '/')}/kernel"
        for stack, stacked in ((_STACK, "layer "), (_NUMBERED, "")):
            table[rf"{before}{stack}/{path}"] = TorchParameter(name, f"{stacked}in out", "parameter")
    for end in _WEIGHT_ENDS:
        name = f"{prefix}{{before}}.{{layer}}.{{module}}.{_torch(end)}"
        table[rf"{before}{_STACK}/(?P<module>.+)/{end}"] = _entry(name, end, "layer ", linear)
        table[rf"{before}{_NUMBERED}/(?P<module>.+)/{end}"] = _entry(name, end, "", linear)
    table[rf"{before}lm_head/kernel"] = TorchParameter("lm_head.weight", "in out")
    also = ("lm_head.weight",) if tied else ()
    embedding = f"{prefix}{{module}}.weight"
    tokens, factor = "/".join(family.embedding[:-1]), getattr(config, "embedding_factor", 1.0)
    of_tokens = TorchParameter(embedding, "in out", "embedding", also=also, factor=factor)
    table[rf"{before}(?P<module>{tokens})/embedding"] = of_tokens
    table[rf"{before}(?P<module>.+)/embedding"] = TorchParameter(embedding, "in out", "embedding")
    for end in _WEIGHT_ENDS:
        table[rf"{before}(?P<module>.+)/{end}"] = _entry(f"{prefix}{{module}}.{_torch(end)}", end, "", linear)
    return table


def _torch(end: str) -> str:
    return "bias" if end == "bias" else "weight"


def _entry(name: str, end: str, stacked: str, linear: str = "linear") -> TorchParameter:
    kind = linear if end == "kernel" else "plain"
    return TorchParameter(name, stacked + _WEIGHT_ENDS[end], kind)
