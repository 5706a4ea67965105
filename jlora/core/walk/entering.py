"""Higher-order primitives: `jit`, `remat`, `scan`, `while`, `cond` and `shard_map` are entered with their weights.

`custom_jvp_call`, `custom_vjp_call` and kernels are not entered by a lift, on purpose: that would drop the derivative that
their author wrote. They get the effective weight as a plain array, and its gradient flows on to the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora.core.walk import bodies, collectives
from jlora.core.walk import weight as weights
from jlora.core.walk.interpreter import Walk, rule
from jlora.core.walk.weight import Several, Weight


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
        return value.moved(lambda array: jax.lax.with_sharding_constraint(array, sharding))
    return jax.lax.with_sharding_constraint(value, sharding)


@rule("remat2", "checkpoint", "remat")
def remat(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Checkpoints the walk over the body, so that the adapters' intermediate values are recomputed too.

    Weights that the body returns, also cast or transposed, leave it as weights.
    """
    jaxpr, consts = _compat.open_jaxpr(eqn.params["jaxpr"])

    def body(*values: Any) -> tuple[list[Any], list[Any]]:
        return walk.aside(lambda: walk.evaluate(jaxpr, consts, list(values)))

    if walk.readings is not None:  # nothing is differentiated
        return walk.evaluate(jaxpr, consts, list(values))
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    outputs, taps = jax.checkpoint(body, **options)(*values)
    walk.taps += taps
    return outputs


def _passed(values: tuple[Any, ...], sources: bodies.Sources) -> dict[int, Weight]:
    """The outputs of an equation that are weights which its body only passes on."""
    return {n: values[i] for n, i in enumerate(sources) if i is not None and isinstance(values[i], Weight)}


def _with_passed(computed: list[Any], passed: dict[int, Weight]) -> list[Any]:
    """All outputs of an equation, from the computed ones and those that were passed on."""
    rest = iter(computed)
    return [passed[n] if n in passed else next(rest) for n in range(len(computed) + len(passed))]


def _computed(outputs: list[Any], passed: dict[int, Weight]) -> list[Any]:
    return [output for n, output in enumerate(outputs) if n not in passed]


