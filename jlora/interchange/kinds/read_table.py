"""Finds and reads adapters of a kind that a method states as a table (`PeftKind`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jlora.core.protocol.method import Method, Start, stated_kind
from jlora.core.protocol.peft import PeftKind, PeftTensor
from jlora.core.tree.starts import start_of
from jlora.interchange.files.config import Settings
from jlora.interchange.files.folder import FLOATS, INTEGERS, AdapterFolder
from jlora.interchange.files.parse import Contents
from jlora.interchange.files.recorded import Recorded
from jlora.interchange.kinds import table_settings
from jlora.interchange.kinds.table import from_file, plain, to_file
from jlora.interchange.leaves.forms import KEY
from jlora.interchange.leaves.index import MATRICES, Index, Keys, Read, trained_dtype
from jlora.interchange.leaves.names import Slot


@dataclass(frozen=True)
class Found:
    """The adapter of one module.

    Attributes:
        keys: the key of each tensor, by its name.
        method: by the settings.
        start: shapes and dtypes of the method's fields for this matrix.
        zeros: shapes of the tensors that hold only zeros, by name.
    """

    keys: dict[str, str]
    method: Method
    start: Start
    zeros: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Table:
    """What a folder holds: the adapter of each torch parameter, and the keys of the tensors of the whole model."""

    found: dict[str, Found]
    shared: dict[str, str]


def find(
    kind: PeftKind,
    cls: type[Method],
    folder: AdapterFolder,
    settings: Settings,
    contents: Contents,
    index: Index,
) -> Table:
    """The adapter of each torch parameter, with the shapes of its tensors checked.

    Raises:
        ValueError: for a missing or superfluous tensor, one of another shape, or a setting that jlora has not.
    """
    table_settings.check(kind, settings)
    found = {}
    for module, keys in contents.adapters.items():
        first = next(iter(keys.values()))
        name = _parameter(kind, module, first, index)
        settings.check_target(module, first)
        method = settings.build(cls, table_settings.read(kind, settings, module))
        slot = index.by_name[name][0]
        zeros = kind.zeros_of(method, index.site(slot.keys, method))
        found[name] = Found(keys, method, _shapes(method, index, slot), zeros)
        _check(kind, folder, name, found[name])
    _check_whole(kind, folder, settings, found, index)
    table = Table(found, contents.shared)
    _check_shared(kind, folder, table, index)
    return table


def _check_whole(
    kind: PeftKind, folder: AdapterFolder, settings: Settings, found: dict[str, Found], index: Index
) -> None:
    """Refuses a file without any tensor of a module that the settings name: with one tensor a module, nothing else shows it."""
    wanted = kind.tensors[0].name
    if not found:
        raise ValueError(f"{folder.file}: has no {wanted}; the file is not whole")
    for name in index.by_name:
        module, _, last = name.rpartition(".")
        if last in MATRICES and name not in found and settings.targets(module):
            raise ValueError(
                f"{folder.file}: {module!r} has no {wanted}, and target_modules names it; the file is not whole"
            )


def _parameter(kind: PeftKind, module: str, key: str, index: Index) -> str:
    """The parameter that a module's adapter adapts, which must be one leaf, or one layer of a stacked leaf."""
    name = index.matrix(module, key)
    if name in index.tied or not all(plain(kind, slot) for slot in index.by_name[name]):
        raise ValueError(
            f"{index.where}: {name!r} is fused, tied or no plain matrix here, where {kind.peft_type} can't be read ({key!r})"
        )
    return name


def _shapes(method: Method, index: Index, slot: Slot) -> Start:
    """What the method would start with at a matrix, without making it.

    Raises:
        ValueError: for a matrix that the method can't adapt.
    """
    site = index.site(slot.keys, method)
    try:
        method.check(site)
    except ValueError as error:
        raise ValueError(f"{slot.name!r}: {error}") from None
    w = jax.ShapeDtypeStruct((site.in_size, site.out_size), index.leaves[slot.keys].dtype)
    key = jax.eval_shape(lambda: jax.random.key(KEY))
    statistics = dict.fromkeys(method.needs, w)
    return jax.eval_shape(lambda key, w, more: method.start(key, w, site, **more), key, w, statistics)


