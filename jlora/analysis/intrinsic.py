"""Intrinsic dimensions of a model's hidden states, and the ranks that GeLoRA derives from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.core.protocol.layers import layer_numbers, numbered
from jlora.core.protocol.method import Site
from jlora.core.protocol.readings import Leaf, Sites
from jlora.core.transforms.observe import Observer, finished, tapped, watch
from jlora.core.transforms.sites import sites as trace
from jlora.core.tree.adapted import Adapted
from jlora.core.tree.spec import Axes
from jlora.core.walk.interpreter import Walk
from jlora.methods.gelora import GeLoRA

# Rows of the distance matrix that are in memory at a time.
_ROWS = 512
_AFTER = "what comes after the last layer"


def intrinsic_dimension(points: Any, trim: float = 0.1) -> float:
    """The dimension of the set that points lie on, by TwoNN, whatever the number of coordinates.

    For each point `mu` is the distance to its second nearest other point by that to its nearest. Of N such ratios in rising
    order the i-th should satisfy `-log(1 - i / N) = d log(mu)`, with `d` the dimension. So `d` is fitted as the slope of a line
    through the origin, by least squares, without the largest ratios. It does not change when points are moved, turned or
    scaled, and falls below the truth where dimensions are many and points few.

    Args:
        points: `[count, coordinates]`; a point that comes twice counts once.
        trim: share of the largest ratios to leave out.

    Returns:
        The dimension; 0 where fewer than three different points are left.

    Raises:
        ValueError: for another shape, values that are not finite, or a share out of range.

    Reference:
        Facco et al. 2017, doi:10.1038/s41598-017-11873-y.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError(f"intrinsic_dimension needs finite points [count, coordinates], got shape {points.shape}")
    if not 0 <= trim < 1:
        raise ValueError(f"trim must be at least 0 and below 1, got {trim!r}")
    points = np.unique(points, axis=0)
    if len(points) < 3:
        return 0.0
    nearest, second = _two_nearest(points)
    known = nearest > 0
    ratios = np.sort(np.log(second[known] / nearest[known]))
    share = np.arange(1, len(ratios) + 1) / len(ratios)
    kept = min(max(1, int((1 - trim) * len(ratios))), len(ratios) - 1)  # the last has an infinite logarithm
    x, y = ratios[:kept], -np.log1p(-share[:kept])
    return float(x @ y / (x @ x)) if x @ x > 0 else 0.0


