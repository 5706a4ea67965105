"""Methods whose leaves share trained arrays: with arrays of their own beside them, and without."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.method import Factors, Method, Start
from jlora.methods.lora import kaiming


@dataclass(frozen=True)
class Common(Method):
    """`w + c * (a * d) @ b` with the first rows of `a` and columns of `b`, which all leaves share; `c` is 2.

    Trains `rank` values. Shares `rank * (in + out)` trained values.
    """

    rank: int = 2

    local: ClassVar[frozenset[str]] = frozenset()

    @property
    def axes(self):
        return {"d": ("rank",)}

    @property
    def shared_fields(self):
        return ("a", "b", "c")

    def shared(self, key, sites):
        rows, columns = max(site.in_size for site in sites), max(site.out_size for site in sites)
        a = kaiming(key, (rows, self.rank), jnp.float32)
        return Start({"a": a, "b": jnp.zeros((self.rank, columns))}, {"c": jnp.float32(2)})

    def start(self, key, w, site):
        return Start({"d": jax.random.normal(key, (self.rank,))})

    def factors(self, view):
        rows, columns = view.w.shape
        d = view.params.get("d", 1)
        return Factors(view.shared["c"] * view.shared["a"][:rows] * d, view.shared["b"][:, :columns])

    def weight(self, view):
        found = self.factors(view)
        return view.w.astype(found.a.dtype) + found.a @ found.b

    def shared_labels(self, trained):
        return {"a": "a", "b": "b"}

    def shared_rates(self):
        return {"a": 0.5}


@dataclass(frozen=True)
class Alone(Common):
    """`w + c * a @ b`: a leaf trains nothing of its own.

    Trains `0` values. Shares `rank * (in + out)` trained values.
    """

    @property
    def axes(self):
        return {}

    def start(self, key, w, site):
        return Start({})

    weight = Common.weight
    factors = Common.factors
