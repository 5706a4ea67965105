"""`observe`: statistics of what every adapted weight is multiplied with, taken while the function runs.

Each product with a weight that is observed leaves a tap (see `jlora.core.walk.taps`); at the end taps of one matrix are added.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jlora import _compat, paths
from jlora.core.products.contraction import accumulation_dtype
from jlora.core.protocol.kept import Kept
from jlora.core.protocol.method import Method, Site
from jlora.core.protocol.readings import Sites
from jlora.core.protocol.statistics import INPUTS
from jlora.core.transforms.lift import call, check_options
from jlora.core.tree.adapted import Adapted
from jlora.core.tree.adapterize import adapterize
from jlora.core.tree.spec import ALL_LINEAR, Axes
from jlora.core.walk import convolution, dot, grouping, lookup
from jlora.core.walk.interpreter import Walk
from jlora.core.walk.taps import NUMBERS, Tap, numbered
from jlora.core.walk.weight import Weight


def _same(sums: Any) -> Any:
    """Its argument: the default of `Statistic.finish`."""
    return sums


@dataclass(frozen=True)
class Statistic:
    """What is taken of a weight's input: sums, which are added over all uses of a matrix, and what is made of their total.

    Attributes:
        measure: `measure(x)` of one product's input `x [*leading, in]`, where `in` is the matrix's and the leading axes are
            the activation's own (rows, tokens); arrays of shapes that don't depend on values.
        finish: `finish(sums)`: the statistic of one matrix, from its sums over all uses.

    Example:
        >>> mean = jlora.Statistic(lambda x: (x.sum(tuple(range(x.ndim - 1))), x.size / x.shape[-1]), lambda t: t[0] / t[1])
        >>> _, seen = jlora.observe(model.apply, mean)({"params": adapted}, tokens)
    """

    measure: Callable[[jax.Array], Any]
    finish: Callable[[Any], Any] = _same


def input_squares(x: jax.Array) -> jax.Array:
    """`sum over rows of x²`, `[in]`, in float32 at least: the statistic to add over parts of a batch."""
    x = x.astype(accumulation_dtype(x.dtype))
    return jnp.sum(x * x, axis=tuple(range(x.ndim - 1)))


#: The Euclidean norm of every input feature over all rows that a matrix sees, `[in]`.
input_norms = Statistic(input_squares, jnp.sqrt)


def _products(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = accumulation_dtype(x.dtype)
    return INPUTS["covariance"].measure(x.astype(wide), jnp.ones(x.shape[:-1], wide))


#: The mean of `x xᵀ` over all rows that a matrix sees, `[in, in]`: what methods need as "covariance".
input_covariance = Statistic(_products, lambda sums: sums[0] / sums[1])


def observe(
    fn: Callable[..., Any],
    statistic: Statistic | Callable[[jax.Array], Any],
    at: Any = None,
    *,
    strict: bool = False,
    unread: str = "error",
    plan: str = "auto",
    cuts: Mapping[str, int] | None = None,
    rows: int = 1,
) -> Callable[..., Any]:
    """`lift` that also returns a statistic of the input of every adapted weight.

    Works through `jit`, `scan` (one statistic a layer of a stack), `remat` (returned from the forward pass, not recomputed)
    and meshes with automatic or explicit axes. Outputs and their gradients are those of `lift`; no gradient flows through
    what was seen. Statistics are taken of the input before dropout, of padding too.

    For a matrix that is used several times (tied, or in every pass of a loop) sums are added over its uses, and `finish` is
    applied to the total. Refused are a lookup, which has no input; the transposed use of a tied weight, whose input has another
    size; products inside `cond`, `while` and `shard_map`; and weights that go whole into other primitives.

    Args:
        fn: any JAX function; one of its arguments holds an `Adapted`, or plain params by `jlora.watch`.
        statistic: a `Statistic`, such as `jlora.input_norms`, or a function that is its `measure`.
        at: a regex that matches the paths of the weights to observe (default: every adapted matrix).
        strict, unread, plan, cuts, rows: as for `lift`.

    Returns:
        A function of the same arguments that returns `(outputs, seen)`, `seen` a nested dict along the keys of the params
        with the statistic in place of each leaf, the leaf's batch axes in front.

    Raises:
        ValueError: (when called) for a weight whose input can't be observed, with path, primitive and source line; for a
            pattern that matches no adapted leaf.
        TypeError: (when called) where no argument, or more than one, is an `Adapted`.

    Example:
        >>> outputs, seen = jlora.observe(model.apply, jlora.input_norms)({"params": adapted}, tokens)
    """
    check_options(unread, plan, rows)
    taken = statistic if isinstance(statistic, Statistic) else Statistic(statistic)

    @functools.wraps(fn, updated=())
    def observed(*args: Any, **kwargs: Any) -> Any:
        sites = _sites_at(_only_adapted(args, kwargs), at)
        walk = Walk(strict, plan, cuts or {}, rows, together=grouping.together)
        outputs, taps = tapped(fn, args, kwargs, Observer(taken.measure), sites, walk, unread == "error")
        seen: dict[str, Any] = {}
        for site in sites:
            mine = [tap for tap in taps if tap.name == site.path]
            if mine:
                paths.insert(seen, site.keys, finished(mine, site, taken.finish))
        return outputs, seen

    return observed


def watch(params: Any, patterns: Any, sites: Sites | None = None) -> Adapted:
    """Plain params with some weights marked, to `observe` a model that is not adapted.

    Args:
        params: any pytree of arrays.
        patterns: a regex that matches whole paths, `ALL_LINEAR`, several of them, or a spec, of which only patterns and axis
            roles count.
        sites: as for `adapterize`.

    Returns:
        An `Adapted` with nothing to train.

    Raises:
        TypeError, ValueError: as for `adapterize`.

    Example:
        >>> watched = jlora.watch(params, r".*/q_proj/kernel")
        >>> _, seen = jlora.observe(model.apply, jlora.input_norms)({"params": watched}, tokens)
    """
    if isinstance(patterns, str) or patterns is ALL_LINEAR:
        patterns = (patterns,)
    if not isinstance(patterns, Mapping):
        if not isinstance(patterns, Iterable):
            raise TypeError(f"patterns are a regex, jlora.ALL_LINEAR, several of them, or a spec; got {patterns!r}")
        patterns = dict.fromkeys(patterns, Kept())
    return adapterize(params, {pattern: _watching(method) for pattern, method in patterns.items()}, sites=sites)


def _watching(method: Method | Axes | None) -> Any:
    if isinstance(method, Axes):
        return replace(method, method=Kept())
    return Kept() if method is not None and method.matrix else None


@dataclass
class Observer:
    """Takes the taps while a walk goes through a function.

    Attributes:
        measure: see `Statistic`; it is called with `given` as well.
        refuses: whether a use that can't be observed is an error; else it is passed over.
        given: arrays of the call, such as a mask, which `measure` could not close over on a mesh with explicit axes.
        _tapped: the equation that was tapped last.
    """

    measure: Callable[..., Any]
    refuses: bool = True
    given: tuple[jax.Array, ...] = ()
    _tapped: Any = None

    def tap(self, walk: Walk, eqn: Any, values: list[Any], where: str) -> None:
        """Adds the statistic of a product with an observed weight to the walk's taps."""
        found = [value for value in values if isinstance(value, Weight) and NUMBERS in value.frozen]
        if not found:
            return
        weight = found[0]
        if eqn.primitive.name == "gather" and lookup.selected(eqn, weight) is not None:
            return  # matrices out of a stack, which are multiplied later
        try:
            x, shared_pieces = _input(eqn, values)
        except ValueError as error:
            if self.refuses:
                raise ValueError(f"observe: {weight.name} is used by {where}: {error}; {_ADVICE}") from None
            return
        self._tapped = eqn
        measure = functools.partial(_measured, self.measure)
        for piece in reversed(weight.batch):
            measure = jax.vmap(measure, in_axes=(0 if piece in shared_pieces else None, 0, *[None] * len(self.given)))
        numbers = weight.frozen[NUMBERS]
        try:
            measure = _replicated(measure, eqn.outvars[0].aval, x, numbers, *self.given)
            walk.taps.append(Tap(numbers, measure(x, numbers, *self.given), weight.name))
        except ValueError as error:
            raise ValueError(f"observe: {weight.name} is used by {where}: {error}; {_ADVICE}") from error

    def check_formed(self, weight: Weight, eqn: Any, where: str) -> None:
        """Refuses an observed weight that is formed for something other than the product that was just tapped."""
        if self.refuses and NUMBERS in weight.frozen and (eqn is None or eqn is not self._tapped):
            raise ValueError(f"observe: {weight.name} is taken whole by {where}, where it has no input; {_ADVICE}")


