"""Starts from what a quantized base lost: of a base that is quantized already, or together with the base (LoftQ)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora import _compat, paths
from jlora.core.products.contraction import accumulation_dtype
from jlora.core.protocol.code import Code
from jlora.core.protocol.kept import Kept
from jlora.core.protocol.method import Site, View
from jlora.core.protocol.readings import Sites
from jlora.core.protocol.statistics import RESIDUAL
from jlora.core.protocol.stored import Stored, decoded
from jlora.core.tree import placement
from jlora.core.tree.quantize import encoded
from jlora.core.tree.spec import Spec, resolve
from jlora.core.tree.starts import Prepared, start_of

#: Quantizes a matrix `[in, out]` and decodes it again: an array of the same shape.
Rounding = Callable[[jax.Array], Any]


def residuals(params: Any, base: Any, spec: Spec, key: jax.Array | None = None, sites: Sites | None = None) -> Prepared:
    """Starts from `w_original - w`, for methods such as `LoRA(init="residual")` on a base that was quantized elsewhere.

    This is LoftQ with one step, and what PEFT's `replace_lora_weights_loftq` does, but for the division by the scale.

    Args:
        params: the original params. Leaves that the spec doesn't adapt so may be missing.
        base: the same after quantizing and decoding; it is what will be adapted. Dtypes may differ.
        spec: as for `adapterize`; methods that need no residual are passed over.
        key: as for `adapterize`.
        sites: as for `adapterize`.

    Returns:
        A `Prepared` for `adapterize(base, spec, key, sites, prepared=...)`, with the same spec.

    Raises:
        ValueError: where no method of the spec starts from a residual, a leaf has no original, or one of another shape or with
            values that are not finite, or the base is no other than the original. A single leaf may be what it was.

    Example:
        >>> base = jax.tree.map(lambda w: w.astype(jnp.float8_e4m3fn).astype(w.dtype), params)
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=8, init="residual")}
        >>> adapted = jlora.adapterize(base, spec, prepared=jlora.residuals(params, base, spec))

    Reference:
        Li et al. 2023, arXiv:2310.08659.
    """
    originals, leaves = dict(paths.flatten_with_keys(params)[0]), dict(paths.flatten_with_keys(base)[0])
    found = {}
    for site in _needing(leaves, spec, sites):
        if site.keys not in originals:
            close = paths.nearest(site.path, ["/".join(keys) for keys in originals])
            raise ValueError(
                f"{site.path} is in the base but not among the original params; the nearest there: {close}"
            )
        original, leaf = originals[site.keys], leaves[site.keys]
        if (shape := getattr(original, "shape", None)) != site.shape:
            raise ValueError(f"{site.path}: the original has the shape {shape}, the base {site.shape}")
        for what, array in (("the original", original), ("the base", leaf)):
            _check_finite(f"{site.path}: {what}", array)
        found[site] = leaf, _minus(_beside(original, leaf), leaf)
    return _prepared(found, key, "the base is what the original params are: quantize it before")


def loftq(
    params: Any,
    spec: Spec,
    code: Code | Rounding,
    steps: int = 1,
    key: jax.Array | None = None,
    sites: Sites | None = None,
) -> tuple[Any, Prepared]:
    """Quantizes a base so that base and adapters together come close to the original: LoftQ.

    For every matrix `W` of a leaf whose method starts from a residual, `steps` times `Q = code(W - D)` and `D` anew, what the
    method adds to `Q` when it starts from `W - Q`: for `LoRA(init="residual")` the truncated SVD of that; for
    `LoRA(init="residual_niter_4")` a randomised one, which comes near it in far less time where matrices are wide. `D` is
    zero at first, and the last step ends with the adapter, so that this is the nearest for the base that is returned. More
    steps mostly come closer, but need not: no code is a projection.

    Args:
        params: the original params.
        spec: as for `adapterize`; leaves of methods that start from no residual, and all others, stay as they are.
        code: such as `jlora.NF4()`, in whose form the leaves are then kept (see `quantize`). Or a function that quantizes a
            matrix `[in, out]`, in float32 at least, and decodes it again, called once a step for each matrix of a stack,
            outside of `jit`; what it gives is rounded to the leaf's dtype.
        steps: of the alternation, 1 or more; LoftQ uses 1 to 5.
        key: as for `adapterize`.
        sites: as for `adapterize`.

    Returns:
        The params with the quantized leaves, those of a function decoded, in their dtype and place, and a `Prepared` for
        `adapterize(base, spec, key, sites, prepared=...)`, with the same spec.

    Raises:
        ValueError: where no method of the spec starts from a residual, for steps below 1, original values that are not finite,
            and a `code` that fails, gives another shape or values that are not finite, or changes no leaf at all.

    Example:
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=8, init="residual")}
        >>> base, prepared = jlora.loftq(params, spec, jlora.Int8(), steps=5)
        >>> adapted = jlora.adapterize(base, spec, prepared=prepared)

    Reference:
        Li et al. 2023, arXiv:2310.08659, whose code does the same where the scale is 1.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"loftq's steps must be a whole number of at least 1, got {steps!r}")
    leaves, treedef = paths.flatten_with_keys(params)
    by_keys = dict(leaves)
    found = {}
    for site in _needing(by_keys, spec, sites):
        original = by_keys[site.keys]
        if isinstance(original, Stored):
            raise ValueError(
                f"{site.path} is kept as {original.code} already; start from the original params, or from this base by "
                "jlora.residuals"
            )
        _check_finite(f"{site.path}: the original", original)
        quantized = _alternated(site, original, code, steps)
        found[site] = quantized, _minus(original, quantized)
        by_keys[site.keys] = quantized
    prepared = _prepared(found, key, "code gives every matrix back as it was")
    return jax.tree.unflatten(treedef, list(by_keys.values())), prepared


