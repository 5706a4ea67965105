"""What an optimizer does with all trained arrays together: found in its program, and refused where it gets a part of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
import optax.contrib

from jlora import _compat, paths
from jlora.core.tree.adapted import Adapted

_NONE: frozenset[int] = frozenset()
_ALL = "from all trained arrays together"
# States of optimizers that are nothing on a part of the arrays, since what they do with all of them is what they are.
_ONE = {
    optax.contrib.ProdigyState: f"Prodigy estimates its rate {_ALL}",
    optax.contrib.DAdaptAdamWState: f"D-Adaptation estimates its rate {_ALL}",
    optax.contrib.ScheduleFreeState: "optax.contrib.schedule_free_eval_params reads one state for all trained arrays",
    optax.ScaleByLBFGSState: f"L-BFGS chooses its step {_ALL}",
    optax.ScaleByZoomLinesearchState: f"a line search chooses its step {_ALL}",
    optax.ScaleByBacktrackingLinesearchState: f"a line search chooses its step {_ALL}",
}


def check_trained(tree: Any) -> None:
    """Refuses the whole `Adapted` where its trained arrays, or their gradients, belong.

    Raises:
        TypeError: saying what to write.
    """
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Adapted))
    if any(isinstance(node, Adapted) for node in found):
        raise TypeError(
            "the optimizer got a whole jlora.Adapted, base and all, where its trained arrays belong: call "
            "tx.init(adapted.params) and tx.update(grads, state, adapted.params), with grads = "
            "jax.grad(lambda p: loss(adapted.replace(params=p)))(adapted.params)"
        )


def coupled(tx: optax.GradientTransformation, params: Any) -> bool:
    """Whether an update, or a state, depends on the gradients of several arrays, as by clipping to a global norm.

    Seen in the optimizer's program on some of the arrays, which is traced and not run, or known of a state in `_ONE`.
    """
    shapes = _few(params)
    state = jax.eval_shape(tx.init, shapes)
    if _of_one(state):
        return True
    try:
        program = jax.make_jaxpr(tx.update)(shapes, state, shapes)
    except (TypeError, ValueError):  # it asks for more than gradients: the loss, or a function of all arrays
        return True
    jaxpr, _ = _compat.open_jaxpr(program)
    gradients = len(jax.tree.leaves(shapes))
    given = [frozenset([n]) if n < gradients else _NONE for n in range(len(jaxpr.invars))]
    return any(len(sources) > 1 for sources in _sources(jaxpr, given))


def _few(params: Any) -> Any:
    """The shapes of two arrays of each kind, and in place of the others what `optax.partition` puts there.

    A model of hundreds of unstacked layers would take seconds to trace.
    """
    seen: dict[Any, int] = {}

    def one(leaf: Any) -> Any:
        kind = (leaf.shape, leaf.dtype)
        seen[kind] = seen.get(kind, 0) + 1
        return jax.ShapeDtypeStruct(*kind) if seen[kind] <= 2 else optax.MaskedNode()

    return jax.tree.map(one, params)


def _sources(jaxpr: Any, given: list[frozenset[int]]) -> list[frozenset[int]]:
    """The gradients that each result of a program depends on, from those that its inputs do."""
    known = dict(zip(jaxpr.invars, given, strict=True))

    def of(atom: Any) -> frozenset[int]:
        return _NONE if hasattr(atom, "val") else known.get(atom, _NONE)

    for eqn in jaxpr.eqns:
        inside = [of(atom) for atom in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):
            found = _sources(_compat.open_jaxpr(eqn.params["jaxpr"])[0], inside)
        else:  # a loop or branch counts as mixing all that goes in: at worst, arrays share a step count
            found = [_NONE.union(*inside)] * len(eqn.outvars)
        known |= zip(eqn.outvars, found, strict=True)
    return [of(atom) for atom in jaxpr.outvars]


def check_several(made: Mapping[Any, optax.GradientTransformation], params: Any) -> None:
    """Refuses several optimizers of a kind that works on all arrays alone.

    Raises:
        ValueError: naming the kind and the groups.
    """
    for tx in made.values():
        if why := _of_one(jax.eval_shape(tx.init, _few(params))):
            raise ValueError(
                f"{why}, but these groups of them learn at other rates, or decay otherwise: {'; '.join(sorted(made))}; leave "
                "ratio, embedding_learning_rate and weight_decay out"
            )


def _of_one(state: Any) -> str | None:
    """Why a state is one for all arrays, or None."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: type(node) in _ONE)
    return next((_ONE[type(node)] for node in nodes if type(node) in _ONE), None)


def in_dicts(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer for params in any container: it gets nested dicts, and its updates come in the container again."""
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return inner.init(_dicts(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        given = _dicts(updates)
        new, state = inner.update(given, state, None if params is None else _dicts(params), **extra)
        if given is updates:
            return new, state
        leaves, treedef = paths.flatten_with_keys(updates)
        found = dict(paths.flatten_with_keys(new)[0])
        return jax.tree.unflatten(treedef, [found[keys] for keys, _ in leaves]), state

    return optax.GradientTransformationExtraArgs(init, update)


def _dicts(tree: Any) -> Any:
    """A tree as nested dicts; the very same where it is that already, or has no leaves."""
    check_trained(tree)
    if not _foreign(jax.tree.structure(tree)) or not jax.tree.leaves(tree):
        return tree
    found: dict[str, Any] = {}
    for keys, leaf in paths.flatten_with_keys(tree)[0]:
        paths.insert(found, keys, leaf)
    return found


def _foreign(treedef: Any) -> bool:
    """Whether a tree has other nodes than dicts and optax's mark for what is left out."""
    kind = treedef.node_data()
    if kind is None:  # a leaf, or None
        return False
    return kind[0] not in (dict, optax.MaskedNode) or any(map(_foreign, treedef.children()))
