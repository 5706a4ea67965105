"""Higher-order primitives: `jit`, `remat`, `scan`, `while`, `cond` and `shard_map` are entered with their weights.

`custom_jvp_call`, `custom_vjp_call` and kernels have no rule on purpose. Entering them would drop the derivative that
their author wrote, so they get the effective weight as a plain array, and its gradient flows on to the factors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from jlora import _compat
from jlora import weight as weights
from jlora.walk import Walk, rule
from jlora.weight import Weight


@rule("jit", "pjit", "closed_call", "core_call")
def jit(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Runs the body in place; shardings that the user asked of the `jit` become constraints."""
    jaxpr, consts = _compat.open_jaxpr(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
    constrained = [_constrain(x, s) for x, s in zip(values, eqn.params.get("in_shardings", [None] * len(values)))]
    outputs = walk.evaluate(jaxpr, consts, constrained)
    return [_constrain(x, s) for x, s in zip(outputs, eqn.params.get("out_shardings", [None] * len(outputs)))]


def _constrain(value: Any, sharding: Any) -> Any:
    if sharding is None or _compat.is_unspecified(sharding):
        return value
    if isinstance(value, Weight):
        return replace(value, array=jax.lax.with_sharding_constraint(value.array, sharding))
    return jax.lax.with_sharding_constraint(value, sharding)


@rule("remat2", "checkpoint", "remat")
def remat(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Checkpoints the walk over the body, so that the adapters' intermediate values are recomputed too."""
    jaxpr, consts = _compat.open_jaxpr(eqn.params["jaxpr"])

    def body(*values: Any) -> tuple[list[Any], list[Any]]:
        return walk.aside(lambda: walk.arrays(walk.evaluate(jaxpr, consts, list(values))))

    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    outputs, taps = jax.checkpoint(body, **options)(*values)
    walk.taps += taps
    return outputs


@rule("scan")
def scan(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """Scans over stacked weights by slicing the method's arrays along with the base's; carried weights are formed."""
    jaxpr, consts = _compat.open_jaxpr(eqn.params["jaxpr"])
    num_consts, num_carry = _compat.scan_counts(eqn.params)
    fixed, init, xs = values[:num_consts], values[num_consts : num_consts + num_carry], values[num_consts + num_carry :]
    init = walk.arrays(list(init), eqn)
    length = eqn.params["length"]
    fixed, fixed_keys = _take_keys(walk, list(fixed), length)
    xs, xs_keys = _take_keys(walk, list(xs), length)
    xs, joins = zip(*[_scanned(walk, value, eqn) for value in xs]) if xs else ((), ())

    def body(carry: list[Any], slices: Any) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        sliced, key_pair = slices
        sliced = [join(value) for join, value in zip(joins, sliced)]
        inner = _give_keys(fixed, key_pair[0]) + list(carry) + _give_keys(sliced, key_pair[1])
        outputs, taps = walk.aside(lambda: walk.arrays(walk.evaluate(jaxpr, consts, inner)))
        return outputs[:num_carry], (outputs[num_carry:], taps)

    carry, (ys, taps) = jax.lax.scan(
        body,
        init,
        (list(xs), (fixed_keys, xs_keys)),
        length=length,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    walk.taps += taps
    return [*carry, *ys]


def _scanned(walk: Walk, value: Any, eqn: Any) -> tuple[Any, Any]:
    """What is scanned for one input, and how its slice becomes a weight again."""
    if isinstance(value, Weight):
        unstacked = weights.unstack(value)
        if unstacked is not None:
            return unstacked
    return walk.materialise(value, eqn), lambda sliced: sliced


def _take_keys(walk: Walk, values: list[Any], length: int) -> tuple[list[Any], list[Any]]:
    """Takes the dropout keys out of weights and gives every step of a loop one of its own."""
    keys = [value.key if isinstance(value, Weight) else None for value in values]
    bare = [replace(value, key=None) if isinstance(value, Weight) else value for value in values]
    fresh = [walk.next_key(key) for key in keys]
    return bare, [None if key is None else jax.random.split(key, length) for key in fresh]


def _give_keys(values: list[Any], keys: list[Any]) -> list[Any]:
    return [value if key is None else replace(value, key=key) for value, key in zip(values, keys, strict=True)]


@rule("while")
def while_loop(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Weights may be constants of the loop; carried weights are formed. Dropout keys change with the step."""
    test, test_consts = _compat.open_jaxpr(eqn.params["cond_jaxpr"])
    body, body_consts = _compat.open_jaxpr(eqn.params["body_jaxpr"])
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test_fixed, body_fixed, init = values[:n], values[n : n + m], values[n + m :]

    def again(state: Any) -> Any:
        inner = [*_at_step(test_fixed, state[0]), *state[1]]
        return walk.sealed(eqn, lambda: walk.evaluate(test, test_consts, inner))[0]

    def advance(state: Any) -> Any:
        step, carry = state
        inner = [*_at_step(body_fixed, step), *carry]
        return step + 1, walk.sealed(eqn, lambda: walk.arrays(walk.evaluate(body, body_consts, inner), eqn))

    start = jax.numpy.zeros((), jax.numpy.int32)
    return list(jax.lax.while_loop(again, advance, (start, walk.arrays(list(init), eqn)))[1])


def _at_step(values: tuple[Any, ...], step: jax.Array) -> list[Any]:
    return [
        replace(value, key=jax.random.fold_in(value.key, step))
        if isinstance(value, Weight) and value.key is not None
        else value
        for value in values
    ]


@rule("cond")
def cond(walk: Walk, eqn: Any, index: Any, *values: Any) -> list[Any]:
    """Enters every branch with the weights."""

    def branch(closed: Any) -> Any:
        jaxpr, consts = _compat.open_jaxpr(closed)
        return lambda *values: walk.sealed(eqn, lambda: walk.arrays(walk.evaluate(jaxpr, consts, list(values))))

    return jax.lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], *values)


@rule("custom_jvp_call", "custom_vjp_call")
def custom_derivative(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """Entered only to find out roles, where no derivative is taken (see the top of this file)."""
    if walk.readings is None:
        return None
    jaxpr, consts = _compat.open_jaxpr(eqn.params["call_jaxpr"])
    return walk.evaluate(jaxpr, consts, list(values))


@rule("shard_map")
def shard_map(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """Enters with weights whose method may be cut as the weight is; the others are formed outside, where they are whole."""
    jaxpr, consts = _compat.open_jaxpr(eqn.params["jaxpr"])
    specs = list(eqn.params["in_specs"])
    entered = [_sharded(walk, value, spec, eqn) for value, spec in zip(values, specs, strict=True)]

    def body(*values: Any) -> list[Any]:
        inside = [weights.localised(value) if isinstance(value, Weight) else value for value in values]
        return walk.sealed(eqn, lambda: walk.arrays(walk.evaluate(jaxpr, consts, inside)))

    outputs = jax.shard_map(
        body,
        mesh=eqn.params["mesh"],
        in_specs=tuple(spec for _, spec in entered),
        out_specs=list(eqn.params["out_specs"]),
        axis_names=_manual_axes(eqn),
        check_vma=eqn.params["check_vma"],
    )(*[value for value, _ in entered])
    return list(outputs)


def _manual_axes(eqn: Any) -> Any:
    return set(eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", ())))


def _sharded(walk: Walk, value: Any, spec: Any, eqn: Any) -> tuple[Any, Any]:
    """A value on its way into `shard_map` and its partition specs: one for an array, a tree of them for a weight."""
    specs = weights.partition_specs(value, spec) if isinstance(value, Weight) and value.key is None else None
    return (walk.materialise(value, eqn), spec) if specs is None else (value, specs)
