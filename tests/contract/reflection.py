"""A form of update that the package doesn't have, with a method of it: the whole of what a new form takes."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.contraction import accumulation_dtype, matmul
from jlora.core.products.update import Update
from jlora.core.protocol.method import Method, Start


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reflection(Update):
    """`(w - 2 u (u·w)) * scale` with a unit vector `u [in]`: the input is reflected, then multiplied by `w`."""

    u: jax.Array
    scale: jax.Array | None = None
    refuses_forming: ClassVar[bool] = True

    def times(self, number):
        return self

    def scaled(self, scale):
        return replace(self, scale=scale if self.scale is None else scale * self.scale)

    def cost(self, rows, columns, lookup):
        return (columns if lookup else 2 * rows) + (0 if self.scale is None else columns)

    def dense(self, x, w, key, options):
        y = matmul(self._reflected(x), w, accumulation_dtype(options.out_dtype), options.precision)
        return self._rescaled(y).astype(options.out_dtype)

    def transposed(self, x, w, key, options):
        scaled = x if self.scale is None else x * self.scale.astype(x.dtype)
        return self._reflected(matmul(scaled, w.T, accumulation_dtype(x.dtype))).astype(options.out_dtype)

    def lookup(self, base, w, take, side):
        if side == "out":
            y = self._reflected(base)
            return y if self.scale is None else y * take(self.scale[:, None]).astype(y.dtype)
        u = self.u.astype(w.dtype)
        return self._rescaled(base - 2 * take(u[:, None]) * (u @ w))

    def convolve(self, x, w, key, linear):
        u = self.u.astype(x.dtype)[..., None]
        along = 2 * (jnp.swapaxes(u, -1, -2) @ w)
        y = linear.base(x, linear.out_dtype) - linear.mix(linear.product(x, u, x.dtype), along, linear.out_dtype)
        return y if self.scale is None else linear.rescale(y, self.scale.astype(y.dtype))

    experts = convolve

    def norms(self, w):
        w = w.astype(self.u.dtype)
        return jnp.sqrt(jnp.sum(w * w, axis=0)) * (1 if self.scale is None else jnp.abs(self.scale))

    def _reflected(self, x):
        u = self.u.astype(x.dtype)
        return x - 2 * (x @ u)[..., None] * u

    def _rescaled(self, y):
        return y if self.scale is None else y * self.scale.astype(y.dtype)


@dataclass(frozen=True)
class Reflected(Method):
    """The inputs reflected: `w - 2 u (u·w) / |u|²`, with `u [in]`.

    Trains `in` values.
    """

    form = Reflection
    exact_start: ClassVar[bool] = False
    local: ClassVar[frozenset[str]] = frozenset({"out"})

    @property
    def axes(self):
        return {"u": ("in",)}

    def start(self, key, w, site):
        return Start({"u": jax.random.normal(key, w.shape[:1])})

    def weight(self, view):
        u, w = view.params["u"], view.w.astype(jnp.float32)
        return w - 2 * u[:, None] * (u @ w) / (u @ u)

    def update(self, view):
        u = view.params["u"]
        return Reflection(u / jnp.sqrt(u @ u))
