"""Which outputs of a program are inputs that it only passes on.

Frameworks that keep state (Flax NNX) return the whole state from the body of every `remat`, loop and branch, weights
included. Such a weight is the same before and after, so it passes by and is not formed.
"""

from __future__ import annotations

from typing import Any

from jlora import _compat

Sources = list[int | None]


def passed_on(jaxpr: Any) -> Sources:
    """For each output of a jaxpr, the number of the input that it is, unchanged; None for one that is computed."""
    number: dict[Any, int | None] = {var: n for n, var in enumerate(jaxpr.invars)}

    def source(atom: Any) -> int | None:
        return None if hasattr(atom, "val") else number.get(atom)

    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _SAME:
            for var, operand in zip(eqn.outvars, _SAME[eqn.primitive.name](eqn), strict=True):
                number[var] = None if operand is None else source(eqn.invars[operand])
    return [source(atom) for atom in jaxpr.outvars]


def _body(eqn: Any) -> Sources:
    return passed_on(_compat.open_jaxpr(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))[0])


def _jit(eqn: Any) -> Sources:
    """A value whose sharding was asked for is moved, and so another one."""
    before, after = (eqn.params.get(name) for name in ("in_shardings", "out_shardings"))

    def free(shardings: Any, n: int) -> bool:
        return shardings is None or _compat.is_unspecified(shardings[n])

    return [i if i is not None and free(before, i) and free(after, n) else None for n, i in enumerate(_body(eqn))]


def scan_passed(eqn: Any) -> Sources:
    """For each output of a `scan`, the operand that it is: a carried value that stays, or a stack put together again."""
    consts, carried = _compat.scan_counts(eqn.params)
    found = _body(eqn)
    return [
        i if i is not None and (i == n + consts if n < carried else i >= consts + carried) else None
        for n, i in enumerate(found)
    ]


def while_passed(eqn: Any) -> Sources:
    """For each output of a `while`, the operand that it is: a carried value that stays."""
    tests, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    found = passed_on(_compat.open_jaxpr(eqn.params["body_jaxpr"])[0])
    return [tests + i if i == n + consts else None for n, i in enumerate(found)]


def cond_passed(eqn: Any) -> Sources:
    """For each output of a `cond`, the operand that every branch returns."""
    branches = [passed_on(_compat.open_jaxpr(branch)[0]) for branch in eqn.params["branches"]]
    return [1 + found[0] if found[0] is not None and len(set(found)) == 1 else None for found in zip(*branches)]


def shard_map_passed(eqn: Any) -> Sources:
    """For each output of a `shard_map`, the operand that it is: in and out in the same pieces."""
    before, after = list(eqn.params["in_specs"]), list(eqn.params["out_specs"])
    return [i if i is not None and before[i] == after[n] else None for n, i in enumerate(_body(eqn))]


_SAME = {
    **dict.fromkeys(("jit", "pjit"), _jit),
    **dict.fromkeys(("closed_call", "core_call", "remat2", "checkpoint", "remat"), _body),
    "scan": scan_passed,
    "while": while_passed,
    "cond": cond_passed,
    "shard_map": shard_map_passed,
}