def _tensors(kind: PeftKind, found: Found) -> list[tuple[PeftTensor, Any]]:
    """The tensors that a module must have, each with the shape and dtype of its field."""
    fields = {**found.start.params, **found.start.frozen}
    return [(tensor, fields[tensor.field]) for tensor in kind.of(found.method) if tensor.field in fields]


def _check(kind: PeftKind, folder: AdapterFolder, name: str, found: Found) -> None:
    module, wanted = name.rpartition(".")[0], _tensors(kind, found)
    repeated = {tensor.name for tensor in kind.shared if tensor.repeated}
    names = {tensor.name for tensor, _ in wanted} | repeated | set(found.zeros)
    for missing in sorted(names - set(found.keys)):
        raise ValueError(f"{folder.file}: {module!r} has no {missing}; the file is not whole")
    for other in sorted(set(found.keys) - names):
        raise ValueError(
            f"{folder.file}: {found.keys[other]!r} has no place: {found.method} has {', '.join(sorted(names))} there"
        )
    for zeros, shape in found.zeros.items():
        key = found.keys[zeros]
        folder.check(key, shape, f"{found.method} of {name!r}", FLOATS)
        if np.any(folder.read(key)):
            raise ValueError(
                f"{folder.file}: {key!r} must hold zeros, since {found.method} leaves that away at {name!r}"
            )
    for tensor, field in wanted:
        _check_one(folder, found.keys[tensor.name], tensor.layout, field, f"{found.method} of {name!r}")


def _check_one(folder: AdapterFolder, key: str, how: Any, field: Any, what: str, larger: tuple[int, ...] = ()) -> None:
    """Refuses a tensor that is not as large as the field, or has another type of numbers."""
    shape = to_file(how, np.broadcast_to(np.zeros((), np.bool_), field.shape)).shape
    given = folder.shape(key)
    if len(given) == len(shape):
        shape = tuple(max(size, given[axis]) if axis in larger else size for axis, size in enumerate(shape))
    # PEFT on Windows writes integers as floats.
    whole = np.issubdtype(field.dtype, np.integer)
    folder.check(key, shape, what, {**INTEGERS, **FLOATS} if whole else FLOATS)


def _check_shared(kind: PeftKind, folder: AdapterFolder, table: Table, index: Index) -> None:
    """Checks the tensors of the whole model against what all its modules together need."""
    if not kind.shared:
        return
    found, methods = table.found, {one.method for one in table.found.values()}
    if len(methods) > 1:
        raise ValueError(f"{folder.file}: modules with different settings can't share the tensors of {kind.peft_type}")
    start = _shared_shapes(methods.pop(), list(found), index)
    fields = {**start.params, **start.frozen}
    for tensor in kind.shared:
        if tensor.name not in table.shared:
            raise ValueError(f"{folder.file}: 'base_model.{tensor.name}' is missing; the file is not whole")
        key = table.shared[tensor.name]
        _check_one(folder, key, tensor.layout, fields[tensor.field], "all modules of the file", tensor.larger)
        for one in found.values() if tensor.repeated else ():
            if folder.shape(one.keys[tensor.name]) != folder.shape(key):
                raise ValueError(f"{folder.file}: {one.keys[tensor.name]!r} is no copy of {key!r}")


def _shared_shapes(method: Method, names: list[str], index: Index) -> Start:
    sites = tuple(index.site(keys, method) for keys in index.leaves_of(set(names)))
    found: Any = jax.eval_shape(lambda key: method.shared(key, sites), jax.eval_shape(lambda: jax.random.key(KEY)))
    return found if isinstance(found, Start) else Start({}, found)


def read(
    kind: PeftKind, folder: AdapterFolder, settings: Settings, table: Table, index: Index, recorded: Recorded
) -> list[Read]:
    """The adapters, by leaf.

    Raises:
        ValueError: for a stack of which some layers have no adapter, or one with other settings.
    """
    constants, trained = _shared(kind, folder, table, index)
    result = []
    for keys in index.leaves_of(set(table.found)):
        leaf = _leaf(kind, folder, keys, table.found, index, recorded)
        result.append(replace(leaf, shared=constants, shared_params=trained))
    return result