def _two_nearest(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distances to the nearest and the second nearest other point, a few rows of the distance matrix at a time."""
    centred = points - points.mean(0)
    squares = (centred**2).sum(1)
    found = []
    for start in range(0, len(points), _ROWS):
        rows = slice(start, start + _ROWS)
        distances = squares[rows, None] + squares[None] - 2 * centred[rows] @ centred.T
        distances[np.arange(len(distances)), np.arange(start, start + len(distances))] = np.inf
        order = np.argpartition(distances, 1, axis=1)[:, :2]
        # Computed again from the differences: for close points the sum above is mostly rounding error.
        exact = np.linalg.norm(centred[rows, None] - centred[order], axis=2)
        found.append(np.sort(exact, axis=1))
    nearest, second = np.concatenate(found).T
    return nearest, second


def intrinsic_dimensions(
    fn: Callable[[Any, Any], Any],
    params: Any,
    patterns: Any,
    batches: Iterable[Any],
    sites: Sites | None = None,
    *,
    pooling: str | Callable[[jax.Array, Any], jax.Array] = "mean",
    count: int = 2000,
    trim: float = 0.1,
) -> np.ndarray:
    """The intrinsic dimension of what goes into each layer, and of what comes out of the last: `[layers + 1]`.

    A layer's points are the inputs of the first weight of it that `patterns` name, in the function's order, as that weight
    gets them (after a normalisation, where there is one before it). Those after the last layer are the inputs of the
    function's head, or the function's output where there is no head. Layers are counted as for `jlora.GeLoRA`.

    Args:
        fn: `fn(params, batch)`, such as a loss function on ordinary params.
        params: the pretrained params.
        patterns: as for `jlora.watch`; of a spec that has GeLoRA, only the entries with it count.
        batches: data of the task, each of the same shape; as many as give `count` points are used.
        sites: how `fn` reads its weights; traced anew by default.
        pooling: "mean": each row (first axis) is a point, the mean over its tokens, padding included; "first" or "last": that
            token of each row; "tokens": every token is a point; or a function of (`x [*leading, in]`, `batch`) that gives
            points `[count, in]`. The paper does not say which.
        count: how many points.
        trim: as for `jlora.intrinsic_dimension`.

    Raises:
        ValueError: for an unknown pooling, no batch, a weight that is used several times, or a function without a weight after
            the last layer and without an output of features.

    Example:
        >>> loss_fn = lambda params, tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)
        >>> dimensions = jlora.intrinsic_dimensions(loss_fn, params, r".*/q_proj/kernel", [tokens])
        >>> ranks = jlora.gelora_ranks(dimensions, budget=2)
    """
    pool = _pooling(pooling)
    data = iter(batches)
    batch = next(data, None)
    if batch is None:
        raise ValueError("intrinsic_dimensions got no batch")
    report = trace(fn, params, batch) if sites is None else sites
    inner = watch(params, _of_gelora(patterns), report)
    head = _head(report, params, inner)
    watched = inner if head is None else watch(params, {**_named(inner), **head}, report)
    places = _places(fn, watched, inner.plan.sites, batch)
    needed = {site.keys for site, _ in places}
    last = None if head is None else next(site for site in watched.plan.sites if site.path not in _paths(inner))
    chosen = tuple(site for site in watched.plan.sites if site.keys in needed or site == last)

    @jax.jit
    def points(watched: Adapted, batch: Any) -> tuple[dict[str, Any], Any]:
        observer = Observer(lambda x: (_points(pool, batch, x), jnp.ones(())), refuses=False)
        outputs, taps = tapped(fn, (watched, batch), {}, observer, chosen, Walk(), must_read=False)
        seen = {site.path: finished([t for t in taps if t.name == site.path], site) for site in chosen}
        return seen, _output(outputs, pool, batch) if last is None else seen[last.path]

    states: list[list[np.ndarray]] = [[] for _ in range(len(places) + 1)]
    while batch is not None and sum(map(len, states[-1])) < count:
        seen, after = jax.device_get(points(watched, batch))
        before = [_single(seen[site.path], index, site) for site, index in places]
        for state, found in zip(states, [*before, after if last is None else _single(after, (), last)]):
            state.append(found)
        batch = next(data, None)
    return np.array([intrinsic_dimension(np.concatenate(state)[:count], trim) for state in states])


def _pooling(pooling: str | Callable[[jax.Array, Any], jax.Array]) -> Callable[[jax.Array, Any], jax.Array]:
    known: dict[str, Callable[[jax.Array, Any], jax.Array]] = {
        "mean": lambda x, batch: jnp.mean(x, axis=tuple(range(1, x.ndim - 1))),
        "first": lambda x, batch: x.reshape(x.shape[0], -1, x.shape[-1])[:, 0],
        "last": lambda x, batch: x.reshape(x.shape[0], -1, x.shape[-1])[:, -1],
        "tokens": lambda x, batch: x.reshape(-1, x.shape[-1]),
    }
    if not isinstance(pooling, str):
        return pooling
    if pooling not in known:
        raise ValueError(f"pooling must be one of {tuple(known)} or a function of (x, batch), got {pooling!r}")
    return known[pooling]


def _points(pool: Callable[[jax.Array, Any], jax.Array], batch: Any, x: jax.Array) -> jax.Array:
    return pool(x.astype(jnp.float32), batch)


def _single(seen: tuple[np.ndarray, np.ndarray], index: Any, site: Site) -> np.ndarray:
    """The points of one matrix.

    Raises:
        ValueError: where several uses of it were added up.
    """
    points, uses = seen
    if (count := int(uses[index])) != 1:
        raise ValueError(
            f"{site.path} is used {count} times in one pass, and what goes into the uses can't be told apart: give a function "
            "that uses it once, such as one of two towers"
        )
    return points[index]


def _of_gelora(patterns: Any) -> Any:
    """The patterns; of a spec that has GeLoRA, only the entries with it."""
    if not isinstance(patterns, Mapping) or not any(map(_is_gelora, patterns.values())):
        return patterns
    return {pattern: method if _is_gelora(method) else None for pattern, method in patterns.items()}


def _is_gelora(method: Any) -> bool:
    inside = [getattr(method, name, None) for name in ("method", "inner")]
    return isinstance(method, GeLoRA) or any(each is not None and _is_gelora(each) for each in inside)


def _paths(adapted: Adapted) -> list[str]:
    return [site.path for site in adapted.plan.sites]


def _named(adapted: Adapted) -> dict[str, Any]:
    """A spec that names exactly the leaves that are watched."""
    return {re.escape(site.path): site.method for site in adapted.plan.sites}


def _head(report: Sites, params: Any, inner: Adapted) -> dict[str, Any] | None:
    """A spec of the function's head with its axes' roles in the product; None if it belongs to a layer, or there is none."""
    leaves = report.aligned(dict(paths.flatten_with_keys(params)[0]))
    inside = {numbered(site.keys) for site in inner.plan.sites} - {None}
    for keys, leaf in leaves.items():
        own = "/".join(keys) in _paths(inner) or numbered(keys) in inside
        if leaf.head and not own and (roles := _product_roles(leaf)) is not None:
            return {re.escape("/".join(keys)): Axes(roles, next(iter(inner.plan.sites)).method)}
    return None


def _product_roles(leaf: Leaf) -> str | None:
    """A head's roles in its product, which for one that is tied to an embedding are not those of the lookup.

    None for a leaf that is stacked, and so is a part of layers.
    """
    for reading in leaf.readings:
        if reading.primitive == "dot_general" and reading.in_axes and not reading.batch_axes:
            names = {"in": reading.in_axes, "out": reading.out_axes}
            words = {axis: name for name, axes in names.items() for axis in axes}
            return " ".join(words[axis] for axis in range(len(leaf.shape)))
    return None


def _places(fn: Any, watched: Adapted, inner: tuple[Site, ...], batch: Any) -> list[tuple[Site, Any]]:
    """For every layer its first weight in the function's order, and the index of its matrix."""
    order: list[str] = []

    def run(watched: Adapted, batch: Any) -> tuple[()]:
        observer = Observer(lambda x: jnp.zeros(()), refuses=False)
        taps = tapped(fn, (watched, batch), {}, observer, inner, Walk(), must_read=False)[1]
        order.extend(dict.fromkeys(tap.name for tap in taps))
        return ()

    jax.eval_shape(run, watched, batch)
    numbers, layers = layer_numbers(inner)
    found = []
    for layer in range(layers):
        places = [(site, np.argwhere(np.atleast_1d(number) == layer)) for site, number in zip(inner, numbers)]
        inside = [(site, at[0]) for site, at in places if len(at) and site.path in order]
        if not inside:
            raise ValueError(
                f"layer {layer} of {inner[0].path} and the like has no weight that multiplies an activation"
            )
        site, at = min(inside, key=lambda each: order.index(each[0].path))
        found.append((site, tuple(at) if site.batch_shape else ()))
    return found


def _output(outputs: Any, pool: Callable[[jax.Array, Any], jax.Array], batch: Any) -> jax.Array:
    """The function's output as points.

    Raises:
        ValueError: where it is no single array of features.
    """
    if not hasattr(outputs, "ndim") or outputs.ndim < 2 or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(
            f"{_AFTER} is not to be seen: the function has no weight after it, and its output is no array of features; give "
            "a function that ends in a head, or that returns the last hidden states"
        )
    return _points(pool, batch, outputs)