@rule("scan")
def scan(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """Scans over stacked weights by slicing the method's arrays along with the base's.

    A carried weight that stays what it is becomes a constant of the loop; one that changes is formed.
    """
    jaxpr, consts = _compat.open_jaxpr(eqn.params["jaxpr"])
    num_consts, num_carry = _compat.scan_counts(eqn.params)
    passed = _passed(values, bodies.scan_passed(eqn))
    staying = [n for n in passed if n < num_carry]
    init = walk.arrays(_computed(list(values[num_consts : num_consts + num_carry]), passed), eqn)
    length = eqn.params["length"]
    fixed, fixed_keys = _take_keys(walk, [*values[:num_consts], *(passed[n] for n in staying)], length)
    xs, xs_keys = _take_keys(walk, list(values[num_consts + num_carry :]), length)
    xs, joins = zip(*[_scanned(walk, value, eqn) for value in xs]) if xs else ((), ())

    def body(carry: list[Any], slices: Any) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        sliced, key_pair = slices
        known = _give_keys(fixed, key_pair[0])
        carried = _with_passed(carry, dict(zip(staying, known[num_consts:])))
        sliced = [join(value) for join, value in zip(joins, sliced)]
        inner = [*known[:num_consts], *carried, *_give_keys(sliced, key_pair[1])]
        outputs, taps = walk.aside(lambda: walk.arrays(_computed(walk.evaluate(jaxpr, consts, inner), passed)))
        return outputs[: len(init)], (outputs[len(init) :], taps)

    scanned = (list(xs), (fixed_keys, xs_keys))
    carry, (ys, taps) = jax.lax.scan(
        body,
        init,
        scanned,
        length=None if jax.tree.leaves(scanned) else length,  # a symbolic length can't be stated, only inferred
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    walk.taps += taps
    return _with_passed([*carry, *ys], passed)


def _scanned(walk: Walk, value: Any, eqn: Any) -> tuple[Any, Any]:
    """What is scanned for one input, and how its slice becomes a weight again."""
    if isinstance(value, Several):
        pairs = [_scanned(walk, member, eqn) for member in value.members]
        joins = [join for _, join in pairs]
        return [member for member, _ in pairs], lambda sliced: Several(tuple(map(lambda j, s: j(s), joins, sliced)))
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
    """Weights may be constants of the loop; carried weights that change are formed. Dropout keys change with the step.

    Under `vmap` there may be a predicate a row: the loop then runs until none is true, and a row whose predicate is false
    keeps its values.
    """
    test, test_consts = _compat.open_jaxpr(eqn.params["cond_jaxpr"])
    body, body_consts = _compat.open_jaxpr(eqn.params["body_jaxpr"])
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    passed = _passed(values, bodies.while_passed(eqn))

    def inputs(fixed: tuple[Any, ...], step: Any, carry: list[Any]) -> list[Any]:
        still = dict(zip(passed, _at_step(tuple(passed.values()), step)))
        return [*_at_step(fixed, step), *_with_passed(carry, still)]

    def going(step: Any, carry: list[Any]) -> Any:
        inner = inputs(values[:n], step, carry)
        return walk.sealed(eqn, lambda: walk.arrays(walk.evaluate(test, test_consts, inner), eqn))[0]

    def advance(step: Any, carry: list[Any]) -> list[Any]:
        inner = inputs(values[n : n + m], step, carry)
        return walk.sealed(eqn, lambda: walk.arrays(_computed(walk.evaluate(body, body_consts, inner), passed), eqn))

    init = walk.arrays(_computed(list(values[n + m :]), passed), eqn)
    loop = _loop_by_row if test.outvars[0].aval.shape else _loop
    return _with_passed(loop(going, advance, init), passed)


def _loop(going: Any, advance: Any, init: list[Any]) -> list[Any]:
    """`init` advanced while `going(step, carry)`."""
    return jax.lax.while_loop(lambda s: going(*s), lambda s: (s[0] + 1, advance(*s)), (_first_step(), init))[1]


def _loop_by_row(going: Any, advance: Any, init: list[Any]) -> list[Any]:
    """The same with a predicate of leading axes that the carried values have too; each row stops by its own."""

    def row_by_row(state: Any) -> Any:
        step, goes, carry = state
        carry = [_where(goes, new, old) for new, old in zip(advance(step, carry), carry, strict=True)]
        return step + 1, going(step + 1, carry), carry

    start = (_first_step(), going(_first_step(), init), init)
    return jax.lax.while_loop(lambda state: jnp.any(state[1]), row_by_row, start)[2]


def _where(chosen: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` in the rows that are chosen, else `old`."""
    return jnp.where(chosen.reshape(chosen.shape + (1,) * (new.ndim - chosen.ndim)), new, old)


def _first_step() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _at_step(values: tuple[Any, ...], step: jax.Array) -> list[Any]:
    return [
        replace(value, key=jax.random.fold_in(value.key, step))
        if isinstance(value, Weight) and value.key is not None
        else value
        for value in values
    ]


@rule("cond")
def cond(walk: Walk, eqn: Any, index: Any, *values: Any) -> list[Any]:
    """Enters every branch with the weights; the branches of `platform_dependent` stay those of their platforms."""
    passed = _passed((index, *values), bodies.cond_passed(eqn))

    def branch(closed: Any) -> Any:
        jaxpr, consts = _compat.open_jaxpr(closed)
        return lambda *values: walk.sealed(
            eqn, lambda: walk.arrays(_computed(walk.evaluate(jaxpr, consts, list(values)), passed))
        )

    branches = [branch(closed) for closed in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return _with_passed(jax.lax.switch(index, branches, *values), passed)
    named = {name: run for names, run in zip(platforms, branches, strict=True) for name in names or ("default",)}
    return _with_passed(jax.lax.platform_dependent(*values, **named), passed)


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
    entered = [
        _sharded(walk, value, spec, eqn, partial(collectives.gathered_first, jaxpr, var))
        for value, spec, var in zip(values, specs, jaxpr.invars, strict=True)
    ]
    passed = _passed(values, bodies.shard_map_passed(eqn))

    def body(*values: Any) -> list[Any]:
        inside = [
            weights.localised(value, spec) if isinstance(value, Weight) else value
            for value, spec in zip(values, specs, strict=True)
        ]
        with walk.on_one_device():
            return walk.sealed(eqn, lambda: walk.arrays(_computed(walk.evaluate(jaxpr, consts, inside), passed)))

    outputs = jax.shard_map(
        body,
        mesh=eqn.params["mesh"],
        in_specs=tuple(spec for _, spec in entered),
        out_specs=_computed(list(eqn.params["out_specs"]), passed),
        axis_names=_manual_axes(eqn),
        check_vma=eqn.params["check_vma"],
    )(*[value for value, _ in entered])
    return _with_passed(list(outputs), passed)


def _manual_axes(eqn: Any) -> Any:
    return set(eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", ())))


def _sharded(walk: Walk, value: Any, spec: Any, eqn: Any, gathered_first: Callable[..., bool]) -> tuple[Any, Any]:
    """A value on its way into `shard_map` and its partition specs: one for an array, a tree of them for a weight."""
    if not isinstance(value, Weight):
        return walk.materialise(value, eqn), spec
    if value.key is not None and not eqn.params["check_vma"]:
        raise ValueError(
            f"{value.name}: dropout inside `shard_map` needs check_vma=True, by which it is known between which devices an "
            f"input differs, at {_compat.source_line(eqn)}; set it, or give no dropout key"
        )
    specs = weights.partition_specs(value, spec)
    if specs is not None and value.code is not None:
        part = weights.cut_blank(value, spec, specs, eqn.params["mesh"].shape)
        value, specs = (value, None) if part is None else (part, replace(specs, array=part.array))
    by = {axis: names if isinstance(names, tuple) else (names,) for axis, names in enumerate(spec) if names}
    if specs is None and value.code is None and gathered_first(by):
        value = replace(value, whole=True)
        specs = weights.whole_specs(value, spec)
    return (walk.materialise(value, eqn), spec) if specs is None else (value, specs)
