"""Torch names of the leaves of this package's models, for `jlora.save_peft` and `jlora.load_peft`."""

import itertools
import re
from typing import Any

from jlora.models.families import family_for
from jlora.models.load import leaf_shapes
from jlora.models.names import STACKS
from jlora.models.torch_parameter import TorchParameter

_STACK = rf"(?P<before>(.*/)?({'|'.join(STACKS)}))"
_NUMBERED = rf"{_STACK}_(?P<layer>\d+)"
_WEIGHT_ENDS = {"kernel": "in out", "scale": "out", "bias": "out"}


def peft_names(model: Any, former: bool = False) -> dict[str, TorchParameter]:
    """Which torch parameter of the Hugging Face model each leaf is.

    The torch model is the one that transformers builds from the checkpoint: `LlamaForCausalLM` and the like for a model
    with a language head, else the backbone (`AutoModel`). A classifier is the backbone with a head named `classifier`.

    Args:
        model: a model of this package, or its config.
        former: the names that the modules of a ViT had in transformers 4, such as
            `vit.encoder.layer.0.attention.attention.query`, for adapters that were, or will be, used with that.

    Raises:
        TypeError: for anything else.
        ValueError: for `former` names of a model whose modules have none.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> names = jlora.models.peft_names(model)
    """
    backbone = getattr(model, "backbone", None)
    config = getattr(model if backbone is None else backbone, "config", model)
    family = family_for(config)
    prefix = family.prefixes[0] if backbone is None and family.headed(config) else ""
    table = _former(config, prefix) if former else {}
    if backbone is not None:
        head = {rf"classifier/{end}": _entry(f"classifier.{_torch(end)}", end, "") for end in ("kernel", "bias")}
        return {**table, **_table(config, "backbone/", prefix), **head}
    return {**table, **_table(config, "", prefix)}


def _former(config: Any, prefix: str) -> dict[str, TorchParameter]:
    """The names of leaves that checkpoints spell otherwise: as they do."""
    family = family_for(config)
    if not family.renamed or family.merged:
        raise ValueError(f"former: the modules of a {family.module.__name__} have no other names in transformers 4.")
    table = {}
    for path in map("/".join, leaf_shapes(family.module(config))):
        if (there := re.fullmatch(rf"(.*?(?:{'|'.join(STACKS)}))(?:_(\d+))?/(.+)/(\w+)", family.spelled(path))) is None:
            continue
        stack, number, module, end = there.groups()
        name = f"{prefix}{stack}/{number or '{layer}'}/{module}/{_torch(end)}".replace("/", ".")
        table[re.escape(path)] = _entry(name, end, "" if number else "layer ")
    return table


def _table(config: Any, before: str, prefix: str) -> dict[str, TorchParameter]:
    family, table = family_for(config), {}
    tied = family.headed(config) and getattr(config, "tie_word_embeddings", False)
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
    for head, end in itertools.product(family.unprefixed, ("kernel", "bias")):
        table[rf"{before}{head}/{end}"] = _entry(f"{head}.{_torch(end)}", end, "")
    for path in family.convolutions:
        table[rf"{before}{path}/kernel"] = TorchParameter(
            f"{prefix}{path.replace('/', '.')}.weight", "in in in out", "conv"
        )
    for path in family.parameters:
        table[rf"{before}{path}"] = TorchParameter(f"{prefix}{path.replace('/', '.')}", kind="plain")
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
