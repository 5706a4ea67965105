"""Names of leaves: the `/`-joined path that specs, reports and errors use."""

from __future__ import annotations

import difflib
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax.core.meta import AxisMetadata
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def _is_box(node: Any) -> bool:
    """Whether a node holds an array and facts about it, under an attribute `value` that names nothing.

    Such are Flax's `Partitioned`, an `AxisMetadata`, and NNX's variables. NNX takes half a second to import, and where nobody
    has imported it there are none.
    """
    nnx = sys.modules.get("flax.nnx")
    return isinstance(node, AxisMetadata) or (nnx is not None and isinstance(node, nnx.Variable))


class Whole:
    """Base of nodes that count as one leaf although they hold arrays: leaves that are kept in another form."""


def _key_string(key: Any) -> str:
    if isinstance(key, DictKey | FlattenedIndexKey):
        return str(key.key)
    if isinstance(key, GetAttrKey):
        return key.name
    if isinstance(key, SequenceKey):
        return str(key.idx)
    return str(key)


def flatten_with_keys(
    tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False
) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
    """Flattens a tree to [(keys, leaf)] and its tree definition; leaves keep JAX's order. A `Whole` is a leaf.

    The `value` of a box that holds an array (NNX `Param`, Flax `Partitioned`) is no key; a field `value` of anything else is.
    """
    one = lambda node: isinstance(node, Whole) or is_leaf(node)  # noqa: E731
    return _leaves(tree, one), jax.tree.structure(tree, is_leaf=one)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a tree's arrays by their paths."""
    return {"/".join(keys): tuple(leaf.shape) for keys, leaf in flatten_with_keys(tree)[0]}


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree. A `Whole` is one."""
    return [leaf for _, leaf in flatten_with_keys(tree)[0]]


def _leaves(tree: Any, is_leaf: Callable[[Any], bool]) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: _is_box(node) or is_leaf(node))
    for path, node in nodes:
        inside = _in_box(node, is_leaf) if _is_box(node) and not is_leaf(node) else [((), node)]
        found += [((*map(_key_string, path), *keys), leaf) for keys, leaf in inside]
    return found


def _in_box(box: Any, is_leaf: Callable[[Any], bool]) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for path, child in jax.tree_util.tree_flatten_with_path(box, is_leaf=lambda node: node is not box)[0]:
        below = _leaves(child, is_leaf)
        hidden = path == (GetAttrKey("value"),) and [keys for keys, _ in below] == [()]
        found += [((*(() if hidden else map(_key_string, path)), *keys), leaf) for keys, leaf in below]
    return found


def former_keys(tree: Any) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The former keys of leaves and their present ones, where they differ.

    Former releases took no field named `value` for a key, not even outside of boxes. Empty where such keys would have been
    refused, because those of one leaf continued those of another.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Whole))
    former = {}
    for (path, _), (keys, _) in zip(found, flatten_with_keys(tree)[0], strict=True):
        hidden = len(path) > 1 and path[-1] == GetAttrKey("value") and len(keys) == len(path)
        former[keys[:-1] if hidden else keys] = keys
    if any(keys[:n] in former for keys in former for n in range(1, len(keys))):
        return {}
    return {old: keys for old, keys in former.items() if old != keys}


def nearest(path: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """The known paths that look most like `path`, best first."""
    return difflib.get_close_matches(path, list(paths), n=count, cutoff=0.0)


def insert(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Puts `value` into a nested dict at `keys`, making the dicts on the way."""
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def nested(flat: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """A nested dict of leaves by their keys."""
    tree: dict[str, Any] = {}
    for keys, leaf in flat:
        insert(tree, keys, leaf)
    return tree


def lookup(tree: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value at `keys` in a nested dict; an empty dict where the tree has nothing there."""
    for key in keys:
        if key not in tree:
            return {}
        tree = tree[key]
    return tree


def number(path: str) -> int:
    """A fixed number for a path, from which its random keys come: other paths don't change it."""
    return zlib.crc32(path.encode())