_ADVICE = "leave it out with at=... (or out of the spec that prepare got)"


def _input(eqn: Any, values: list[Any]) -> tuple[jax.Array, list[Any]]:
    """A product's activation `[*shared batch, *leading, in]`, and the batch pieces that it shares with the weight."""
    name = eqn.primitive.name
    if name == "conv_general_dilated" and not isinstance(values[0], Weight):
        return convolution.patches(eqn, values[0], values[1]), []
    if name == "gather":
        raise ValueError("a lookup multiplies nothing")
    if name != "dot_general" or all(isinstance(value, Weight) for value in values):
        raise ValueError("it has no single input")
    use = dot.use_of(eqn, *values)
    if use.side != "in":
        raise ValueError("it is transposed there" if use.side == "out" else "its axes are not contracted as a matrix's")
    x, shared_pieces, _ = dot.folded_input(use, "in")
    return x, shared_pieces


def _measured(measure: Callable[..., Any], x: jax.Array, number: jax.Array, *given: jax.Array) -> Any:
    return jax.tree.map(jnp.asarray, measure(jax.lax.stop_gradient(x), *given))


def _replicated(measure: Any, aval: Any, *args: jax.Array) -> Any:
    """The statistic whole on every device, where the product lies on a mesh with explicit axes."""

    def whole(_: Any) -> Any:
        shapes = jax.eval_shape(_compat.automatic(measure, aval, lambda _: PartitionSpec()), *args)
        return jax.tree.map(lambda _: PartitionSpec(), shapes)

    return _compat.automatic(measure, aval, whole)


