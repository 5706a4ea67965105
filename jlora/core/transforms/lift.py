"""`lift`: any JAX function of params, run on adapted params."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jlora import _compat, paths
from jlora.core.products.contraction import PLANS
from jlora.core.protocol.kept import Kept
from jlora.core.protocol.method import Site
from jlora.core.protocol.stored import Stored
from jlora.core.tree.adapted import Adapted, kept_weight
from jlora.core.tree.merge import leaves_beside
from jlora.core.tree.stacked import Stacked
from jlora.core.walk import (
    collectives,  # noqa: F401  (registers its rules)
    convolution,  # noqa: F401  (registers its rules)
    dot,  # noqa: F401  (registers its rules)
    entering,  # noqa: F401  (registers its rules)
    experts,  # noqa: F401  (registers its rules)
    grouping,
    lookup,  # noqa: F401  (registers its rules)
    origins,
    passthrough,  # noqa: F401  (registers its rules)
    probing,  # noqa: F401  (registers its rules)
    taps,
)
from jlora.core.walk.interpreter import Walk
from jlora.core.walk.weight import Weight


def lift(
    fn: Callable[..., Any],
    strict: bool = False,
    unread: str = "error",
    plan: str = "auto",
    cuts: Mapping[str, int] | None = None,
    rows: int = 1,
    aux: bool = False,
) -> Callable[..., Any]:
    """The function that runs `fn` on adapted params.

    Formula: `lift(fn)(adapted, x) == fn(merge(adapted), x)`, in values and gradients, without forming the merged weights
    where a method has a faster form. In 16 bits and fewer the lift is the more exact: `merge` rounds the updated weight to
    its base's dtype, and a cast to 16 bits rounds it again, where the lift adds the update to the product before it rounds.
    What `fn` computes and does not return, directly or by an effect, is left out.

    Args:
        fn: any JAX function. Its arguments may hold an `Adapted` wherever they would hold the params tree (for Flax:
            `apply({"params": adapted}, x)`).
        strict: refuse with an error where an effective weight would have to be formed although its method is low-rank (or has
            another form of update that refuses it).
        unread: "error" refuses an adapted leaf that `fn` never reads; "allow" is for functions that use part of a model.
        plan: how products with low-rank methods are computed: "factored" as `x @ w + (x @ a) @ b`, "merged" by forming
            `w + a @ b` in every pass, or "auto", by a cost model of each product's shape.
        cuts: into how many pieces a mesh with automatic axes cuts the input of a leaf's product, by path, from
            `jlora.mesh.cuts`. In 16 bits each device then adds its part of the adapter before it rounds, so that the sum over
            devices carries 16 bits a value, as without adapters, and not 32.
        rows: into how many pieces such a mesh cuts the rows of activations, by their leading axis: the product of its axes that
            cut batches (data, FSDP). Methods whose gradients come from a dense gradient of the weight (SHiRA, HiRA, LoHa, ..)
            then send their own gradients from device to device, and not that one. Without dropout, and where the pieces divide
            the rows; the others are summed as without it. Results are the same.
        aux: return what methods say beside their products too, such as the scores of a router (see `Method.apply`). Through
            `scan`, `remat` and `vmap`; gradients flow through it. Without it that is left out.

    Returns:
        A function of the same arguments with the same result. It traces `fn` whenever it is called, so call it under
        `jax.jit`. With `aux` it returns `(result, said)`: `said` is a nested dict along the keys of the params, in place of a
        leaf the dict of what its method said, `[*batch, ...]` with the leaf's batch axes in front. It lacks the leaves whose
        method says nothing; where a function uses part of a stack, the other matrices have NaN.

    Raises:
        ValueError: (when called) for a leaf that is never read; under `strict`, with leaf, primitive and source line; for
            cuts of a leaf that is not adapted, or that do not divide its input; under `aux` for what is said inside `cond`,
            `while` or `shard_map`, which can't return it, or by a matrix that several products use.
        TypeError: for a method without an effective weight where the weight itself is needed.

    Example:
        >>> apply = jlora.lift(model.apply)
        >>> logits = apply({"params": adapted}, tokens)
    """
    check_options(unread, plan, rows)

    @functools.wraps(fn, updated=())
    def lifted(*args: Any, **kwargs: Any) -> Any:
        walk = Walk(strict, plan, cuts or {}, rows, together=grouping.together, says=aux)
        return (_heard if aux else call)(walk, fn, args, kwargs, unread == "error")

    return lifted


def check_options(unread: str, plan: str, rows: int = 1) -> None:
    """Refuses unknown options.

    Raises:
        ValueError: with what there is.
    """
    if unread not in ("error", "allow"):
        raise ValueError(f'unread must be "error" or "allow", got {unread!r}')
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {PLANS}, got {plan!r}")
    if rows < 1:
        raise ValueError(f"rows must be into how many pieces a mesh cuts the rows, 1 or more; got {rows!r}")


def _unchanged(weight: Weight) -> Weight:
    """Its argument: the default of `call`."""
    return weight


def _heard(walk: Walk, fn: Callable[..., Any], args: Any, kwargs: Any, must_read: bool) -> tuple[Any, dict[str, Any]]:
    """`call`, and what methods said, along the keys of the params."""
    sites: dict[str, list[Site]] = {}

    def marked(weight: Weight) -> Weight:
        if weight.site is None or not (weight.method.matrix and weight.form.owns("spoken")):
            return weight
        sites.setdefault(weight.name, []).append(weight.site)
        return taps.numbered(weight, weight.site.batch_shape)

    outputs = call(walk, fn, args, kwargs, must_read, marked)
    said: dict[str, Any] = {}
    for name, (site, *others) in sites.items():
        mine = [tap for tap in walk.taps if tap.name == name]
        if mine and others:
            raise ValueError(
                f"aux: {name} is adapted in several arguments, and what their methods say can't be told apart"
            )
        if mine:
            paths.insert(said, site.keys, taps.laid_out(mine, site))
    return outputs, said


def call(
    walk: Walk,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    must_read: bool,
    change: Callable[[Weight], Weight] = _unchanged,
) -> Any:
    """Walks `fn` with the weights of every `Adapted` among its arguments, each changed first, and those kept as a code."""
    found, treedef = paths.flatten_with_keys((args, kwargs), lambda node: isinstance(node, Adapted | Stacked))
    if stacks := [leaf for _, leaf in found if isinstance(leaf, Stacked)]:
        return stacks[0].plan  # refuses
    if not any(isinstance(leaf, Adapted | Stored) for _, leaf in found):
        return fn(*args, **kwargs)
    taken = [_weights(keys[2:] or keys, leaf) for keys, leaf in found]
    values = [change(value) for each in taken for value in each]
    beside = [leaves_beside(leaf, each) if isinstance(leaf, Adapted) else {} for (_, leaf), each in zip(found, taken)]
    walk.runs = max((leaf.plan.runs for _, leaf in found if isinstance(leaf, Adapted)), default=1)
    _check_cuts(walk.cuts, [site for _, leaf in found if isinstance(leaf, Adapted) for site in leaf.plan.sites])

    def on_arrays(*arrays: jax.Array) -> Any:
        left = iter(arrays)
        trees = []
        for (_, leaf), each, changed in zip(found, taken, beside, strict=True):
            new = [next(left) for _ in each]
            if isinstance(leaf, Adapted):
                keys = [weight.site.keys for weight in each if weight.site is not None]
                leaf = leaf.with_replaced(dict(zip(keys, new, strict=True)) | changed)
            trees.append(new[0] if isinstance(leaf, Stored) else leaf)
        args, kwargs = jax.tree.unflatten(treedef, trees)
        # The base of an `Adapted` may be an `Adapted` again.
        inner = Walk(walk.strict, walk.plan, rows=walk.rows, together=walk.together, says=walk.says)
        outputs = call(inner, fn, args, kwargs, must_read, change if walk.says else _unchanged)
        if inner.taps:
            raise ValueError(
                f"aux: {inner.taps[0].name} belongs to an Adapted that is another one's base, and what its method says can't "
                "be returned; lift without aux"
            )
        return outputs

    return run(walk, on_arrays, values, must_read)


def _weights(keys: tuple[str, ...], leaf: Any) -> list[Weight]:
    """The weights that an argument, or a leaf of one, brings."""
    if isinstance(leaf, Adapted):
        return [*leaf.weights(), *leaf.kept()]
    return [kept_weight(keys, leaf)] if isinstance(leaf, Stored) else []


def _check_cuts(cuts: Mapping[str, int], sites: list[Site]) -> None:
    """Refuses cuts of what is no adapted leaf, or that do not divide its input.

    Raises:
        ValueError: with the path and the numbers.
    """
    sizes = {site.path: site.in_size for site in sites if site.method.matrix}
    for path, pieces in cuts.items():
        if path not in sizes:
            raise ValueError(f"cuts names {path}, which is no adapted matrix; they are {', '.join(sizes)}")
        if pieces < 1 or sizes[path] % pieces:
            raise ValueError(f"cuts has {pieces} pieces for {path}, which do not divide its {sizes[path]} inputs")


def run(walk: Walk, on_arrays: Callable[..., Any], values: list[Weight], must_read: bool) -> Any:
    """Traces a function of arrays and walks it with weights in their place."""
    shapes = [value.aval for value in values]
    closed, out_shape = jax.make_jaxpr(on_arrays, return_shape=True)(*shapes)
    jaxpr, consts = _compat.open_jaxpr(closed)
    jaxpr = _compat.live(jaxpr)
    if walk.readings is not None:
        walk.origins = origins.find(jaxpr, consts, [value.name for value in values])
    outputs = walk.arrays(walk.evaluate(jaxpr, consts, list(values)))
    adapted = {value.name for value in values if value.code is None or not isinstance(value.method, Kept)}
    if must_read and (missing := sorted(adapted - walk.seen)):
        raise ValueError(
            f"the function never reads the adapted {'leaf' if len(missing) == 1 else 'leaves'} {', '.join(missing)}: take "
            'them out of the spec, or lift with unread="allow" if the function uses only part of the model (a reading whose '
            "result goes nowhere is none)"
        )
    return jax.tree.unflatten(jax.tree.structure(out_shape), outputs)
