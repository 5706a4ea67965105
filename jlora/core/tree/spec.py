"""From a spec (pattern -> method) to sites; errors name the path, its shape and what to write instead."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jlora import _compat, paths
from jlora.core.protocol.code import Code
from jlora.core.protocol.fields import Fields
from jlora.core.protocol.kept import Kept
from jlora.core.protocol.method import GROUPED, Method, Site
from jlora.core.protocol.readings import Leaf, Sites
from jlora.core.protocol.stored import Stored
from jlora.core.tree import beside

Keys = tuple[str, ...]


class _AllLinear:
    """Pattern for every weight that is contracted with an activation, but the head. Needs traced sites."""

    def __repr__(self) -> str:
        return "ALL_LINEAR"


ALL_LINEAR = _AllLinear()


@dataclass(frozen=True)
class Axes:
    """A method together with the roles of the leaf's axes, where no trace says them.

    Args:
        roles: one word an axis: "in", "out" or "batch" (stacked layers, experts), as in `"batch in out"`.
        method: the method; a code in a spec of `quantize`.
        kind: "dot", or "gather" for an embedding, or "conv" for a convolution ("grouped conv" where it has feature groups).

    Raises:
        ValueError: for other words.
        TypeError: for a method that is none.

    Example:
        >>> {r"layers/mlp/up/kernel": jlora.Axes("batch in out", jlora.LoRA(8))}
    """

    roles: str
    method: Method | Code
    kind: str = "dot"

    def __post_init__(self) -> None:
        words = set(self.roles.split())
        if not {"in", "out"} <= words or not words <= {"in", "out", "batch"}:
            raise ValueError(f'roles are words "in", "out" and "batch", with in and out among them; got {self.roles!r}')
        if self.kind not in ("dot", "gather", "conv", GROUPED):
            raise ValueError(f'kind must be "dot", "gather" or "conv", got {self.kind!r} (or {GROUPED!r})')
        if not isinstance(self.method, Method | Code):
            raise TypeError(f"Axes are for a method, or a code of quantize, such as jlora.LoRA(8); got {self.method!r}")


Spec = Mapping[Any, Method | Axes | None]


def resolve(leaves: Iterable[tuple[Keys, Any]], spec: Spec, sites: Sites | None) -> list[Site]:
    """The sites that a spec asks for, in the order of the leaves.

    Raises:
        TypeError: for a spec, pattern or method of the wrong kind, and for integer leaves.
        ValueError: for a pattern that matches nothing, unknown axis roles, or a matrix that a method can't adapt.
    """
    entries = _checked(spec)
    shapes = {keys: leaf for keys, leaf in leaves if leaf is not None}
    found_roles = None if sites is None else sites.aligned(shapes)
    linear = _linear_keys(found_roles) if any(pattern is ALL_LINEAR for pattern, _ in entries) else frozenset()
    hits: dict[int, int] = dict.fromkeys(range(len(entries)), 0)
    taken: dict[int, int] = dict.fromkeys(range(len(entries)), 0)
    found = []
    for keys, leaf in shapes.items():
        matching = [n for n, (pattern, _) in enumerate(entries) if _matches(pattern, keys, linear)]
        for n in matching:
            hits[n] += 1
        if matching:
            taken[matching[0]] += 1
            if (method := entries[matching[0]][1]) is not None:
                found.append(_site(keys, leaf, method, found_roles, shapes))
    left_out = {
        n: _left_out(method, entries, found_roles)
        for n, (pattern, method) in enumerate(entries)
        if pattern is ALL_LINEAR and method is not None and found_roles is not None
    }
    for n, (pattern, _) in enumerate(entries):
        _check_hits(pattern, hits[n], taken[n], shapes, left_out.get(n, ""))
    for said in filter(None, left_out.values()):
        warnings.warn(f"ALL_LINEAR {said}", stacklevel=3)
    return found


def _left_out(method: Method | Axes, entries: list[tuple[Any, Any]], leaves: Mapping[Keys, Leaf]) -> str:
    """What to say of weights that meet an activation in a form in which their axes can't be told, and that no pattern names."""
    named = [pattern for pattern, _ in entries]
    left_out = [
        leaf
        for keys, leaf in leaves.items()
        if leaf.entered and leaf.kind is None and len(leaf.shape) > 1
        if not any(_matches(pattern, keys, frozenset()) for pattern in named)
    ]
    if not left_out:
        return ""
    uses = [f"{leaf.path} (by {', '.join(dict.fromkeys(r.primitive for r in leaf.readings))})" for leaf in left_out]
    first = left_out[0]
    axes = " ".join(["batch"] * (len(first.shape) - 2) + ["in", "out"][: len(first.shape)])
    return (
        f"leaves out {', '.join(uses)}: the function changes them before their product so that their axes can't "
        f'be told. To adapt one, name its axes, as in {{"{first.path}": jlora.Axes("{axes}", {method})}}; to leave it out '
        f'without this warning, {{"{first.path}": None}}'
    )


