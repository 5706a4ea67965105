"""Where arrays lie on a mesh of devices.

The axes `data` and `fsdp` cut the rows of a batch. Of all axes but `data`, the last cuts the last axis of every base
weight that has two or more, and the one before it, if any, cuts the axis before. Kernels that lead back to the model's
width (`o_proj`, `down_proj`, BERT's `output/dense`) have the two the other way round, so that what the last axis cut on
the way in is summed on the way out, and is never gathered. An adapter's factors follow: the axis
that they share with the weight is cut as the weight's is, the rank is not cut. Everything else is on every device.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jlora
from jlora import paths
from jlora.core.tree.placement import check_fields
from jlora.training import processes
from jlora.training.errors import SettingError

_BACK = re.compile(r"(^|/)((o|down)_proj|output/dense)/kernel")

#: Axes that cut the rows of a batch; `fsdp` cuts the weights besides, as any other axis does.
ROWS = ("data", "fsdp")


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """A mesh of the first devices; one device with the axis `data` if no axes are given.

    Raises:
        SettingError: if there are too few devices.
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
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=jax.devices()[:wanted])


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


def weight_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a base weight is cut; see the module's rule.

    Raises:
        SettingError: if an axis does not divide, naming the weight and the numbers.
    """
    names = [name for name in mesh.axis_names if name != "data"]
    if len(shape) < 2 or not names:
        return PartitionSpec()
    entries: list[str | None] = [*[None] * (len(shape) - len(names)), *names]
    if _BACK.search(path):
        entries[-2:] = entries[:-3:-1]
    for axis, name in enumerate(entries):
        if name is not None and shape[axis] % mesh.shape[name]:
            raise SettingError(
                "mesh",
                f"axis {name}={mesh.shape[name]} does not divide the {shape[axis]} of axis {axis} of {path} {shape}",
            )
    return PartitionSpec(*entries)


def place_base(params: Any, mesh: Mesh) -> Any:
    """The base's weights on the mesh."""

    leaves, treedef = paths.flatten_with_keys(params)
    return jax.tree.unflatten(treedef, [_placed("/".join(keys), leaf, mesh) for keys, leaf in leaves])


def _placed(path: str, leaf: Any, mesh: Mesh) -> Any:
    spec = weight_spec(path, tuple(leaf.shape), mesh)
    if not isinstance(leaf, jlora.Stored):
        return processes.put(leaf, NamedSharding(mesh, spec))
    specs = leaf.specs(leaf.code.axes, spec)
    try:
        check_fields(path, leaf, specs, mesh.shape)
    except ValueError as error:
        raise SettingError("mesh", str(error)) from None
    fields = {name: processes.put(array, NamedSharding(mesh, specs[name])) for name, array in leaf.fields.items()}
    common = {name: processes.put(array, NamedSharding(mesh, PartitionSpec())) for name, array in leaf.common.items()}
    return dataclasses.replace(leaf, fields=fields, common=common)


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """The tree with every leaf on the mesh: leaves that already are stay where they are, others go to every device."""

    def place(leaf):
        placed = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if placed else processes.put(leaf, replicated(mesh))

    return jax.tree.map(place, tree)


def place_adapters(adapted: jlora.Adapted, mesh: Mesh) -> jlora.Adapted:
    """All arrays of the adapters on the mesh; where it has several devices, `adapterize` cut them as their base already."""
    return adapted.replace(params=on_mesh(adapted.params, mesh), frozen=on_mesh(adapted.frozen, mesh))
