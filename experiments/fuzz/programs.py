"""Random small JAX functions of a params tree, as data: the same number gives the same program, and parts can be taken away."""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import steps
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jlora
import jlora.methods
from jlora.core.protocol.method import Method, Site

Item = tuple[str, int]


@dataclass(frozen=True)
class Leaf:
    """A leaf of the params and what adapts it.

    Attributes:
        name, shape, dtype: the leaf.
        method: the method.
        roles, kind: as `jlora.Axes` has them; None where the trace says them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: Method
    roles: str | None
    kind: str = "dot"

    def entry(self) -> Any:
        """The entry of a spec."""
        return self.method if self.roles is None else jlora.Axes(self.roles, self.method, self.kind)


@dataclass(frozen=True)
class Program:
    """A function of params: for every chain the leaf that it starts at, and what happens to it.

    Attributes:
        leaves: the params.
        chains: a leaf's name, and names of `steps` with the number that each draws its details from. The last is an end.
    """

    leaves: tuple[Leaf, ...]
    chains: tuple[tuple[str, tuple[Item, ...]], ...]

    def kinds(self) -> list[str]:
        """The names of what happens in it."""
        return sorted({name for _, items in self.chains for name, _ in items})

    def source(self) -> str:
        """The function `fn(p)` as Python."""
        shapes = {leaf.name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self.leaves}
        lines = ["def fn(p):", "    t = 1.0"]
        for number, (name, items) in enumerate(self.chains):
            lines.append(f"    w = p[{name!r}]")
            body, result = _rendered(list(items), shapes[name], shapes, 1)
            lines += [*body, f"    y{number} = {result}"]
        outputs = ", ".join(f"y{number}" for number in range(len(self.chains)))
        return "\n".join([*lines, f"    return [{outputs}]", ""])

    def function(self) -> Any:
        """`fn`."""
        scope = dict(SCOPE)
        exec(self.source(), scope)
        return scope["fn"]

    def params(self) -> dict[str, jax.Array]:
        """The leaves' values."""
        draw = np.random.default_rng(len(self.leaves))
        return {
            leaf.name: jnp.asarray(
                draw.standard_normal(leaf.shape) / 2, leaf.dtype
            )  # about the size of a kernel's values
            for leaf in self.leaves
        }

    def spec(self) -> dict[str, Any]:
        """The spec that adapts every leaf."""
        return {leaf.name: leaf.entry() for leaf in self.leaves}

    def smaller(self) -> list[Program]:
        """Programs with one part less, or with a plainer method."""
        found = []
        for at, (name, items) in enumerate(self.chains):
            if len(self.chains) > 1:
                found.append(replace(self, chains=(*self.chains[:at], *self.chains[at + 1 :])))
            for n in range(len(items) - 1):
                shorter = (name, (*items[:n], *items[n + 1 :]))
                found.append(replace(self, chains=(*self.chains[:at], shorter, *self.chains[at + 1 :])))
        plain = jlora.LoRA(rank=1, init="random")
        for at, leaf in enumerate(self.leaves):
            for other in (replace(leaf, dtype="float32"), replace(leaf, method=plain)):
                if other != leaf and (leaf.method.matrix or other.method is not plain):
                    found.append(replace(self, leaves=(*self.leaves[:at], other, *self.leaves[at + 1 :])))
        return found


def x(*shape: int) -> jax.Array:
    """A constant activation without structure."""
    count = np.arange(math.prod(shape), dtype=np.float32)
    return jnp.asarray(np.sin(1.7 * count + 0.3 * count**1.5 + len(shape)).reshape(shape))


def mean(tree: Any) -> jax.Array:
    """One number of order 1 from any outputs."""
    parts = [jnp.mean(jnp.sin(jnp.real(y).astype(jnp.float32))) for y in jax.tree.leaves(tree)]
    return sum(parts[1:], parts[0])


def join(w: jax.Array, v: jax.Array, axis: int) -> jax.Array:
    """Another weight, in the shape of this one, beside it."""
    return jnp.concatenate([w, jnp.resize(v, w.shape).astype(w.dtype)], axis=axis)


def meet(w: jax.Array, v: jax.Array) -> jax.Array:
    """The product of two arrays over the last axis of one and some axis of the other that fits, or their outer sum."""
    fitting = [axis for axis, size in enumerate(v.shape) if size == w.shape[-1]]
    return jnp.tensordot(w, v, ((w.ndim - 1,), (fitting[0],))) if fitting else w * jnp.mean(v).astype(w.dtype)


def with_jvp(f: Any) -> Any:
    """`f(w, t)` with half of its derivative."""
    g = jax.custom_jvp(f)

    @g.defjvp
    def rule(values: Any, tangents: Any) -> Any:
        y, dy = jax.jvp(f, values, tangents)
        return y, jax.tree.map(
            lambda each: (each / 2).astype(each.dtype) if each.dtype != jax.dtypes.float0 else each, dy
        )

    return g


