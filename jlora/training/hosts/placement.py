"""Where arrays lie on a mesh of devices.

The axes `data` and `fsdp` cut the rows of a batch. Of all axes but `data`, the last cuts the last axis of every matrix of
the base, and the one before it, if any, cuts the axis before. Kernels that lead back to the model's
width (`o_proj`, `down_proj`, BERT's `output/dense`) have the two the other way round, so that what the last axis cut on
the way in is summed on the way out, and is never gathered. Rules of the user's own come first. An adapter's factors follow:
the axis that they share with the weight is cut as the weight's is, the rank is not cut. Everything else is on every device.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jlora
from jlora import paths
from jlora.core.tree.placement import check_fields, check_rule, first_rules
from jlora.training.errors import SettingError
from jlora.training.hosts import processes
from jlora.training.settings.axes import ROWS, Rules, cutting_axes

_BACK = re.compile(r"(^|/)((o|down)_proj|output/dense)/kernel")
# What ends the paths of matrices; a stack of vectors, such as the scales of all layers' norms, has two axes as well.
_MATRIX = re.compile(r"(.*/)?(kernel|embedding)")
# A classifier's head, which has as many outputs as there are labels: whole on every device, whatever rules say.
_HEAD = "classifier/"


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """A mesh of the first devices; one device with the axis `data` if no axes are given.

    Raises:
        SettingError: if there are too few devices, or they lie in slices that the axis `data` does not divide into.
    """
    axes = dict(axes) or {"data": 1}
    wanted, found = math.prod(axes.values()), jax.device_count()
    if wanted > found:
        product = " x ".join(f"{name}={size}" for name, size in axes.items())
        raise SettingError("mesh", f"of {product} needs {wanted} devices, but there are {found}")
    if processes.several() and wanted != found:
        raise SettingError(
            "mesh",
            f"of {wanted} devices leaves out some of the {found} that the {jax.process_count()} processes have: the product "
            f"of its axes must be {found}",
        )
    return mesh_of(axes, jax.devices()[:wanted])


def mesh_of(axes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh of exactly these devices; where they lie in several slices, `data` goes across them and the rest within.

    Raises:
        SettingError: if the slices have different numbers of devices, or `data` is no multiple of their number.
    """
    types, sizes = (AxisType.Auto,) * len(axes), tuple(axes.values())
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        # Unlike jax.make_mesh, which refuses sizes that no physical axes of a TPU's torus have, such as 32 x 2 on 4 x 4 x 4.
        found = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(found, tuple(axes), axis_types=types)
    if len(set(slices.values())) > 1:
        counts = ", ".join(f"{count} of slice {index}" for index, count in sorted(slices.items()))
        raise SettingError("mesh", f"takes {counts}: it must take as many devices of each slice")
    check_slices(axes, len(slices))
    across = [len(slices) if name == "data" else 1 for name in axes]
    within = [size // outer for size, outer in zip(sizes, across)]
    found = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(found, tuple(axes), axis_types=types)


def check_slices(axes: Mapping[str, int], slices: int) -> None:
    """Refuses a mesh whose axis `data` does not go across that many slices.

    Raises:
        SettingError: if it does not.
    """
    if axes.get("data", 1) % slices:
        raise SettingError(
            "mesh",
            f"lies on {slices} slices, between which only rows are cut, since the network there is slow: data must be a "
            f"multiple of {slices}, got {', '.join(f'{name}={size}' for name, size in axes.items())}",
        )


def row_parts(mesh: Mesh) -> int:
    """In how many parts the mesh cuts rows that are computed at once."""
    return math.prod(mesh.shape.get(name, 1) for name in ROWS)


def check_batch(mesh: Mesh, batch: int, accumulate: int) -> None:
    """Refuses a batch whose rows computed at once can't be cut by the axes `data` and `fsdp`.

    Raises:
        SettingError: if they cannot.
    """
    parts, rows = row_parts(mesh), batch // accumulate
    if rows % parts:
        raise SettingError(
            "mesh",
            f"cuts the rows in {' x '.join(f'{name}={mesh.shape[name]}' for name in ROWS if name in mesh.shape)}, "
            f"but batch {batch} / accumulate {accumulate} is {rows} rows",
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_of_batch(mesh: Mesh, rows_axis: int) -> NamedSharding:
    """Cut by `data` and `fsdp` along the given axis."""
    names = tuple(name for name in ROWS if name in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(*[None] * rows_axis, names or None))


def weight_spec(path: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """How a base weight is cut by the module's rule.

    Raises:
        SettingError: if an axis does not divide, naming the weight and the numbers.
    """
    names = cutting_axes(mesh.axis_names)
    if path.startswith(_HEAD) or not _MATRIX.fullmatch(path) or not names:
        return PartitionSpec()
    entries: list[str | None] = [*[None] * (len(shape) - len(names)), *names]
    if _BACK.search(path):
        entries[-2:] = entries[:-3:-1]
    for axis, name in enumerate(entries):
        if name is not None and shape[axis] % mesh.shape[name]:
            raise SettingError(
                "mesh",
                f"axis {name}={mesh.shape[name]} does not divide the {shape[axis]} of axis {axis} of {path} {shape}; "
                "say by --shard how it is cut",
            )
    return PartitionSpec(*entries)


def base_shardings(params: Any, mesh: Any, rules: Rules | None = None) -> Any:
    """Where the base's weights lie on the mesh, from arrays or their shapes; of a code for each of its fields.

    Args:
        params: the base.
        mesh: the mesh; an abstract one is enough.
        rules: the user's own, which come before the module's; the head of a classifier has none.

    Raises:
        SettingError: as `weight_spec`; for a rule that matches no weight, or does not fit one; for a cut within a code's block.
    """
    leaves, treedef = paths.flatten_with_keys(params)
    names = ["/".join(keys) for keys, _ in leaves]
    rules = rules or {}
    with _named("shard"):
        ruled = first_rules([name for name in names if not name.startswith(_HEAD)], rules)
        for name, (_, leaf) in zip(names, leaves):
            if name in ruled:
                check_rule(name, leaf.shape, rules[ruled[name]], mesh.shape)
    specs = [
        rules[ruled[name]] if name in ruled else weight_spec(name, tuple(leaf.shape), mesh)
        for name, (_, leaf) in zip(names, leaves)
    ]
    found = [_leaf_shardings(name, leaf, spec, mesh) for name, (_, leaf), spec in zip(names, leaves, specs)]
    return jax.tree.unflatten(treedef, found)


@contextlib.contextmanager
def _named(setting: str) -> Iterator[None]:
    """Errors are those of a setting."""
    try:
        yield
    except ValueError as error:
        raise SettingError(setting, f"can't cut the base: {error}") from None


def _leaf_shardings(path: str, leaf: Any, spec: PartitionSpec, mesh: Any) -> Any:
    if not isinstance(leaf, jlora.Stored):
        return NamedSharding(mesh, spec)
    specs = leaf.specs(leaf.code.axes, spec)
    with _named("mesh"):
        check_fields(path, leaf, specs, mesh.shape)
    fields = {name: NamedSharding(mesh, specs[name]) for name in leaf.fields}
    whole = NamedSharding(mesh, PartitionSpec())
    return dataclasses.replace(leaf, fields=fields, common=dict.fromkeys(leaf.common, whole))


def place_base(params: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """The base's weights on the mesh.

    Raises:
        SettingError: as `base_shardings`.
    """
    return jax.tree.map(processes.put, params, base_shardings(params, mesh, rules))


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """The tree with every leaf on the mesh: leaves that already are stay where they are, others go to every device."""

    def place(leaf):
        placed = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if placed else processes.put(leaf, replicated(mesh))

    return jax.tree.map(place, tree)


def place_adapters(adapted: jlora.Adapted, mesh: Mesh) -> jlora.Adapted:
    """All arrays of the adapters on the mesh; where it has several devices, `adapterize` cut them as their base already."""
    return adapted.replace(params=on_mesh(adapted.params, mesh), frozen=on_mesh(adapted.frozen, mesh))
