"""Groups of leaves whose matrices have fields of a code in common: which they are, and how they are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.kept import Kept
from jlora.core.protocol.layers import kinds, layer_paths
from jlora.core.protocol.method import Site
from jlora.core.protocol.stored import Stored
from jlora.core.tree import placement


def groups(sites: Sequence[Site]) -> list[list[Site]]:
    """The groups among sites of `Kept` whose codes have common fields, in the order of their first leaves.

    Raises:
        ValueError: for leaves that the code can't take together, with their paths.
    """
    found: dict[Any, list[Site]] = {}
    for method in dict.fromkeys(site.method for site in sites):
        assert isinstance(method, Kept) and method.code is not None
        same = [site for site in sites if site.method == method]
        keys = kinds(same)[0] if method.code.over == "layers" else layer_paths(same)
        for site, key in zip(same, keys, strict=True):
            found.setdefault((method, key), []).append(site)
    for (method, _), members in found.items():
        check(method.code, members)
    return list(found.values())


def check(code: Code, members: Sequence[Site]) -> None:
    """Whether a code can take some leaves together.

    Raises:
        ValueError: with their paths.
    """
    sizes = [(site.in_size, site.out_size) for site in members]
    if code.over == "layers":
        sizes = [size for site, size in zip(members, sizes, strict=True) for _ in np.ndindex(*site.batch_shape)]
    names = ", ".join(site.path for site in members)
    if len(stacks := {site.batch_shape for site in members}) > 1 and code.over == "leaves":
        raise ValueError(
            f"{names}: {code} takes matrix by matrix of each together, but their stacks are {sorted(stacks)}"
        )
    try:
        code.check_group(sizes)
    except ValueError as error:
        raise ValueError(f"{names}: {code}: {error}") from None


def encoded_together(code: Code, members: Sequence[tuple[Site, Any]]) -> list[Stored]:
    """The leaves of a group in the form of a code.

    Raises:
        ValueError: for leaves on a mesh, and where values are not finite.
    """
    for site, leaf in members:
        if placement.named_sharding(leaf) is not None:
            raise ValueError(
                f"{site.path} lies on a mesh, and {code} is found from several matrices together, on one device; quantize "
                "first, then put the params on the mesh"
            )
    stacks = [_stack(site, leaf) for site, leaf in members]
    group, alone = members[0][0].path, code.over == "layers"
    if alone:
        fields = iter(_encoded(code, [w for stack in stacks for w in stack], members))
        found = [[next(fields) for _ in stack] for stack in stacks]
    else:
        found = list(zip(*(_encoded(code, list(ws), members) for ws in zip(*stacks, strict=True)), strict=True))
    common: dict[str, jax.Array] = {}
    stored = []
    for (site, _), each in zip(members, found, strict=True):
        whole = {name: each[0][name] for name in code.common} if alone or not site.batch_axes else {}
        own = {name: _stacked(site, [one[name] for one in each]) for name in each[0] if name not in whole}
        for name in code.common:
            drawer = whole if name in whole else own
            drawer[name] = common.setdefault(name, drawer[name])
        roles = site.in_axes, site.out_axes, site.batch_axes
        stored.append(Stored(own, code, site.shape, jnp.dtype(site.dtype), *roles, whole, group))
    return stored


def _stack(site: Site, leaf: Any) -> jax.Array:
    """The matrices of a leaf, `[count, in, out]`."""
    return site.fold(jnp.asarray(leaf)).reshape(-1, site.in_size, site.out_size)


def _stacked(site: Site, fields: list[jax.Array]) -> jax.Array:
    return jnp.stack(fields).reshape(*site.batch_shape, *fields[0].shape)


def _encoded(code: Code, matrices: list[jax.Array], members: Sequence[tuple[Site, Any]]) -> list[Arrays]:
    fields, finite = _together(code, matrices)
    if not isinstance(finite, Tracer) and not finite:
        names = ", ".join(site.path for site, _ in members)
        raise ValueError(f"{names}: some hold values that are not finite, which {code} can't keep")
    return fields


@partial(jax.jit, static_argnums=0)
def _together(code: Code, matrices: list[jax.Array]) -> tuple[list[Arrays], jax.Array]:
    wide = [w.astype(jnp.float32) for w in matrices]
    return code.encode_together(wide), jnp.all(jnp.stack([jnp.all(jnp.isfinite(w)) for w in wide]))