def tapped(
    fn: Any, args: Any, kwargs: Any, observer: Observer, sites: tuple[Site, ...], walk: Walk, must_read: bool = True
) -> tuple[Any, list[Tap]]:
    """What `fn` returns, and the taps of some sites in program order."""
    counts = {site.path: site.batch_shape for site in sites}

    def marked(weight: Weight) -> Weight:
        return numbered(weight, counts[weight.name]) if weight.name in counts else weight

    walk.observer = observer
    outputs = call(walk, fn, args, kwargs, must_read, marked)
    return outputs, walk.taps


def finished(taps: list[Tap], site: Site, finish: Callable[[Any], Any] = _same) -> Any:
    """The taps of a leaf added up matrix by matrix, and finished, `[*batch, ...]`."""
    count = math.prod(site.batch_shape)

    def total(tap: Tap) -> Any:
        def one(x: jax.Array) -> jax.Array:
            flat = x.reshape(-1, *x.shape[tap.numbers.ndim :])
            if count == 1:
                return jnp.sum(flat, axis=0, keepdims=True)
            return jnp.zeros((count, *flat.shape[1:]), x.dtype).at[tap.numbers.reshape(-1)].add(flat)

        return jax.tree.map(one, tap.sums)

    sums = functools.reduce(functools.partial(jax.tree.map, jnp.add), map(total, taps))
    finished = jax.vmap(finish)(sums)
    return jax.tree.map(lambda x: x.reshape(*site.batch_shape, *x.shape[1:]), finished)


@dataclass(frozen=True)
class Asked:
    """What the optimizer rules of an `Adapted` want as `tx.update(..., inputs=...)`.

    Attributes:
        statistic: what is taken of the inputs.
        sites: the leaves whose rules want it.
    """

    statistic: Statistic
    sites: tuple[Site, ...]

    @property
    def at(self) -> str:
        """The pattern of the leaves, for `observe`."""
        return "|".join(re.escape(site.path) for site in self.sites)

    def finished(self, sums: Any) -> dict[str, Any]:
        """What goes into `inputs=`, from sums that were measured on the parts of a batch and added up."""
        seen: dict[str, Any] = {}
        for site in self.sites:
            finish = self.statistic.finish
            for _ in site.batch_axes:
                finish = jax.vmap(finish)
            paths.insert(seen, site.keys, finish(paths.lookup(sums, site.keys)))
        return seen


def asked_by(adapted: Adapted) -> Asked | None:
    """What the methods' optimizer rules want to see of the inputs; None where they want nothing.

    Raises:
        ValueError: for rules that want different statistics.
    """
    wanted = {site: getattr(site.method.optimizer_rule, "statistic", None) for site in adapted.plan.sites}
    found = {site: statistic for site, statistic in wanted.items() if statistic is not None}
    if len(set(found.values())) > 1:
        raise ValueError(f"the optimizer rules of {', '.join(site.path for site in found)} want different statistics")
    return Asked(next(iter(found.values())), tuple(found)) if found else None


def _only_adapted(args: Any, kwargs: Any) -> Adapted:
    found = jax.tree.leaves((args, kwargs), is_leaf=lambda x: isinstance(x, Adapted))
    adapted = [leaf for leaf in found if isinstance(leaf, Adapted)]
    if len(adapted) != 1:
        raise TypeError(
            f"observe needs one Adapted among the arguments, got {len(adapted)}; plain params become one by "
            "jlora.watch(params, patterns)"
        )
    return adapted[0]


def _sites_at(adapted: Adapted, at: Any) -> tuple[Site, ...]:
    matrices = [site for site in adapted.plan.sites if site.method.matrix]
    found = tuple(site for site in matrices if at is None or re.fullmatch(at, site.path))
    if not found:
        known = [site.path for site in matrices]
        raise ValueError(f"observe: at={at!r} matches no adapted matrix; there are {', '.join(known) or 'none'}")
    return found
