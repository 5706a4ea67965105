"""Methods that act, and that the package doesn't have: a network behind the product, and a gain that the bias has too."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.method import Method, Start


@dataclass(frozen=True)
class Network(Method):
    """A network beside the product, behind it or before it: `y + tanh(z @ d) @ u` with `z` its input.

    Trains `rank * (2 * in if side == "input" else 2 * out if side == "output" else in + out)` values.
    """

    rank: int = 3
    side: str = "parallel"
    mergeable: ClassVar[bool] = False

    @property
    def axes(self):
        before, after = {"parallel": ("in", "out"), "output": ("out", "out"), "input": ("in", "in")}[self.side]
        return {"d": (before, "rank"), "u": ("rank", after)}

    def start(self, key, w, site):
        size = dict(zip(("in", "out"), w.shape, strict=True)) | {"rank": self.rank}
        d, u = (tuple(map(size.get, axes)) for axes in self.axes.values())
        return Start({"d": jax.random.normal(key, d), "u": jnp.zeros(u)})

    def apply(self, x, product, view):
        def network(z):
            d, u = (view.params[name].astype(z.dtype) for name in "du")
            return jnp.tanh(z @ d) @ u

        if self.side == "input":
            return product(x + network(x))
        y = product(x)
        return y + network(x if self.side == "parallel" else y).astype(y.dtype)

    def labels(self, site):
        return {"d": "a", "u": "b"}


@dataclass(frozen=True)
class Gain(Method):
    """The outputs times a gain, the bias with them: `w * g`, `bias * g`.

    Trains `out` values.
    """

    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})
    beside: ClassVar[tuple[str, ...]] = ("bias",)

    @property
    def axes(self):
        return {"g": ("out",)}

    def start(self, key, w, site):
        return Start({"g": jnp.ones(w.shape[1])})

    def weight(self, view):
        return view.w.astype(jnp.float32) * view.params["g"]

    def apply(self, x, product, view):
        y = product(x)
        return y * view.params["g"].astype(y.dtype)

    def merged_beside(self, view):
        return {"bias": view.beside["bias"] * view.params["g"]}