def _checked(spec: Spec) -> list[tuple[Any, Method | Axes | None]]:
    if not isinstance(spec, Mapping):
        raise TypeError(f"a spec maps patterns to methods, like {{r'.*/kernel': LoRA(8)}}; got {type(spec).__name__}")
    entries = []
    for pattern, method in spec.items():
        if not (method is None or isinstance(method, Method | Axes)):
            raise TypeError(f"spec entry {pattern!r} must be a method such as jlora.LoRA(8), or None; got {method!r}")
        if pattern is not ALL_LINEAR:
            if not isinstance(pattern, str):
                raise TypeError(f"a pattern is a regex string or jlora.ALL_LINEAR, got {pattern!r}")
            try:
                pattern = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None
        entries.append((pattern, method))
    return entries


def _matches(pattern: Any, keys: Keys, linear: frozenset[Keys]) -> bool:
    return keys in linear if pattern is ALL_LINEAR else pattern.fullmatch("/".join(keys)) is not None


def _check_hits(pattern: Any, hits: int, taken: int, shapes: Mapping[Keys, Any], left_out: str) -> None:
    if taken:
        return
    if pattern is ALL_LINEAR:
        detail = "was left with nothing by the patterns before it" if hits else "found no weight that is contracted"
        raise ValueError(f"ALL_LINEAR {detail}" + (f", and {left_out}" if left_out else ""))
    if hits:
        raise ValueError(f"every leaf that {pattern.pattern!r} matches is taken by a pattern before it; put it first")
    known = ["/".join(keys) for keys in shapes]
    if not known:
        raise ValueError(f"the pattern {pattern.pattern!r} matches no leaf: the params tree has none")
    close = paths.nearest(pattern.pattern, known)
    raise ValueError(
        f"the pattern {pattern.pattern!r} matches no leaf (it must match the whole path); the nearest paths are "
        + ", ".join(repr(path) for path in close)
    )


def _linear_keys(roles: dict[Keys, Leaf] | None) -> frozenset[Keys]:
    if roles is None:
        raise ValueError(
            "ALL_LINEAR needs to know how the function reads its weights: pass sites=jlora.sites(fn, params, ...)"
        )
    return frozenset(keys for keys, leaf in roles.items() if leaf.kind == "dot" and not leaf.head and _is_matrix(leaf))


def _is_matrix(leaf: Leaf) -> bool:
    """Whether a leaf is contracted as a matrix is; a vector is not, nor what is in an outer product alone."""
    return leaf.roles is None or bool(leaf.roles[0] and leaf.roles[1])


