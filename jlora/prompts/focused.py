"""Focused prefix tuning: what a prefix learned of one attribute, without what all texts of its data have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora.core.tree.adapted import Adapted


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Focus:
    """Several adapters of one kind on one base, as one argument in the place of the params; `jlora.focus` makes it.

    Attributes:
        adapted: the base, with the trained arrays and constants of all adapters along a first axis: the specific ones, then the
            general ones.
        alpha: for each attribute how much the specific prefix counts beyond the general one, `[attributes]`.
        weight: what share each attribute has of the logits, `[attributes]`.
        top_p: of which likeliest tokens of the specific prefix the next one is, as a probability that they have together.
        general: for each attribute the number of its general prefix; static.
    """

    adapted: Adapted
    alpha: jax.Array
    weight: jax.Array
    top_p: jax.Array
    general: tuple[int, ...] = field(metadata={"static": True})


def focus(
    specific: Sequence[Adapted],
    general: Sequence[Adapted],
    alpha: float | Sequence[float] = 1.5,
    weight: Sequence[float] | None = None,
    top_p: float = 0.9,
) -> Focus:
    """Adapters for `jlora.focused`: one or more attributes, each with the general adapter of its data.

    Each specific adapter was trained on the texts with its attribute, each general one on all texts of the same data. They must
    be alike (the same spec on the same base), and are usually `PrefixTuning`.

    Args:
        specific: one adapter for each attribute.
        general: one for each, or one for all.
        alpha: 1 is the specific adapter alone; above it, what the general one says is taken away; one for all or one each.
        weight: shares of the attributes, usually of sum 1; by default equal ones.
        top_p: above 0, to 1.

    Raises:
        ValueError: for adapters that are not alike, or numbers that don't fit.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> spec = {r".*/(k|v)_proj/kernel": jlora.Axes("batch in out", jlora.PrefixTuning(tokens=4))}
        >>> cheerful, every = (jlora.adapterize(params, spec, jax.random.key(n)) for n in range(2))  # once trained
        >>> apply = jlora.focused(jlora.prompted(jlora.lift(model.apply)))
        >>> logits = apply({"params": jlora.focus([cheerful], [every], alpha=2.0)}, tokens)

    Reference:
        Ma et al. 2023, arXiv:2306.00369.
    """
    count = len(specific)
    if not count or len(general) not in (1, count):
        raise ValueError(
            f"focus wants a general adapter for each of the {count} specific ones, or one for all, got {len(general)}"
        )
    given: Any = alpha
    alphas = [given] * count if jnp.ndim(given) == 0 else list(given)
    weights = [1 / count] * count if weight is None else list(weight)
    if len(alphas) != count or len(weights) != count or not 0 < top_p <= 1:
        raise ValueError(
            f"focus wants an alpha and a weight for each of {count} attributes and a top_p above 0 and at most 1, got "
            f"{alphas}, {weights} and {top_p}"
        )
    for name, number in [*(("alpha", each) for each in alphas), *(("weight", each) for each in weights)]:
        if not isinstance(number, Tracer) and not jnp.isfinite(number):
            raise ValueError(f"focus wants finite numbers, got {name} {number}")
    every = [*specific, *general]
    for each in every[1:]:
        _check_alike(every[0], each)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[(each.params, each.frozen) for each in every])
    places = tuple(count + (n if len(general) == count else 0) for n in range(count))
    numbers = (jnp.asarray(alphas, jnp.float32), jnp.asarray(weights, jnp.float32), jnp.asarray(top_p, jnp.float32))
    return Focus(every[0].replace(params=stacked[0], frozen=stacked[1]), *numbers, places)


def _check_alike(one: Adapted, other: Adapted) -> None:
    """Refuses adapters of another spec, or on another base.

    Raises:
        ValueError: saying which.
    """
    if one.plan != other.plan or jax.tree.structure(one.base) != jax.tree.structure(other.base):
        raise ValueError("the adapters of a focus must have the same leaves with the same methods, on the same base")
    pairs = zip(jax.tree.leaves(one.base), jax.tree.leaves(other.base), strict=True)
    if not all(a is b or (a.shape == b.shape and bool(jnp.all(a == b))) for a, b in pairs):
        raise ValueError("the adapters of a focus must be on the same base")


def focused(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The function that runs `apply` with each adapter of a `Focus` and puts their logits together.

    Formula: `Σ_i weight_i (alpha_i s_i - (alpha_i - 1) g_i)` with the logarithms of the probabilities that the specific and the
    general adapter give; tokens outside of the `top_p` likeliest of `s_i` are `-inf`. One pass for each adapter.

    Args:
        apply: `jlora.prompted(jlora.lift(model.apply))`, called as `apply({"params": focus}, ids, ..)`; it returns logits
            `[batch, length, vocabulary]`, or a pair of these and a cache where it was given one.

    Returns:
        A function of the same arguments with a `Focus` in the place of the `Adapted`; a cache is one for all adapters, along a
        first axis. Goes to `jlora.models.generate`.

    Raises:
        ValueError: (when called) where there is no `Focus`, or more than one.
    """

    @functools.wraps(apply, updated=())
    def run(*args: Any, cache: Any = None, **kwargs: Any) -> Any:
        is_focus = lambda node: isinstance(node, Focus)  # noqa: E731
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_focus)
        found = [leaf for leaf in leaves if is_focus(leaf)]
        if len(found) != 1:
            raise ValueError(f"a focused function wants one jlora.focus(..) among its arguments, got {len(found)}")

        def one(arrays: tuple[Any, Any], cache: Any) -> Any:
            adapted = found[0].adapted.replace(params=arrays[0], frozen=arrays[1])
            args, kwargs = jax.tree.unflatten(treedef, [adapted if is_focus(leaf) else leaf for leaf in leaves])
            return apply(*args, **kwargs) if cache is None else apply(*args, cache=cache, **kwargs)

        arrays = (found[0].adapted.params, found[0].adapted.frozen)
        # A cache that a first call made has all adapters in front; one that is empty yet is the same for all.
        shared = cache is None or getattr(cache, "keys", cache) is None
        out = jax.vmap(one, in_axes=(0, None if shared else 0))(arrays, cache)
        return combined(found[0], out) if cache is None else (combined(found[0], out[0]), out[1])

    return run


def combined(focus: Focus, logits: jax.Array) -> jax.Array:
    """The logits `[.., vocabulary]` of a `Focus` from those of its adapters, `[adapters, .., vocabulary]`."""
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    total, inside = jnp.zeros(scores.shape[1:], scores.dtype), jnp.ones(scores.shape[1:], bool)
    for n, place in enumerate(focus.general):
        alpha, weight = focus.alpha[n], focus.weight[n]
        total += weight * (alpha * scores[n] - (alpha - 1) * scores[place])
        inside &= _nucleus(scores[n], focus.top_p)
    # Tokens that no attribute excludes; where they exclude all, those of the first are better than none.
    inside = jnp.where(jnp.any(inside, axis=-1, keepdims=True), inside, _nucleus(scores[0], focus.top_p))
    return jnp.where(inside, total, -jnp.inf)


def _nucleus(scores: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which are the fewest likeliest tokens whose probabilities reach `top_p`."""
    order = jnp.argsort(-scores, axis=-1)
    ordered = jnp.take_along_axis(jnp.exp(scores), order, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    inside = (before < top_p).at[..., 0].set(True)
    return jnp.take_along_axis(inside, jnp.argsort(order, axis=-1), axis=-1)
