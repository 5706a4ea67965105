"""`each_run`: a function of one run's adapters, for all runs of a stack in one pass over their base."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.core.tree.adapted import Adapted
from jlora.core.tree.stacked import Stacked


def each_run(fn: Callable[..., Any], in_axes: int | Sequence[int | None] | None = 0) -> Callable[..., Any]:
    """The function that does for all runs of a stack what `fn` does for one: `jax.vmap` with the base held once.

    `fn` gets an `Adapted` wherever the new function gets a `Stacked`, and of all other arguments the run's own part. So what
    it does with one run, such as clipping to a global norm or giving out ranks, it does with each run by itself. Products
    with the base are one for all runs; `lift` chooses their plan for that.

    Args:
        fn: of positional arguments.
        in_axes: for each argument the axis of runs, or None for one that all runs have in common, such as a batch; an integer
            or None for all. What a `Stacked` has is known, and all else in an argument with one has the axis given.

    Returns:
        A function whose results have the axis of runs in front; an `Adapted` among them becomes a `Stacked`. Call it under
        `jax.jit`.

    Raises:
        TypeError: (when called) without a `Stacked` among the arguments.
        ValueError: (when called) for stacks of different numbers of runs or other in_axes than arguments; where `fn` changes
            the base by run, which all runs share.

    Example:
        >>> loss = lambda adapted, tokens: jnp.mean(jlora.lift(model.apply)({"params": adapted}, tokens) ** 2)
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> spec = {r".*/q_proj/kernel": jlora.LoRA(rank=2)}
        >>> stacked = jlora.stack([jlora.adapterize(params, spec, key=key) for key in keys])
        >>> jax.jit(jlora.each_run(loss, in_axes=(0, None)))(stacked, tokens).shape
        (4,)
    """

    @functools.wraps(fn, updated=())
    def mapped(*args: Any) -> Any:
        axes = tuple(in_axes) if isinstance(in_axes, Sequence) else (in_axes,) * len(args)
        if len(axes) != len(args):
            raise ValueError(f"each_run got in_axes for {len(axes)} arguments, and {len(args)} arguments")
        leaves, treedef = jax.tree.flatten(args, is_leaf=_is_stacked)
        axis_of = [axis for axis, arg in zip(axes, args) for _ in jax.tree.leaves(arg, is_leaf=_is_stacked)]
        stacks = [leaf for leaf in leaves if _is_stacked(leaf)]
        _check_stacks(stacks)
        owns, whole = [], []
        for leaf, axis in zip(leaves, axis_of, strict=True):
            own, once = _taken(leaf) if _is_stacked(leaf) else ((None, leaf) if axis is None else (leaf, None))
            owns.append(own)
            whole.append(once)
        made: list[Any] = []

        def one(owns: list[Any]) -> tuple[list[Any], list[Any]]:
            given = [_put(*each) if _is_stacked(each[0]) else _either(*each[1:]) for each in zip(leaves, owns, whole)]
            results, structure = jax.tree.flatten(fn(*jax.tree.unflatten(treedef, given)), is_leaf=_is_adapted)
            split = [_apart(result, stacks) for result in results]
            made[:] = [structure, [back for _, _, back in split]]
            return [own for own, _, _ in split], [once for _, once, _ in split]

        in_axes_of = [0 if axis is None or _is_stacked(leaf) else axis for leaf, axis in zip(leaves, axis_of)]
        try:
            own, once = jax.vmap(one, in_axes=(in_axes_of,), out_axes=(0, None), axis_size=len(stacks[0]))(owns)
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            # What JAX refuses is the part without an axis of runs, and only a base can have one.
            raise ValueError("each_run's function changes the base by run, which all runs share") from error
        structure, backs = made
        return jax.tree.unflatten(structure, [back(*each) for back, *each in zip(backs, own, once, strict=True)])

    return mapped


def hold(stopped: jax.Array | bool, new: Any, old: Any) -> Any:
    """`old` where a run is stopped, bit for bit, else `new`: what keeps a run as it is while others go on.

    Args:
        stopped: whether this run is stopped, a scalar; inside of `each_run` each run's own.
        new: a tree, such as `(adapted, opt_state)`, as a step would leave it.
        old: the same as the step found it. What is the same object in both, such as a base, is left alone.

    Raises:
        ValueError: for trees of different form.

    Example:
        >>> jlora.hold(True, {"a": jnp.ones(2)}, {"a": jnp.zeros(2)})["a"].tolist()
        [0.0, 0.0]
    """
    return jax.tree.map(lambda new, old: old if new is old else jnp.where(stopped, old, new), new, old)


def _is_stacked(node: Any) -> bool:
    return isinstance(node, Stacked)


def _is_adapted(node: Any) -> bool:
    return isinstance(node, Adapted)


def _check_stacks(stacks: list[Stacked]) -> None:
    if not stacks:
        raise TypeError("each_run needs a jlora.Stacked among its arguments, from jlora.stack([...])")
    if len({len(each) for each in stacks}) > 1:
        raise ValueError(f"each_run got stacks of {' and '.join(str(len(each)) for each in stacks)} runs")


def _either(own: Any, once: Any) -> Any:
    return own if once is None else once


def _taken(stacked: Stacked) -> tuple[Any, Any]:
    """What each run of a stack has by itself, and the constants that all have alike."""
    own, alike = _drawers(stacked.frozen, stacked.alike)
    return (stacked.params, own, stacked.context), alike


def _drawers(frozen: Any, alike: Any) -> tuple[dict[tuple[str, ...], Any], dict[tuple[str, ...], Any]]:
    found = dict(paths.flatten_with_keys(frozen)[0])
    return {k: v for k, v in found.items() if k not in alike}, {k: v for k, v in found.items() if k in alike}


def _put(stacked: Stacked, own: Any, alike: Any) -> Adapted:
    """One run of a stack as an `Adapted`."""
    params, mine, context = own
    return Adapted(stacked.base, params, paths.nested((mine | alike).items()), context, stacked.joint)


def _apart(result: Any, stacks: list[Stacked]) -> tuple[Any, Any, Callable[[Any, Any], Any]]:
    """A result's part with an axis of runs, that without, and what puts them together again."""
    if not _is_adapted(result):
        return result, None, lambda own, once: own
    stacked = next((each for each in stacks if each.joint == result.plan), None)
    if stacked is None:
        raise ValueError("each_run's function returns an Adapted of other leaves or methods than those of its stack")
    kept = dict(_drawers(stacked.frozen, stacked.alike)[1])
    frozen = dict(paths.flatten_with_keys(result.frozen)[0])
    alike = frozenset(keys for keys, leaf in frozen.items() if kept.get(keys) is leaf)
    mine = {keys: leaf for keys, leaf in frozen.items() if keys not in alike}
    base, before = jax.tree.leaves(result.base), jax.tree.leaves(stacked.base)
    same = len(base) == len(before) and all(one is other for one, other in zip(base, before))

    def together(own: Any, once: Any) -> Stacked:
        params, mine, context = own
        whole = paths.nested((mine | {keys: kept[keys] for keys in alike}).items())
        return Stacked(stacked.base if same else once, params, whole, context, stacked.joint, stacked.runs, alike)

    return (result.params, mine, result.context), None if same else result.base, together
