"""Saving a model as a Hugging Face directory."""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jlora.core.protocol.stored import Stored
from jlora.models import bitsandbytes, files
from jlora.models.chat_files import FOLDER
from jlora.models.checkpoint import INDEX, SINGLE
from jlora.models.config import read_config
from jlora.models.families import FAMILIES, family_for
from jlora.models.files import located
from jlora.models.load import describe, family_of, leaf_shapes, leaf_sources
from jlora.models.names import Source
from jlora.models.quantized import one_matrix, whole
from jlora.models.stretch import stretched_settings

#: The `format` of weights that transformers loads by bitsandbytes.
BITSANDBYTES = "bitsandbytes"

# Files of the source that are copied.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)


def save(
    directory: str | os.PathLike,
    model: Any,
    params: dict[str, Any],
    source: str | os.PathLike,
    *,
    max_shard_bytes: int = 5 * 10**9,
    format: str | None = None,
    extra: Callable[[str], None] | None = None,
) -> None:
    """Writes a directory that `load` and transformers read: config, safetensors, tokenizer.

    It is written beside its place and renamed when whole: `directory` is complete or not there.

    Args:
        directory: Must not exist, or be empty.
        model: As `load` returned it.
        params: Its params, of any floating dtype, which the files keep.
        source: The directory or GGUF file that the model was loaded from; gives config and tokenizer files.
        max_shard_bytes: Larger models are cut in several files.
        format: None writes plain weights: leaves that are kept in the form of a code are decoded, one layer at a time.
            "bitsandbytes" writes the codes themselves, so that transformers loads them by bitsandbytes; all such leaves
            must have one code, which is NF4, FP4 or Int8.
        extra: Writes further files into the folder it is given, before the renaming.

    Raises:
        FileExistsError: The directory holds something.
        TypeError: It is no model of this package.
        ValueError: The params are not the model's, or the source is another model's; there is no such format, or it has no
            form for the params.
        OSError: The disk is full or can't be written; nothing is left behind.
    """
    family_for(getattr(model, "config", model))
    source = located(source)
    hf = stretched_settings(read_config(source), model)
    _check_source(source, hf, model)
    leaves = _check_params(model, params)
    if format not in (None, BITSANDBYTES):
        raise ValueError(f"format: wanted None or {BITSANDBYTES!r}, got {format!r}.")
    sources, config = _sources(model, leaves, family_of(hf, source)), _config(hf, model, leaves)
    if format == BITSANDBYTES:
        config |= _quantization(hf, model, leaves, sources)
    with new_directory(directory) as place:
        _write_tensors(place, leaves, sources, max_shard_bytes, format)
        write_json(place, "config.json", config)
        _copy_companions(source, place)
        if extra is not None:
            extra(place)


def _copy_companions(source: str | os.PathLike, place: str) -> None:
    """Copies tokenizer, templates and the like, or writes what the metadata of a GGUF file stand for."""
    for name in files.names(source):
        if name != "config.json":
            path = Path(place, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(files.read_text(source, name).encode("utf-8"))
    for name in COMPANIONS:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(place, name))
    if os.path.isdir(os.path.join(source, FOLDER)):
        shutil.copytree(os.path.join(source, FOLDER), os.path.join(place, FOLDER))


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[str]:
    """A temporary sibling to write into, which becomes `directory` at the end, or vanishes on an error.

    Raises:
        FileExistsError: The directory holds something, or is a file.
        OSError: The disk is full or can't be written.
    """
    directory = os.path.abspath(directory)
    if os.path.exists(directory) and not (os.path.isdir(directory) and not os.listdir(directory)):
        raise FileExistsError(f"{directory}: already there and not empty; give another directory.")
    parent, name = os.path.split(directory)
    os.makedirs(parent, exist_ok=True)
    place = os.path.join(parent, f".{name}.{uuid.uuid4().hex}")
    os.mkdir(place)
    try:
        yield place
        for folder, _, files in os.walk(place):
            for file in (os.path.join(folder, name) for name in files):
                # safetensors makes its files readable by their owner alone; the folder has the user's usual rights.
                os.chmod(file, os.stat(place).st_mode & 0o666)
                _flush(file)
        os.replace(place, directory)
        _flush(parent)
    except OSError as error:
        raise OSError(f"{directory}: can't be written, and nothing was left there ({error}).") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_source(source: str | os.PathLike, hf: dict[str, Any], model: Any) -> None:
    family = family_of(hf, source)
    if not isinstance(model, family.module):  # pyright: ignore[reportArgumentType] (module is a class)
        raise ValueError(f"source: {source} holds a {hf['model_type']}, the model is a {type(model).__name__}.")
    settings = (
        "scan_layers",
        "remat",
        "dtype",
        "param_dtype",
        *(("pooler", "classifier", "num_labels") if family.encoder else ("language_head", "attention", "group")),
    )
    options = {name: getattr(model.config, name) for name in settings if hasattr(model.config, name)}
    described = describe(source, hf, **options)
    for field in dataclasses.fields(model.config):
        wanted, got = getattr(model.config, field.name), getattr(described, field.name)
        if wanted != got:
            raise ValueError(f"source: {source} is another model's: {field.name} is {got}, the model's is {wanted}.")


