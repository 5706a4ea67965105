"""`load_peft`: adapters that PEFT, or `save_peft`, wrote."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp

from jlora import mesh, paths
from jlora.adapted import Adapted, Plan
from jlora.interchange import manifest, read_wholes
from jlora.interchange.config import Settings
from jlora.interchange.folder import CONFIG, AdapterFolder
from jlora.interchange.formats import FORMATS
from jlora.interchange.index import Index
from jlora.interchange.names import Names, resolve
from jlora.interchange.parse import parse
from jlora.interchange.recorded import Recorded
from jlora.method import Site, Start


def load_peft(path: str | os.PathLike[str], params: Any, names: Names) -> Adapted:
    """Reads an adapter in PEFT's format onto its base.

    Only safetensors is read, never a pickle. Settings, names and shapes are checked before any tensor is read, and each
    tensor has a place, or it is an error. Where `save_peft` wrote the folder, its manifest gives the methods back as they
    were.

    Args:
        path: the folder.
        params: the base.
        names: which torch parameter a leaf is; see `save_peft`.

    Returns:
        The adapters on their base, as LoRA, DoRA, Full and so on; leaves of the base are shared, not copied.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where a file is damaged, or holds what these params or jlora have no place for.

    Example:
        >>> adapted = jlora.load_peft("adapter", params, names=jlora.models.peft_names(model.config))
    """
    folder = AdapterFolder(path)
    settings = Settings(folder.config, folder.path / CONFIG, list(FORMATS))
    format = FORMATS[settings.peft_type]
    recorded = Recorded(manifest.read(folder.path, folder.file))
    leaves = dict(paths.flatten_with_keys(params)[0])
    index = Index(resolve(names, leaves.items()), leaves, folder.path)
    contents = parse(folder, settings.peft_type)
    found = format.find(folder, settings, contents, index)
    read_wholes.check(folder, settings, contents, index)
    starts = format.read(folder, settings, found, index, recorded)
    adapted = {site.keys for site, _ in starts}
    starts += read_wholes.read(folder, contents, index, recorded, adapted)
    return _adapted(params, leaves, starts)


def _adapted(params: Any, leaves: dict[tuple[str, ...], Any], starts: list[tuple[Site, Start]]) -> Adapted:
    """The adapters on their base, in the order of its leaves and placed beside them."""
    order = {keys: place for place, keys in enumerate(leaves)}
    starts = sorted(starts, key=lambda item: order[item[0].keys])
    trained: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for site, start in starts:
        arrays = [{name: jnp.asarray(array) for name, array in drawer.items()} for drawer in (start.params, start.frozen)]
        placed = mesh.place(Start(*arrays), site, leaves[site.keys])
        paths.insert(trained, site.keys, placed.params)
        if placed.frozen:
            paths.insert(frozen, site.keys, placed.frozen)
    return Adapted(params, trained, frozen, {}, Plan(tuple(site for site, _ in starts)))
