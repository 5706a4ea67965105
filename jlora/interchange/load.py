"""`load_peft`: adapters that PEFT, or `save_peft`, wrote."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.core.protocol.method import Start
from jlora.core.tree import beside, placement
from jlora.core.tree.adapted import SHARED, Adapted, Plan
from jlora.disk.folders import reads
from jlora.interchange import prompts
from jlora.interchange.files import manifest
from jlora.interchange.files.config import Settings
from jlora.interchange.files.folder import CONFIG, AdapterFolder
from jlora.interchange.files.parse import parse
from jlora.interchange.files.recorded import Recorded
from jlora.interchange.kinds.formats import formats
from jlora.interchange.leaves.index import Index, Read
from jlora.interchange.leaves.names import Names, resolve
from jlora.interchange.trained import read_wholes, rows
from jlora.models.prefix_layout import PrefixLayout


def load_peft(path: str | os.PathLike[str], params: Any, names: Names, prefix: PrefixLayout | None = None) -> Adapted:
    """Reads an adapter in PEFT's format onto its base.

    Only safetensors is read, never a pickle. Settings, names and shapes are checked before any tensor is read, and a tensor
    that belongs nowhere is an error. Where `save_peft` wrote the folder, its manifest gives the methods back as they
    were.

    Args:
        path: the folder.
        params: the base. Where a leaf is a `jax.ShapeDtypeStruct` there are no values to compare with, and the adapters are
            shapes too, as those of `jlora.load`.
        names: which torch parameter a leaf is; see `save_peft`.
        prefix: for a folder of prefix-tuning; see `save_peft`.

    Returns:
        The adapters on their base, as LoRA, DoRA, Full and so on; leaves of the base are shared, not copied.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where a file is damaged, or holds something that these params or jlora's methods have no place for.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> adapted = jlora.adapterize(params, {r".*/v_proj/kernel": jlora.Axes("batch in out", jlora.LoRA(4))})
        >>> report = jlora.save_peft("adapter", adapted, names=jlora.models.peft_names(model))
        >>> adapted = jlora.load_peft("adapter", params, names=jlora.models.peft_names(model))
    """
    folder = AdapterFolder(path)
    leaves = dict(paths.flatten_with_keys(params)[0])
    valued = not any(map(placement.is_shape, leaves.values()))
    given = leaves if valued else {keys: _of_zeros(leaf) for keys, leaf in leaves.items()}
    index = Index(resolve(names, leaves.items()), given, folder.file, valued)
    with _named(folder.path):
        adapted = _adapted(params, given, _read(folder, index, prefix))
        return adapted if valued else _as_shapes(adapted, leaves)


@reads(CONFIG)
def _with_names(path: Path, params: Any, names: Names | None, prefix: PrefixLayout | None) -> Adapted:
    """`load_peft`, for a folder whose format was not known before.

    Raises:
        ValueError: where nothing says which leaf a tensor is.
    """
    if names is None:
        raise ValueError(
            f"{path} is in PEFT's format: give names=, such as jlora.models.peft_names(model), which tell the leaf of a tensor"
        )
    return load_peft(path, params, names, prefix)


def _read(folder: AdapterFolder, index: Index, prefix: PrefixLayout | None) -> list[Read]:
    """The adapters of a folder, by leaf."""
    if folder.config.get("peft_type") in prompts.TYPES:
        return prompts.read(folder, index, prefix)
    known = formats()
    settings = Settings(folder.config, folder.path / CONFIG, {name: each.settings for name, each in known.items()})
    format = known[settings.peft_type]
    recorded = Recorded(manifest.read(folder.path, folder.file, folder.config), folder.path / manifest.FILE)
    contents = parse(folder, format.ends, format.shared)
    found = format.find(folder, settings, contents, index)
    tokens = rows.find(folder, settings, contents, index)
    read_wholes.check(folder, settings, contents, index)
    starts = format.read(folder, settings, found, index, recorded) + rows.read(folder, tokens, index)
    adapted = {leaf.site.keys for leaf in starts}
    return starts + read_wholes.read(folder, contents, index, recorded, adapted)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the folder to an error that doesn't name it, such as that of a method."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from None


def _adapted(params: Any, leaves: dict[tuple[str, ...], Any], found: list[Read]) -> Adapted:
    """The adapters on their base, in the order of its leaves and placed beside them."""
    order = {keys: place for place, keys in enumerate(leaves)}
    found = sorted(found, key=lambda read: order[read.site.keys])
    plan = Plan(tuple(read.site for read in found))
    beside.check(plan.sites, leaves)
    trained: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for read in found:
        leaf, names = leaves[read.site.keys], plan.shared_names()
        placed = placement.place(Start(_on_device(read.params), _on_device(read.frozen)), read.site, leaf)
        paths.insert(trained, read.site.keys, placed.params)
        if placed.frozen:
            paths.insert(frozen, read.site.keys, placed.frozen)
        for tree, arrays in ((frozen, read.shared), (trained, read.shared_params)):
            if arrays and read.site.method in names:
                drawer = tree.setdefault(SHARED, {})
                drawer.setdefault(names[read.site.method], placement.replicate(_on_device(arrays), [leaf]))
    return Adapted(params, trained, frozen, {}, plan)


def _of_zeros(leaf: Any) -> Any:
    """A leaf of shapes as one of zeros, which take no memory."""
    return jax.tree.map(lambda shape: np.broadcast_to(np.zeros((), shape.dtype), shape.shape), leaf)


def _as_shapes(adapted: Adapted, leaves: dict[tuple[str, ...], Any]) -> Adapted:
    """The adapters as shapes, with the shardings that their arrays get beside those of the base."""
    drawers = {"params": adapted.params, "frozen": adapted.frozen}
    found, treedef = paths.flatten_with_keys(drawers)
    shapes = placement.shapes_beside(dict(found), adapted.plan.sites, leaves, placement.alone(leaves.values()))
    return adapted.replace(**jax.tree.unflatten(treedef, list(shapes.values())))


def _on_device(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.asarray(array) for name, array in arrays.items()}
