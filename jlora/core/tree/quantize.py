"""`quantize`: leaves of a params tree kept in the form of a code, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from jlora import _compat, paths
from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.fields import Fields
from jlora.core.protocol.kept import Kept
from jlora.core.protocol.method import Site
from jlora.core.protocol.readings import Sites
from jlora.core.protocol.stored import Stored, decoded
from jlora.core.tree import groups, placement
from jlora.core.tree.adapted import Adapted, kept_site
from jlora.core.tree.merge import effective_leaf, merged_leaves
from jlora.core.tree.spec import Axes, resolve
from jlora.core.walk.weight import Weight


def quantize(params: Any, spec: Mapping[Any, Code | Axes | None], sites: Sites | None = None) -> Any:
    """Params with some leaves kept in the form of a code, such as 4-bit numbers.

    Such a leaf (`Stored`) stands where its array stood, and everything in jlora takes it: `adapterize`, `lift`, `merge`,
    `save`. A lifted function decodes it inside of the product that uses it, in every pass; codes and scales are never trained.

    Args:
        params: any pytree of arrays. A leaf that lies on one device is encoded matrix by matrix, so that a stack is nowhere
            whole in float32; one on a mesh is encoded where it lies.
        spec: ordered mapping from pattern to code, as for `adapterize`: a regex that must match a leaf's whole path, or
            `ALL_LINEAR`, which leaves out embeddings and heads. The first match wins; what nothing matches, or what matches
            None, stays as it is. `jlora.Axes("batch in out", code)` names the roles of a leaf's axes.
        sites: how the function reads its weights, from `jlora.sites`. Without it a leaf of two axes is `[in, out]`, and more
            axes are an error. Codes run along the contracted side, so these roles decide what is rounded together.

    Returns:
        The same tree with `Stored` leaves.

    Raises:
        TypeError: for a spec or code of the wrong kind, an `Adapted`, and for leaves of integers.
        ValueError: for a pattern that matches nothing, a leaf that is kept as a code already, an embedding of which rows are
            looked up, a size that the code refuses (such as a block that doesn't divide), or values that are not finite.

    Example:
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.Int8()}
        >>> adapted = jlora.adapterize(jlora.quantize(params, spec), {r".*/q_proj/kernel": jlora.LoRA(8)})
        >>> logits = jlora.lift(model.apply)({"params": adapted}, tokens)
    """
    if isinstance(params, Adapted):
        raise TypeError(
            "quantize takes the params of a base, and got an Adapted, whose trained arrays would be rounded too: quantize "
            "first, then adapterize"
        )
    leaves, treedef = paths.flatten_with_keys(params)
    found, by_keys = resolve(leaves, keeping(spec), sites), dict(leaves)
    for site in found:
        if isinstance(leaf := by_keys[site.keys], Stored):
            raise ValueError(f"{site.path} is kept as {leaf.code} already; decode it first (jlora.dequantize)")
    together = groups.groups([site for site in found if code_at(site).over])
    new = {site.keys: encoded(site, code_at(site), by_keys[site.keys]) for site in found if not code_at(site).over}
    for members in together:
        stored = groups.encoded_together(code_at(members[0]), [(site, by_keys[site.keys]) for site in members])
        new |= dict(zip((site.keys for site in members), stored, strict=True))
    return jax.tree.unflatten(treedef, [new.get(keys, leaf) for keys, leaf in leaves])


def dequantize(params: Any) -> Any:
    """Params with every leaf that is kept in the form of a code decoded, in its shape and dtype.

    Example:
        >>> plain = jlora.dequantize(jlora.quantize(params, {r".*/q_proj/kernel": jlora.Int8()}))
    """
    leaves, treedef = paths.flatten_with_keys(params)
    return jax.tree.unflatten(treedef, [decoded(leaf) for _, leaf in leaves])


def requantize(adapted: Adapted) -> Any:
    """`merge`, with every leaf that was kept in the form of a code encoded again by the same code.

    That rounds the merged weights: what is finer than the code's steps is lost. `merge` decodes such leaves instead. What
    `jlora.Fields` trained stands in its place as it is.

    Raises:
        ValueError: as `merge`, and where a merged weight is not finite.

    Example:
        >>> quantized = jlora.quantize(params, {r".*/q_proj/kernel": jlora.Int8()})
        >>> adapted = jlora.adapterize(quantized, {r".*/q_proj/kernel": jlora.LoRA(8)})
        >>> served = jlora.requantize(adapted)
    """
    leaves = dict(paths.flatten_with_keys(adapted.base)[0])

    def formed(weight: Weight) -> Any:
        assert weight.site is not None
        leaf = leaves[weight.site.keys]
        if isinstance(weight.method, Fields):
            return weight.method.put_back(leaf, weight.params, weight.shared)
        whole = effective_leaf(weight)
        return encoded(weight.site, leaf.code, whole) if isinstance(leaf, Stored) and not leaf.group else whole

    merged = merged_leaves(adapted, formed)
    params = adapted.with_replaced(merged | _groups_again(leaves, merged))
    is_node = lambda node: isinstance(node, Adapted | Stored)  # noqa: E731
    again = lambda node: requantize(node) if isinstance(node, Adapted) else node  # noqa: E731
    return jax.tree.map(again, params, is_leaf=is_node)


def _groups_again(leaves: Mapping[tuple[str, ...], Any], merged: Mapping[tuple[str, ...], Any]) -> dict[Any, Stored]:
    """The leaves of the groups of which some were merged to plain arrays, encoded together again."""
    found: dict[Any, Stored] = {}
    grouped = {keys: leaf for keys, leaf in leaves.items() if isinstance(leaf, Stored) and leaf.group}
    plain = {grouped[keys].group for keys, leaf in merged.items() if keys in grouped and not isinstance(leaf, Stored)}
    for group in dict.fromkeys(leaf.group for leaf in grouped.values() if leaf.group in plain):
        members = {keys: leaf for keys, leaf in grouped.items() if leaf.group == group}
        whole = [(kept_site(keys, leaf), decoded(merged.get(keys, leaf))) for keys, leaf in members.items()]
        code = next(iter(members.values())).code
        found |= dict(zip(members, groups.encoded_together(code, whole), strict=True))
    return found


def keeping(spec: Any) -> dict[Any, Any]:
    """The spec with methods in the place of codes, by which its leaves are found.

    Raises:
        TypeError: for anything but codes.
    """
    if not isinstance(spec, Mapping):
        raise TypeError(f"a spec maps patterns to codes, like {{r'.*/kernel': jlora.NF4()}}; got {type(spec).__name__}")
    keeping: dict[Any, Any] = {}
    for entry, (pattern, code) in enumerate(spec.items()):
        bare = code.method if isinstance(code, Axes) else code
        if not (bare is None or isinstance(bare, Code)):
            raise TypeError(f"spec entry {pattern!r} must be a code such as jlora.NF4(), or None; got {bare!r}")
        kept = None if bare is None else Kept(bare, entry if bare.over else 0)
        keeping[pattern] = Axes(code.roles, kept, code.kind) if isinstance(code, Axes) and kept else kept
    return keeping


def code_at(site: Site) -> Code:
    """The code of a site by `keeping`."""
    assert isinstance(site.method, Kept) and site.method.code is not None
    return site.method.code


def encoded(site: Site, code: Code, leaf: Any) -> Stored:
    """A leaf in the form of a code, cut over a mesh as it was.

    Raises:
        ValueError: for a code that takes several leaves together.
    """
    check_alone(site, code)
    sharding = placement.named_sharding(leaf)
    if sharding is not None:
        return _as_stored(site, code, _on_mesh(site, code, leaf, sharding))
    if isinstance(leaf, Tracer):
        return _as_stored(site, code, _all(site, code, leaf))
    order = (*site.batch_axes, *site.in_axes, *site.out_axes)
    stack = leaf.transpose(order).reshape(-1, site.in_size, site.out_size)
    return by_matrix(site, code, (stack[number] for number in range(stack.shape[0])))


def check_alone(site: Site, code: Code) -> None:
    """Refuses a code that takes matrices together where each leaf is encoded for itself.

    Raises:
        ValueError: with what can be done.
    """
    if code.over:
        raise ValueError(
            f"{site.path}: {code} takes several {code.over} together, where here each is encoded for itself; load or keep "
            "plain params, and encode them whole by jlora.quantize"
        )


def by_matrix(site: Site, code: Code, matrices: Iterable[Any]) -> Stored:
    """A leaf in the form of a code from its folded matrices `[in, out]`, which are taken one after the other.

    Beside the fields of the whole leaf no more than one matrix and its fields are in memory, wherever matrices come from.

    Args:
        site: the leaf.
        code: the code.
        matrices: as many as the batch axes count, in their order, in the leaf's dtype.

    Raises:
        ValueError: where values are not finite.
    """
    check_alone(site, code)
    count, kept = math.prod(site.batch_shape), {}
    for number, w in enumerate(matrices):
        fields, finite = _encode(code, jnp.asarray(w))
        if not finite:
            raise ValueError(f"{site.path} holds values that are not finite, which {code} can't keep")
        kept = kept or {name: jnp.zeros((count, *array.shape), array.dtype) for name, array in fields.items()}
        kept = _written(kept, fields, number)
        del w, fields  # before the next matrix is made
    shapes = {name: (*site.batch_shape, *array.shape[1:]) for name, array in kept.items()}
    return _as_stored(site, code, {name: array.reshape(shapes[name]) for name, array in kept.items()})


@partial(jax.jit, donate_argnums=0)
def _written(kept: Arrays, fields: Arrays, number: int) -> Arrays:
    """The fields of all matrices with those of one in their place."""
    return {name: kept[name].at[number].set(array) for name, array in fields.items()}


def _as_stored(site: Site, code: Code, fields: Any) -> Stored:
    return Stored(fields, code, site.shape, jnp.dtype(site.dtype), site.in_axes, site.out_axes, site.batch_axes)


def _all(site: Site, code: Code, leaf: jax.Array) -> Arrays:
    """The fields of all matrices of a leaf at once."""

    def one(w: jax.Array) -> Arrays:
        return code.encode(w.astype(jnp.float32))

    for _ in site.batch_axes:
        one = jax.vmap(one)
    return one(site.fold(leaf))


@partial(jax.jit, static_argnums=0)
def _encode(code: Code, w: jax.Array) -> tuple[Arrays, jax.Array]:
    w = w.astype(jnp.float32)
    return code.encode(w), jnp.all(jnp.isfinite(w))


def _on_mesh(site: Site, code: Code, leaf: jax.Array, sharding: NamedSharding) -> Arrays:
    """The fields of a leaf that lies on a mesh, each cut as the leaf is, in whole blocks.

    Raises:
        ValueError: where a cut would fall into a block.
    """
    specs = site.specs(code.axes, sharding.spec)
    whole = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    shapes: Any = _as_stored(site, code, jax.eval_shape(partial(_all, site, code), whole))
    placement.check_fields(site.path, shapes, specs, sharding.mesh.shape)
    shardings = {name: NamedSharding(sharding.mesh, spec) for name, spec in specs.items()}
    encode = _compat.automatic(lambda leaf: _all(site, code, leaf), jax.typeof(leaf), lambda _: specs)
    fields = jax.jit(encode, out_shardings=shardings)(leaf)
    if not bool(jnp.all(jnp.isfinite(leaf))):
        raise ValueError(f"{site.path} holds values that are not finite, which {code} can't keep")
    return fields
