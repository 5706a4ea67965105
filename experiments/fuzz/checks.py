"""Whether `jlora.lift` keeps its promise on a program: equal to the function of merged params, in values and gradients."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from programs import Program

import jlora
from jlora import paths
from jlora.methods.lora import LoRA

#: Kinds that no reverse derivative goes through.
FORWARD_ONLY = {"while"}
#: Kinds after which sums differ by rounding to 16 bits.
ROUNDING = {"cast_to_half", "cast_to_bfloat", "cast_through_bfloat"}


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        kind: "equal", "no effect" (equal, but the adapters do nothing there), "refused", "not a program" (the plain function
            fails too), or a fault: "wrong value", "wrong gradient", "wrong merge", "crash", "crash in sites", "crash in
            strict".
        detail: what was seen.
    """

    kind: str
    detail: str = ""

    @property
    def fault(self) -> bool:
        """Whether jlora is wrong."""
        return self.kind.startswith(("wrong", "crash"))

    def same_fault(self, other: Outcome) -> bool:
        """Whether another program shows the same fault, as far as can be told."""
        return self.kind == other.kind and self.detail.split(":")[0] == other.detail.split(":")[0]


def check(program: Program, jit: Any = jax.jit) -> Outcome:
    """Adapts the program's params, and compares the lifted function with the function of merged params."""
    fn, params = program.function(), program.params()
    try:
        jax.eval_shape(fn, params)
        forward = bool(FORWARD_ONLY & set(program.kinds()))
        if forward and "custom_vjp" in program.kinds():
            return Outcome("not a program", "no derivative goes through a while loop in a custom_vjp")
        # With and without jit: a rule of its own that refers to values from outside is refused in the one or the other.
        for plain in (fn, jax.jit(fn)):
            jax.eval_shape(lambda p, plain=plain: _derivative(lambda p: mean_of(plain(p)), forward, p), params)
    except Exception as error:
        return Outcome("not a program", _text(error))
    try:
        report = jlora.sites(fn, params)
        str(report)
    except Exception as error:
        return Outcome("crash in sites", _text(error))
    try:
        adapted = _adapted(program, params, report, jit)
    except ValueError as error:
        return Outcome("refused", _text(error))
    except Exception as error:
        return Outcome("crash", _text(error))
    try:
        jax.eval_shape(jlora.lift(fn, strict=True, unread="allow"), adapted)
    except Exception as error:
        if not (isinstance(error, ValueError) and str(error).startswith("strict: ")):
            return Outcome("crash in strict", _text(error))
    return _compared(fn, adapted, forward, _tolerance(program), jit)


def mean_of(outputs: Any) -> jax.Array:
    """A smooth number that every entry of the outputs has its own part in."""
    total = jnp.float32(0)
    for y in jax.tree.leaves(outputs):
        y = (jnp.real(y) + jnp.imag(y)).astype(jnp.float32) if jnp.iscomplexobj(y) else y.astype(jnp.float32)
        total += jnp.sum(jnp.sin(y) * (1 + jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape) / 7))
    return total


def _derivative(loss: Any, forward: bool, params: Any) -> Any:
    """The gradient, or the derivative in one direction where there is no other."""
    if not forward:
        return jax.grad(loss, allow_int=True)(params)
    floats = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)
    return jax.jvp(loss, (params,), (floats,))[1]


def _adapted(program: Program, params: Any, report: Any, jit: Any) -> jlora.Adapted:
    """The params adapted, off their start. Compiling the starts would be most of a check, and equality holds anywhere."""
    spec = {}
    by_path = {leaf.path: leaf for leaf in report.leaves}
    for leaf in program.leaves:
        roles = by_path[leaf.name].roles
        known = roles is not None and roles[0] and roles[1]
        spec[leaf.name] = leaf.entry() if leaf.roles or known or not leaf.method.matrix else jlora.Full()
    start = lambda params: jlora.adapterize(params, spec, sites=report)  # noqa: E731
    adapted = jax.eval_shape(start, params)
    if not all(jnp.issubdtype(each.dtype, jnp.floating) for each in jax.tree.leaves(adapted.frozen)):
        adapted = jit(start)(params)  # positions can't be any numbers
    draw = np.random.default_rng(0)
    anything = lambda each: jnp.asarray(0.5 * draw.standard_normal(each.shape), each.dtype)  # noqa: E731
    frozen = jax.tree.map(lambda each: each if isinstance(each, jax.Array) else anything(each), adapted.frozen)
    return adapted.replace(base=params, params=jax.tree.map(anything, adapted.params), frozen=frozen)