def _site(
    keys: Keys, leaf: Any, method: Method | Axes, traced: dict[Keys, Leaf] | None, leaves: Container[Keys]
) -> Site:
    path, shape = "/".join(keys), tuple(getattr(leaf, "shape", ()))
    if not _compat.is_array(leaf):
        raise TypeError(f"{path} is {leaf!r} and no array; only arrays can be adapted, so leave it out of the pattern")
    kind, roles, bare = "dot", None, method
    if isinstance(method, Axes):
        bare, kind, roles = method.method, method.kind, _named_roles(path, shape, method)
        if traced is not None and traced[keys].kind == GROUPED:
            kind = GROUPED
    assert isinstance(bare, Method)
    if isinstance(bare, Fields):
        try:
            bare = bare.of(leaf)
        except ValueError as error:
            raise ValueError(f"{path}, shape {shape}: {error}") from None
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"{path}, shape {shape}, holds {leaf.dtype}; only floating-point leaves can be adapted")
    blank = Site(keys, shape, str(leaf.dtype), (), (), (), kind, bare)
    if not bare.matrix:
        if isinstance(leaf, Stored):
            raise ValueError(
                f"{path} is kept as {leaf.code}, and {bare} trains the leaf itself; decode it first (jlora.dequantize), or "
                "adapt it by a method that stays beside it, such as jlora.LoRA"
                + (", or train its fields by jlora.Fields()" if leaf.code.trained else "")
            )
        return blank
    if roles is None:
        kind, *roles = _roles(path, leaf, bare, None if traced is None else traced[keys])
    if isinstance(leaf, Stored) and tuple(roles) != leaf.roles:
        raise ValueError(
            f"{path} is kept as {leaf.code} with the axes {_words(shape, leaf.roles)!r}, but is to be adapted with "
            f"{_words(shape, roles)!r}; quantize it with those (jlora.quantize(params, spec, sites))"
        )
    blank = replace(blank, beside=beside.present(blank, leaves))
    site = replace(blank, in_axes=roles[0], out_axes=roles[1], batch_axes=roles[2], kind=kind)
    try:
        bare.check(site)
    except ValueError as error:
        raise ValueError(f"{path}, shape {shape}: {error}") from None
    return site


def _named_roles(path: str, shape: tuple[int, ...], named: Axes) -> list[tuple[int, ...]]:
    words = named.roles.split()
    if len(words) != len(shape):
        raise ValueError(
            f"{path} has {len(shape)} axes, shape {shape}, but its roles name {len(words)}: {named.roles!r}"
        )
    return [tuple(n for n, word in enumerate(words) if word == role) for role in ("in", "out", "batch")]


def _words(shape: tuple[int, ...], roles: Sequence[tuple[int, ...]]) -> str:
    """Roles as one word an axis."""
    names = {axis: name for axes, name in zip(roles, ("in", "out", "batch")) for axis in axes}
    return " ".join(names[axis] for axis in range(len(shape)))


def _roles(path: str, array: Any, method: Method, leaf: Leaf | None) -> tuple[Any, ...]:
    """(kind, in, out, batch) of a leaf's axes."""
    shape = tuple(array.shape)
    if len(shape) < 2:
        instead = "leave it out" if isinstance(method, Kept) else "use jlora.Full() for vectors and scalars"
        raise ValueError(f"{path}, shape {shape}: {method!r} adapts a matrix; {instead}")
    if leaf is not None:
        return _traced_roles(path, shape, method, leaf)
    if isinstance(array, Stored):
        return "dot", *array.roles
    if len(shape) == 2:
        return "dot", (0,), (1,), ()
    example = f'jlora.Axes("{" ".join(["batch"] * (len(shape) - 2) + ["in", "out"])}", {method!r})'
    raise ValueError(
        f"{path}, shape {shape}: which of its {len(shape)} axes are contracted can't be known without a trace; pass "
        f"sites=jlora.sites(fn, params, ...), or name the axes, for example {example}"
    )


def _traced_roles(path: str, shape: tuple[int, ...], method: Method, leaf: Leaf) -> tuple[Any, ...]:
    if leaf.roles is not None and leaf.roles[0] and leaf.roles[1]:
        return leaf.kind, *leaf.roles
    uses = ", ".join(dict.fromkeys(reading.primitive for reading in leaf.readings)) or "nothing"
    single = not leaf.products or leaf.roles is not None
    problem = "no product contracts it" if single else "its products contract different axes"
    raise ValueError(
        f"{path}, shape {shape}: the function reads it by {uses}, so that {problem}; use jlora.Full(), or name the axes, "
        f'for example jlora.Axes("{" ".join(["batch"] * (len(shape) - 2) + ["in", "out"])}", {method!r})'
    )