def _needing(leaves: dict[tuple[str, ...], Any], spec: Spec, sites: Sites | None) -> list[Site]:
    """The sites whose methods start from a residual.

    Raises:
        ValueError: where there are none, or one needs data too.
    """
    found = [site for site in resolve(leaves.items(), spec, sites) if RESIDUAL in site.method.needs]
    for site in found:
        if more := sorted(site.method.needs - {RESIDUAL}):
            raise ValueError(
                f"{site.path}: {site.method} needs {', '.join(more)} beside a residual; nothing gives it both"
            )
    if not found:
        raise ValueError('no method of the spec starts from a residual, as jlora.LoRA(init="residual") does')
    return found


def _prepared(found: dict[Site, tuple[Any, jax.Array]], key: jax.Array | None, unchanged: str) -> Prepared:
    """The starts of leaves of a base from their residuals."""
    key = jax.random.key(0) if key is None else _compat.typed_key(key)
    concrete = [residual for _, residual in found.values() if not isinstance(residual, Tracer)]
    if len(concrete) == len(found) and not any(bool(jnp.any(residual != 0)) for residual in concrete):
        raise ValueError(f"{next(iter(found)).path} and all other leaves have a residual of zeros: {unchanged}")
    return Prepared({site: start_of(site, leaf, key, residual=each) for site, (leaf, each) in found.items()})


def _alternated(site: Site, original: Any, code: Code | Rounding, steps: int) -> Any:
    """The leaf that LoftQ's alternation ends with."""
    quantized = _coded(site, code, original, _wide(original, original))
    for _ in range(steps - 1):
        start = start_of(site, quantized, jax.random.key(0), residual=_minus(original, quantized))
        leaf = decoded(quantized)
        added = _compat.automatic(partial(_added, site), jax.typeof(leaf))(leaf, start.params, start.frozen)
        quantized = _coded(site, code, original, _wide(original, original) - added)
    return quantized


def _added(site: Site, leaf: jax.Array, params: Any, frozen: Any) -> jax.Array:
    """What a method adds to a leaf."""

    def one(w: jax.Array, params: Any, frozen: Any) -> jax.Array:
        v = site.method.weight(View(w, params, frozen, site))
        return v - w.astype(v.dtype)

    for _ in site.batch_axes:
        one = jax.vmap(one)
    return site.unfold(one(site.fold(leaf), params, frozen))


def _coded(site: Site, code: Code | Rounding, like: Any, leaf: jax.Array) -> Any:
    """A leaf with each of its matrices quantized, by a function also decoded, in the dtype and place of the original."""
    if isinstance(code, Code):
        _check_code(site, code)
        return encoded(site, code, _beside(leaf, like))
    matrices = site.fold(leaf)
    matrices = matrices.reshape(-1, site.in_size, site.out_size)
    rounded = jnp.stack([_decoded(site, code, matrix) for matrix in matrices])
    return _beside(site.unfold(rounded).astype(like.dtype), like)


def _check_code(site: Site, code: Code) -> None:
    try:
        Kept(code).check(site)
    except ValueError as error:
        raise ValueError(f"{site.path}, shape {site.shape}: {error}") from None


def _decoded(site: Site, code: Rounding, matrix: jax.Array) -> jax.Array:
    """A matrix quantized and decoded.

    Raises:
        ValueError: for a code that refuses the matrix, or gives something else than a matrix of that shape.
    """
    try:
        found = jnp.asarray(code(matrix))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{site.path}: code refuses a {site.in_size} x {site.out_size} matrix: {error}") from error
    if found.shape != matrix.shape or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"{site.path}: code made {found.dtype} of shape {found.shape} of a matrix of floats of shape {matrix.shape}; it "
            "must decode what it quantized"
        )
    _check_finite(f"{site.path}: what code made of it", found)
    return found


def _wide(*arrays: Any) -> jax.Array:
    """The first array in the widest of their dtypes, float32 at least."""
    dtypes = [jnp.dtype(accumulation_dtype(array.dtype)) for array in arrays]
    return jnp.asarray(arrays[0]).astype(max(dtypes, key=lambda dtype: dtype.itemsize))


def _minus(original: Any, leaf: Any) -> jax.Array:
    leaf = decoded(leaf)
    return _wide(original, leaf) - _wide(leaf, original)


def _beside(array: Any, leaf: Any) -> Any:
    """An array put where a leaf lies, if that is on a mesh."""
    sharding = placement.named_sharding(leaf)
    return array if sharding is None or isinstance(array, Tracer) else jax.device_put(array, sharding)


def _check_finite(what: str, array: Any) -> None:
    finite = jnp.all(jnp.isfinite(jnp.asarray(decoded(array))))
    if not isinstance(finite, Tracer) and not bool(finite):
        raise ValueError(f"{what} holds values that are not finite")
