"""Names of leaves: the `/`-joined path that specs, reports and errors use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def keys_of(key_path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys along a JAX key path as strings, without the `value` of boxes (NNX `Param`, Flax `Partitioned`)."""
    if len(key_path) > 1 and isinstance(key_path[-1], GetAttrKey) and key_path[-1].name == "value":
        key_path = key_path[:-1]
    return tuple(_key_string(key) for key in key_path)


def _key_string(key: Any) -> str:
    if isinstance(key, DictKey | FlattenedIndexKey):
        return str(key.key)
    if isinstance(key, GetAttrKey):
        return key.name
    if isinstance(key, SequenceKey):
        return str(key.idx)
    return str(key)


def flatten_with_keys(tree: Any) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
    """Flattens a tree to [(keys, leaf)] and its tree definition; leaves keep JAX's order."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [(keys_of(path), leaf) for path, leaf in leaves], treedef


def nearest(path: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """The known paths that look most like `path`, best first."""
    return difflib.get_close_matches(path, list(paths), n=count, cutoff=0.0)


def insert(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Puts `value` into a nested dict at `keys`, making the dicts on the way."""
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def lookup(tree: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value at `keys` in a nested dict; an empty dict where the tree has nothing there."""
    for key in keys:
        if key not in tree:
            return {}
        tree = tree[key]
    return tree