def _leaf(
    kind: PeftKind, folder: AdapterFolder, keys: Keys, found: dict[str, Found], index: Index, recorded: Recorded
) -> Read:
    """One leaf's adapter, put together of its layers."""
    slots = _slots(folder, keys, found, index)
    first = found[slots[0].name]
    site = index.site(keys, _method(kind, slots, first.method, recorded))
    pieces = []
    for slot in slots:
        one, fields = found[slot.name], {}
        for tensor, field in _tensors(kind, one):
            fields[tensor.field] = _read_one(folder, one.keys[tensor.name], tensor.layout, field)
        pieces.append((slot, fields))
    arrays = index.stack(site, pieces)
    params = {name: arrays[name] for name in first.start.params}
    frozen = {name: arrays[name] for name in first.start.frozen if name in arrays}
    if len(frozen) < len(first.start.frozen):
        frozen = {**start_of(site, index.leaves[keys], jax.random.key(KEY)).frozen, **frozen}
    return Read(site, params, frozen)


def _slots(folder: AdapterFolder, keys: Keys, found: dict[str, Found], index: Index) -> list[Slot]:
    """The slots of a leaf, which must all have an adapter, with one method."""
    slots, path = index.slots[keys], "/".join(keys)
    adapted = [slot for slot in slots if slot.name in found]
    if len(adapted) < len(slots):
        raise ValueError(
            f"{folder.file}: only {len(adapted)} of the {len(slots)} layers of {path} have an adapter; load the model with "
            "scan_layers=False"
        )
    methods = list(dict.fromkeys(found[slot.name].method for slot in slots))
    if len(methods) > 1:
        raise ValueError(
            f"{folder.file}: the layers of {path} differ in their settings, {methods[0]} and {methods[1]}; load the model with "
            "scan_layers=False"
        )
    return slots


def _method(kind: PeftKind, slots: list[Slot], told: Method, recorded: Recorded) -> Method:
    """The method that jlora's manifest names where it has the settings of the folder, else the one of the settings."""
    method = recorded.one(slots)
    own = None if method is None else stated_kind(method)
    if method is None or own is None or own.peft_type != kind.peft_type:
        return told
    same = all(getattr(method, setting.field, None) == getattr(told, setting.field) for setting in kind.settings)
    return method if same else told


def _read_one(folder: AdapterFolder, key: str, how: Any, field: Any) -> np.ndarray:
    """A field of one matrix.

    Raises:
        ValueError: for a whole number that the field's dtype does not hold.
    """
    if not np.issubdtype(field.dtype, np.integer):
        return from_file(how, folder.read_as(key, np.dtype(field.dtype)))
    tensor = folder.read(key)
    if not np.array_equal(tensor, found := tensor.astype(field.dtype)):
        raise ValueError(f"{folder.file}: {key!r} holds numbers that are no {np.dtype(field.dtype)}")
    return from_file(how, found)


def _shared(kind: PeftKind, folder: AdapterFolder, table: Table, index: Index) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants and the trained arrays of the whole model, in the widest dtype of its adapters.

    Raises:
        ValueError: where the copies beside modules differ.
    """
    if not kind.shared:
        return {}, {}
    found = table.found
    start = _shared_shapes(next(iter(found.values())).method, list(found), index)
    kinds = [trained_dtype(index.leaves[keys].dtype) for keys in index.leaves_of(set(found))]
    widest = max(kinds, key=lambda dtype: dtype.itemsize)
    arrays = {}
    for tensor in kind.shared:
        key, field = table.shared[tensor.name], {**start.params, **start.frozen}[tensor.field]
        dtype = field.dtype if np.issubdtype(field.dtype, np.integer) else widest
        arrays[tensor.field] = _read_one(folder, key, tensor.layout, jax.ShapeDtypeStruct(field.shape, dtype))
        for one in found.values() if tensor.repeated else ():
            if folder.read(one.keys[tensor.name]).tobytes() != folder.read(key).tobytes():
                raise ValueError(f"{folder.file}: {one.keys[tensor.name]!r} is no copy of {key!r}")
    return {n: arrays[n] for n in start.frozen if n in arrays}, {n: arrays[n] for n in start.params if n in arrays}