def _merged_by_hand(adapted: jlora.Adapted, merged: Any) -> Outcome | None:
    """LoRA's merge once more, by numpy; None where it is right."""
    merged, base = (dict(paths.flatten_with_keys(tree)[0]) for tree in (merged, adapted.base))
    for site in adapted.plan.sites:
        if type(site.method) is not LoRA or merged[site.keys].dtype != jnp.float32:
            continue
        p = {name: np.asarray(each, np.float64) for name, each in paths.lookup(adapted.params, site.keys).items()}
        f = {name: np.asarray(each, np.float64) for name, each in paths.lookup(adapted.frozen, site.keys).items()}
        update = p["a"] @ p["b"] - (f["a0"] @ f["b0"] if f else 0)
        order = (*site.batch_axes, *site.in_axes, *site.out_axes)
        update = (site.method.scale * update).reshape([site.shape[axis] for axis in order])
        wanted = np.asarray(base[site.keys], np.float64) + np.transpose(update, np.argsort(order))
        if (worst := _difference(merged[site.keys], wanted)) > 1e-5:
            return Outcome("wrong merge", f"{site.path} is off by {worst:.2g}")
    return None


def _compared(fn: Any, adapted: jlora.Adapted, forward: bool, tolerance: float, jit: Any) -> Outcome:
    lifted = jlora.lift(fn, unread="allow")

    def both(params: Any) -> Any:
        now = lambda p: adapted.replace(params=p)  # noqa: E731
        ways = (lambda p: lifted(now(p)), lambda p: fn(jlora.merge(now(p))))
        outputs = [(f(params), _derivative(lambda p, f=f: mean_of(f(p)), forward, params)) for f in ways]
        return jlora.merge(now(params)), outputs

    try:
        merged, ((values, gradients), (right, right_gradients)) = jit(both)(adapted.params)
    except Exception as error:
        return Outcome("crash", _text(error))
    if (found := _merged_by_hand(adapted, merged)) is not None:
        return found
    if jax.tree.structure(values) != jax.tree.structure(right):
        return Outcome("wrong value", "another structure")
    if (worst := _worst(values, right)) > tolerance:
        return Outcome("wrong value", f": off by {worst:.2g}")
    if (worst := _worst(gradients, right_gradients)) > 3 * tolerance:
        return Outcome("wrong gradient", f": off by {worst:.2g}")
    moves = any(np.any(np.asarray(each, np.float64) != 0) for each in jax.tree.leaves(right_gradients))
    return Outcome("equal" if moves else "no effect")


def _worst(found: Any, wanted: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max((_difference(a, b) for a, b in pairs), default=0.0)


def _difference(found: Any, wanted: Any) -> float:
    """The largest difference in units of the largest value; infinite where shapes, dtypes or what is finite differ."""
    if found.shape != wanted.shape or (isinstance(wanted, jax.Array) and found.dtype != wanted.dtype):
        return float("inf")
    kind = np.complex128 if np.iscomplexobj(wanted) else np.float64
    a, b = np.asarray(found).astype(kind), np.asarray(wanted).astype(kind)
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite) or not np.array_equal(np.isnan(a), np.isnan(b)):
        return float("inf")
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0) / (1e-2 + np.max(np.abs(b[finite]), initial=0)))


def _tolerance(program: Program) -> float:
    """16 bits have eight or eleven digits; a weight's sums are rounded there in another order."""
    half = ROUNDING & set(program.kinds()) or any(leaf.dtype == "bfloat16" for leaf in program.leaves)
    return 8e-2 if half else 3e-4


def _text(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent.name == "jlora"]
    where = f" [{Path(frames[-1].filename).name}:{frames[-1].lineno}]" if frames else ""
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())[:300]}"


def shrunk(program: Program, outcome: Outcome, jit: Any) -> tuple[Program, Outcome]:
    """The program without what its fault does not need."""
    for smaller in program.smaller():
        try:
            found = check(smaller, jit)
        except Exception:
            continue
        if found.same_fault(outcome):
            return shrunk(smaller, found, jit)
    return program, outcome
