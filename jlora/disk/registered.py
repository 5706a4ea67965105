"""`Adapted` and `Stored` as Flax's serialization writes them, and as `jax.export` names them in what it exports.

Imported for that alone: both libraries keep registries.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from flax import serialization
from jax import export
from jax.core import Tracer

from jlora import _compat, paths
from jlora.core.protocol.code import Code
from jlora.core.protocol.stored import Stored
from jlora.core.tree.adapted import Adapted, Plan
from jlora.disk.adapters import site_from, site_to_dict
from jlora.disk.fingerprint import fingerprint
from jlora.disk.serialize import UnknownClass, import_path, imported


def adapters_state(adapted: Adapted) -> dict[str, Any]:
    """What `flax.serialization` writes of an `Adapted`: the adapters and a fingerprint of the base, never the base.

    Where the base is traced, or shapes alone, there is no fingerprint.
    """
    state = {"params": adapted.params, "frozen": adapted.frozen}
    state = {name: serialization.to_state_dict(tree) for name, tree in state.items()}
    return {**state, "base": fingerprint(adapted.base)} if _has_values(adapted.base) else state


def adapters_restored(adapted: Adapted, state: Any) -> Adapted:
    """An `Adapted` with the adapters that `adapters_state` wrote, on its own base.

    Raises:
        ValueError: for what is no such state, adapters of other shapes, or another base.
    """
    if not isinstance(state, dict) or not {"params", "frozen"} <= set(state):
        got = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"the state of a jlora.Adapted has params and frozen, got {got}")
    written = state.get("base") if _has_values(adapted.base) else None
    if written is not None and (found := fingerprint(adapted.base)) != written:
        raise ValueError(
            f"the adapters were made for another base: fingerprint {written}, but the base of this Adapted has {found}"
        )
    new = {name: _restored(getattr(adapted, name), state[name], name) for name in ("params", "frozen")}
    return adapted.replace(**new)


def code_state(leaf: Stored) -> dict[str, Any]:
    """What `flax.serialization` writes of a leaf that is kept in the form of a code: the code in words, and its fields."""
    fields = {"fields": leaf.fields, **({"common": leaf.common} if leaf.common else {})}
    return {"code": repr(leaf.code), **{name: serialization.to_state_dict(each) for name, each in fields.items()}}


def code_restored(leaf: Stored, state: Any) -> Stored:
    """A leaf with the fields that `code_state` wrote.

    Raises:
        ValueError: for those of another code, or of other shapes.
    """
    code = state.get("code") if isinstance(state, dict) else None
    if code != repr(leaf.code):
        raise ValueError(f"a leaf of shape {leaf.shape} is kept as {leaf.code!r} here, but was written as {code}")
    fields = _restored(leaf.fields, state["fields"], "fields")
    return dataclasses.replace(leaf, fields=fields, common=_restored(leaf.common, state.get("common", {}), "common"))


def _has_values(tree: Any) -> bool:
    return not any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _restored(tree: Any, state: Any, what: str) -> Any:
    """A tree from its state; Flax compares the names alone.

    Raises:
        ValueError: for an array of another shape or dtype.
    """
    new = serialization.from_state_dict(tree, state, what)
    for (keys, old), leaf in zip(paths.flatten_with_keys(tree)[0], paths.leaves(new), strict=True):
        if _compat.is_array(old) and (np.shape(leaf), leaf.dtype) != (old.shape, old.dtype):
            raise ValueError(
                f"{what}/{'/'.join(keys)} has the shape {np.shape(leaf)} and dtype {leaf.dtype} in the state, and {old.shape} "
                f"and {old.dtype} here"
            )
    return new


def plan_to_bytes(static: tuple[Plan]) -> bytes:
    """The static part of an `Adapted`, for `jax.export`."""
    return json.dumps([{**site_to_dict(site), "beside": site.beside} for site in static[0].sites]).encode()


def plan_from_bytes(written: bytes | bytearray) -> tuple[Plan]:
    """The inverse of `plan_to_bytes`.

    Raises:
        ValueError: for a class of the user's own that is not imported.
    """
    entries = json.loads(written)
    sites = [
        dataclasses.replace(site_from(each, "an exported function"), beside=tuple(each["beside"])) for each in entries
    ]
    return (Plan(tuple(sites)),)


def form_to_bytes(static: tuple[Any, ...]) -> bytes:
    """The static part of a `Stored`, for `jax.export`: code, shape, dtype, the roles of its axes, and its group."""
    code, shape, dtype, *roles, group = static
    return json.dumps([_table(code), shape, str(np.dtype(dtype)), *roles, group]).encode()


def form_from_bytes(written: bytes | bytearray) -> tuple[Any, ...]:
    """The inverse of `form_to_bytes`.

    Raises:
        ValueError: for a code whose class is not imported.
    """
    table, shape, dtype, *roles, group = json.loads(written)
    return (_code(table), tuple(shape), np.dtype(dtype), *map(tuple, roles), group)


def _table(code: Code) -> dict[str, Any]:
    """A code as plain data, with the codes inside of it."""
    given = {each.name: getattr(code, each.name) for each in dataclasses.fields(code) if each.init}
    inside = {name: _table(value) if isinstance(value, Code) else value for name, value in given.items()}
    return {"code": import_path(type(code)), **inside}


def _code(table: dict[str, Any]) -> Code:
    path = table["code"]
    if (cls := imported(Code).get(path)) is None:
        raise UnknownClass(f"no code {path!r} is imported: import {path.rpartition('.')[0]} before this is read")
    given: dict[str, Any] = {}
    for name, value in table.items():
        if name != "code":
            inside = _code(value) if isinstance(value, dict) else value
            given[name] = tuple(inside) if isinstance(inside, list) else inside
    return cls(**given)


serialization.register_serialization_state(Adapted, adapters_state, adapters_restored)
serialization.register_serialization_state(Stored, code_state, code_restored)
export.register_pytree_node_serialization(
    Adapted, serialized_name="jlora.Adapted", serialize_auxdata=plan_to_bytes, deserialize_auxdata=plan_from_bytes
)
export.register_pytree_node_serialization(
    Stored, serialized_name="jlora.Stored", serialize_auxdata=form_to_bytes, deserialize_auxdata=form_from_bytes
)