def with_vjp(f: Any) -> Any:
    """`f(w, t)` with half of its derivative, backward."""
    g = jax.custom_vjp(f)

    def forward(w: Any, t: Any) -> Any:
        return jax.vjp(f, w, t)

    def backward(back: Any, dy: Any) -> Any:
        return jax.tree.map(lambda each: (each / 2).astype(each.dtype), back(dy))

    g.defvjp(forward, backward)
    return g


#: What the text of a program may name.
SCOPE = {
    "jax": jax, "jnp": jnp, "np": np, "lax": lax, "x": x, "mean": mean, "join": join, "meet": meet,
    "with_jvp": with_jvp, "with_vjp": with_vjp, "checkpoint_name": checkpoint_name,
}  # fmt: skip


def _rendered(items: list[Item], shape: Any, params: dict[str, Any], depth: int) -> tuple[list[str], str]:
    """Lines of Python and the expression of the result, for a weight of some shape; what does not fit is left out."""
    lines: list[str] = []
    pad = "    " * depth
    while items:
        (name, number), items = items[0], items[1:]
        draw = Random(number)
        if name in steps.NESTS:
            found = steps.NESTS[name](shape, draw)
            if found is not None:
                body, result = _rendered(items, found[1], params, depth + 1)
                inner = [f"{pad}def f{depth}(w, t):", *body, f"{pad}    return {result}"]
                return [*lines, *inner], _named(found[0], f"f{depth}")
        elif name in steps.USES:
            text = steps.USES[name](shape, draw)
            return lines, text or "t * jnp.sum(w)"
        elif (text := steps.STEPS[name](shape, draw)) is not None:
            after = _after(text, shape, params)
            if after is not None:
                lines.append(f"{pad}w = {text}")
                shape = after
    return lines, "t * jnp.sum(w)"


def _named(text: str, name: str) -> str:
    """The text of a nest with its function's name."""
    return "".join(name if part == "f" else part for part in _words(text))


def _words(text: str) -> list[str]:
    import re

    return re.split(r"(\bf\b)", text)


def _after(text: str, shape: Any, params: dict[str, Any]) -> Any:
    """The shape after a step, or None where it can't be done there."""
    try:
        t = jax.ShapeDtypeStruct((), jnp.float32)
        found = jax.eval_shape(lambda w, t, p: eval(text, {**SCOPE, "w": w, "t": t, "p": p}), shape, t, params)
    except (TypeError, ValueError, IndexError, ZeroDivisionError, NotImplementedError):
        return None
    fits = isinstance(found, jax.ShapeDtypeStruct) and math.prod(found.shape) <= 4 * steps.MOST
    return found if fits and jnp.issubdtype(found.dtype, jnp.floating) else None


def methods() -> list[Method]:
    """Every case of every method that needs no data, has a weight to merge, and takes a leaf that is in no layer."""
    found = []
    for info in pkgutil.walk_packages(jlora.methods.__path__, "jlora.methods."):
        module = importlib.import_module(info.name)
        classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Method)]
        found += [case for c in classes if c.__module__ == module.__name__ for case in c.CASES]
    return [case for case in found if not case.needs and case.mergeable and not isinstance(case, jlora.Layers)]


METHODS = methods()


def random_program(number: int) -> Program:
    """The program of a number."""
    draw = Random(number)
    leaves = tuple(_leaf(f"w{n}", draw) for n in range(2))
    if draw.random() < 0.5:
        leaves = (leaves[0], replace(leaves[0], name="w1"))
    chains = []
    for n in range(draw.choice([1, 1, 2, 3])):
        nests = draw.choices(list(steps.NESTS), k=draw.choice([0, 0, 1, 1, 2]))
        passed = draw.choices(list(steps.STEPS), k=draw.choice([0, 1, 1, 2, 3, 4]))
        middle = [*nests, *passed]
        draw.shuffle(middle)
        items = [*middle, draw.choice(list(steps.USES))]
        chains.append((f"w{n % 2}", tuple((name, draw.randrange(10**6)) for name in items)))
    return Program(leaves, tuple(chains))


def _leaf(name: str, draw: Random) -> Leaf:
    """A leaf of two to four axes with a method that its matrix has room for."""
    shape = tuple(draw.choice([2, 3, 4, 4, 6]) for _ in range(draw.choice([2, 2, 2, 3, 3, 4])))
    if draw.random() < 0.1:
        shape = (*shape[:-1], 1) if draw.random() < 0.5 else (1, *shape[1:])
    dtype = draw.choice(["float32"] * 9 + ["bfloat16"])
    roles = ["in", "out", *draw.choices(["in", "out", "batch"], k=len(shape) - 2)]
    draw.shuffle(roles)
    method = _method(shape, roles, draw)
    traced = draw.random() < 0.5
    return Leaf(
        name, shape, dtype, method, None if traced else " ".join(roles), draw.choice(["dot", "dot", "gather", "conv"])
    )


def _method(shape: tuple[int, ...], roles: list[str], draw: Random) -> Method:
    axes = [tuple(n for n, role in enumerate(roles) if role == wanted) for wanted in ("in", "out", "batch")]
    for method in draw.sample(METHODS, 12):
        try:
            method.check(Site(("w",), shape, "float32", *axes, "dot", method))
        except ValueError:
            continue
        return method
    return jlora.LoRA(rank=1, init="random")