def _check_params(model: nn.Module, params: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    leaves: dict[Any, Any] = flatten_dict(params)
    shapes = leaf_shapes(model)
    for path in sorted(leaves.keys() | shapes.keys()):
        name = "/".join(path)
        if path not in leaves:
            raise ValueError(f"params: leaf {name} is missing.")
        if path not in shapes:
            raise ValueError(f"params: leaf {name} has no place in the model; merge adapters before saving.")
        if tuple(leaves[path].shape) != shapes[path]:
            raise ValueError(f"params: leaf {name} has shape {leaves[path].shape}, wanted {shapes[path]}.")
    return leaves


def _config(hf: dict[str, Any], model: Any, leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    family = family_for(model.config)
    name = FAMILIES[hf["model_type"]].model_types[hf["model_type"]][not family.headed(model.config)]
    # Which of the two keys transformers reads depends on its version.
    key = "dtype" if "dtype" in hf else "torch_dtype"
    kept = {name: value for name, value in hf.items() if name != "quantization_config"}
    kept |= _labels(hf, model)
    return {**kept, "architectures": [name], key: str(np.dtype(next(iter(leaves.values())).dtype))}


def _labels(hf: dict[str, Any], model: Any) -> dict[str, Any]:
    """The names of a head's classes, where the source has another number of them: those that transformers gives."""
    count = getattr(model.config, "num_labels", None)
    if count is None or count == FAMILIES[hf["model_type"]].config.from_hf(hf).num_labels:
        return {}
    names = [f"LABEL_{number}" for number in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _quantization(
    hf: dict[str, Any], model: Any, leaves: dict, sources: dict[tuple[str, ...], Source]
) -> dict[str, Any]:
    """What `config.json` says of weights that are kept in the form of a code of bitsandbytes."""
    code = bitsandbytes.code_to_write(leaves)
    plain = [path for path, leaf in leaves.items() if path[-1] == "kernel" and not isinstance(leaf, Stored)]
    skipped = [name.removesuffix(".weight") for path in plain for name in sources[path].names]
    if family_for(model.config).headed(model.config) and getattr(model.config, "tie_word_embeddings", False):
        skipped.append("lm_head")  # a linear layer there, whose weight is the embedding
    dtype = next(str(np.dtype(leaf.dtype)) for leaf in leaves.values() if isinstance(leaf, Stored))
    return {"quantization_config": bitsandbytes.config_to_write(hf, code, dtype, skipped)}


def _sources(model: Any, leaves: dict, family: Any) -> dict[tuple[str, ...], Source]:
    return leaf_sources(model, leaves, family, family.prefixes[0] if family.headed(model.config) else "")


def _write_tensors(place: str, leaves: dict, sources: dict, max_shard_bytes: int, format: str | None) -> None:
    shards = _shards(sources, leaves, max_shard_bytes, format)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for name, path, number in shard:
            tensors |= _tensors(name, leaves[path], sources[path], number, format)
        write_safetensors(tensors, os.path.join(place, file))
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_json(place, INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(
    sources: dict, leaves: dict, max_shard_bytes: int, format: str | None
) -> list[list[tuple[str, tuple[str, ...], int]]]:
    """Groups of (tensor name, path of its leaf, its number there), each of at most `max_shard_bytes`, or of one tensor."""
    shards, room = [[]], max_shard_bytes
    for path, made_of in sources.items():
        leaf = leaves[path]
        whole = leaf.nbytes if format and isinstance(leaf, Stored) else leaf.size * np.dtype(leaf.dtype).itemsize
        size = whole // len(made_of.names)
        for number, name in enumerate(made_of.names):
            if shards[-1] and size > room:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append((name, path, number))
            room -= size
    return shards


def _tensors(name: str, leaf: Any, made_of: Source, number: int, format: str | None) -> dict[str, np.ndarray]:
    """One tensor of a leaf by its name: several where it is the fields of a code."""
    place = made_of.place(number, leaf.shape)
    if format == BITSANDBYTES and isinstance(leaf, Stored):
        return bitsandbytes.tensors_to_write(name, leaf, number if made_of.stacked else None)
    if isinstance(leaf, Stored):
        one = np.asarray(one_matrix(leaf, place[0]) if made_of.stacked else whole(leaf))
        tensor = one[place[made_of.stacked :] or ...]
    else:
        tensor = np.asarray(leaf[place] if place else leaf)
    # Contiguous, since safetensors writes an array's memory and ignores strides.
    return {name: np.ascontiguousarray(made_of.as_tensor(tensor))}


def write_safetensors(tensors: dict[str, np.ndarray], path: str) -> None:
    """Writes C-contiguous tensors to a file.

    Raises:
        OSError: The disk is full or can't be written.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: can't be written ({error}).") from error


def write_json(place: str, name: str, content: dict[str, Any]) -> None:
    """Writes a JSON file into a folder."""
    with open(os.path.join(place, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
