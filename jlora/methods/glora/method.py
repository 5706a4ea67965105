"""GLoRA: five supports that change weight and bias, each low-rank, a vector, a number, or left away."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.products.acting import Acting
from jlora.core.products.contraction import matmul
from jlora.core.products.update import Update
from jlora.core.protocol.hyperparameters import check_hyperparameters, check_rank, integer, one_of
from jlora.core.protocol.method import Arrays, Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor, PeftZeros
from jlora.methods.lora import trained_dtype

#: What a support may be. Its place here is its number in a configuration.
KINDS = ("none", "constant", "vector", "low-rank")
#: The kinds that each support may have, in the order of a configuration: 4 * 4 * 3 * 3 * 3 = 432 in all.
CHOICES = {
    "a": ("none", "constant", "vector", "low-rank"),
    "b": ("none", "constant", "vector", "low-rank"),
    "c": ("none", "vector", "low-rank"),
    "d": ("none", "constant", "vector"),
    "e": ("none", "constant", "vector"),
}
_NEEDS_BIAS = ("c", "d", "e")


# What PEFT has of each support: the layouts of its arrays, and the shape of the zeros where it is left away.
_LAYOUTS = {
    "a": ("transposed", "transposed", "column"),
    "b": ("transposed", "transposed", "column"),
    "c": ("column", "same", "column"),
    "d": ("", "", "same"),
    "e": ("", "", "same"),
}


def _tensors(name: str) -> tuple[PeftTensor, ...]:
    """PEFT's tensors of a support."""
    up, down, vector = _LAYOUTS[name]
    of = {kind: functools.partial(_is, name, kind) for kind in KINDS}
    factors = (
        PeftTensor(f"glora_{name.upper()}.Xu", f"{name}u", up, of["low-rank"]),
        PeftTensor(f"glora_{name.upper()}.Xd", f"{name}d", down, of["low-rank"]),
    )
    vectors = (
        PeftTensor(f"glora_{name.upper()}.X", name, vector, of["vector"]),
        PeftTensor(f"glora_{name.upper()}.X", name, "same", of["constant"]),
    )
    return (*(factors if up else ()), *vectors)


def _is(name: str, kind: str, method: Any) -> bool:
    return getattr(method, name) == kind


def _zeros(name: str, method: Any, site: Site) -> tuple[int, ...] | None:
    """The shape of PEFT's zeros in the place of a support."""
    shapes = {"c": (site.in_size, 1), "d": (site.out_size,), "e": (site.out_size,)}
    there = method.has(name) and (bool(site.beside) or name not in _NEEDS_BIAS)
    return None if there else shapes.get(name, (site.out_size, site.in_size))


def _setting(name: str, support: str, default: str) -> PeftSetting:
    """The setting of a support's kind, which two supports have in common."""
    return PeftSetting(
        name, support, default, values=tuple((k, "lora" if k == "low-rank" else k) for k in CHOICES[support])
    )


_PEFT = PeftKind(
    "GLORA",
    tensors=tuple(tensor for name in CHOICES for tensor in _tensors(name)),
    settings=(
        PeftSetting("r", "rank", 8),
        *(_setting("config_A_B", name, "lora") for name in "ab"),
        _setting("config_C", "c", "lora"),
        *(_setting("config_D_E", name, "constant") for name in "de"),
    ),
    zeros=tuple(PeftZeros(f"glora_{name.upper()}.zeros", functools.partial(_zeros, name)) for name in CHOICES),
    own_biases="glora_only",
    holds=lambda method, site: not method.entangled and method.a == method.b and method.d == method.e,
)


@dataclass(frozen=True)
class GLoRA(Method):
    """Generalized LoRA: the weight `w + w * A + B`, with `*` entry by entry, and the bias `bias + bias * D + E + c @ w`.

    `A` and `B` are low-rank (`au @ ad` with `au [in, rank]`, `ad [rank, out]`; `bu @ bd`), a vector of the outputs, one number,
    or left away. `c`, a shift of the input, is `cd @ cu` with `cd [in, rank]`, a vector, or left away. `D` and `E` are vectors
    of the outputs, one number each, or left away. Where the tree has no bias beside the matrix, `c`, `D` and `E` are left away.
    All start at zero, and so at the base exactly. Trains `number(in, out)` values a matrix, and more where it has a bias.

    With `entangled=True` the arrays of all 432 configurations are one set: a vector is the first row of the low-rank support's
    second factor, a number its first entry. Which kinds count is an array of the adapter, `choice`, of five
    numbers a matrix (the places in "none", "constant", "vector", "low-rank"), at first those of the hyperparameters. Where a
    key is given, as in training, every matrix draws a configuration anew in every pass; `jlora.glora_evolve` then searches the
    best. Nothing is traced anew for another configuration.

    Worth trying where it isn't known what a task wants changed. A low-rank `A` costs forming a matrix in every pass. Merges
    exactly, whatever the configuration.

    Args:
        rank: of the low-rank supports; at most the smaller side of the matrix.
        a: of `A`: "low-rank", "vector", "constant" or "none".
        b: of `B`: the same.
        c: "low-rank", "vector" or "none".
        d: of `D`: "vector", "constant" or "none".
        e: of `E`: the same.
        entangled: keeps the arrays of all configurations, and the configuration as an array.

    Raises:
        ValueError: for a hyperparameter out of range, and (by `adapterize`) for supports that are all left away.

    Example:
        >>> jlora.GLoRA(rank=4, a="vector", c="none")
        >>> supernet = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.GLoRA(rank=4, entangled=True)})

    Reference:
        Chavan et al. 2023, arXiv:2306.07967.
    """

    rank: int = 4
    a: str = "low-rank"
    b: str = "low-rank"
    c: str = "low-rank"
    d: str = "vector"
    e: str = "vector"
    entangled: bool = False

    family: ClassVar[str] = "Structured updates"
    peft_kind: ClassVar[PeftKind] = _PEFT

    def __post_init__(self) -> None:
        kinds = {name: one_of(choices) for name, choices in CHOICES.items()}
        check_hyperparameters(self, bounds={"rank": integer(1, "a positive integer"), **kinds})

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        """The bias, if any support changes it."""
        return ("bias",) if self.entangled or any(self.has(name) for name in _NEEDS_BIAS) else ()

    @property
    def local(self) -> frozenset[str]:  # type: ignore[override]
        """A part of the matrix lacks the first entries of an entangled support."""
        return frozenset() if self.entangled else frozenset({"in", "out"})

    @property
    def uses_key(self) -> bool:
        return self.entangled

    @property
    def form(self) -> type[Update] | None:  # type: ignore[override]
        """It acts, but where `A` is low-rank: then a product by parts needs an array of the weight's shape anyway."""
        return None if self.a == "low-rank" and not self.entangled else Acting

    def update(self, view: View) -> Update | None:
        """What `apply` does, where the weight is not formed."""
        return None if self.form is None else Acting(view)

    @property
    def alike(self) -> frozenset[str]:
        return frozenset({"choice"})

    @property
    def choice(self) -> np.ndarray:
        """The configuration of the hyperparameters, `[5]`."""
        return np.array([KINDS.index(getattr(self, name)) for name in CHOICES], np.int32)

    def has(self, name: str) -> bool:
        """Whether a support is there."""
        return getattr(self, name) != "none"

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        fields = {name: axes for support in CHOICES for name, axes in self._fields(support).items()}
        return {**fields, "choice": ("",)} if self.entangled else fields

    def _fields(self, name: str) -> dict[str, tuple[str, ...]]:
        """The arrays of a support, with their axes."""
        kind = max(CHOICES[name], key=KINDS.index) if self.entangled else getattr(self, name)
        side = "in" if name == "c" else "out"
        if kind == "low-rank":
            up, down = (("in", "rank"), ("rank", "out")) if name in "ab" else (("rank",), ("in", "rank"))
            return {f"{name}u": up, f"{name}d": down}
        return {"vector": {name: (side,)}, "constant": {name: ("",)}, "none": {}}[kind]

    def number(self, rows: int, columns: int, bias: bool = False) -> int:
        """How many values are trained for a matrix `[rows, columns]`, with a bias beside it or without."""
        sizes = {"in": rows, "out": columns, "rank": self.rank, "": 1}
        supports = (name for name in CHOICES if bias or name not in _NEEDS_BIAS)
        return sum(math.prod(sizes[a] for a in axes) for name in supports for axes in self._fields(name).values())

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides, and a matrix at which nothing is left to train."""
        check_rank(self, site)
        if not self.number(site.in_size, site.out_size, bool(site.beside)):
            raise ValueError(
                f"{self} has nothing to train here: a and b are none, and "
                + ("so are c, d and e" if site.beside else "c, d and e change a bias, which is not there")
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """The factors `au`, `bu` and `cu` as Xavier has them, and zeros."""
        sizes, dtype = {"in": w.shape[0], "out": w.shape[1], "rank": self.rank, "": 1}, trained_dtype(w)
        params: Arrays = {}
        for support, one in zip(CHOICES, jax.random.split(key, len(CHOICES))):
            for name, axes in self._fields(support).items() if self._present(support, site) else ():
                shape = tuple(sizes[axis] for axis in axes)
                params[name] = jnp.zeros(shape, dtype)
                if name.endswith("u"):
                    bound = math.sqrt(6 / (self.rank + (sizes["in"] if support in "ab" else 1)))
                    params[name] = jax.random.uniform(one, shape, dtype, -bound, bound)
        return Start(params, {"choice": jnp.asarray(self.choice)} if self.entangled else {})

    def _present(self, name: str, site: Site) -> bool:
        return bool(site.beside) or name not in _NEEDS_BIAS

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups, of the factors that start at zero and the others."""
        present = (name for support in CHOICES if self._present(support, site) for name in self._fields(support))
        return {name: {"au": "a", "bu": "a", "ad": "b", "bd": "b", "cd": "b"}.get(name, "vector") for name in present}

    def weight(self, view: View) -> jax.Array:
        """`w + (w * A + B)`."""
        supports, w = self._supports(view), view.w.astype(trained_dtype(view.w))
        a, b = (row if low is None else low[0] @ low[1] + row for low, row in (supports["a"], supports["b"]))
        return w + (w * a + b)

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """The product with the weight, and what the bias changes by."""
        supports, y = self._supports(view), product(x)
        (low_a, row_a), (low_b, row_b) = supports["a"], supports["b"]
        wide, parts = y.dtype, [y]
        if low_a:
            parts.append(_scaled_product(x, view.w, *low_a, wide))
        if low_b:
            parts.append(matmul(x, low_b[0].astype(x.dtype), wide) @ low_b[1].astype(wide))
        if isinstance(row_a, jax.Array):
            parts.append(y * row_a.astype(wide))
        if isinstance(row_b, jax.Array):
            parts.append(jnp.sum(x.astype(wide), axis=-1, keepdims=True) * row_b.astype(wide))
        if view.beside:
            parts.append(self._shift(supports, product, view).astype(wide))
        return sum(parts[1:], y)

    def _shift(self, supports: dict[str, Support], product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """`bias * D + E + c @ w`, what the bias changes by."""
        (low_c, c), (_, d), (_, e) = (supports[name] for name in _NEEDS_BIAS)
        shift = view.beside["bias"].astype(trained_dtype(view.w)) * d + e
        if low_c:
            c = low_c[1] @ low_c[0] + c
        return shift + product(c).astype(shift.dtype) if isinstance(c, jax.Array) else shift

    def merged_beside(self, view: View) -> Arrays:
        """`bias + (bias * D + E + c @ w)`."""
        w = view.w.astype(trained_dtype(view.w))
        return {"bias": view.beside["bias"].astype(w.dtype) + self._shift(self._supports(view), lambda z: z @ w, view)}

    def _supports(self, view: View) -> dict[str, Support]:
        """Every support in two parts."""
        choice = self._configuration(view)
        return {
            name: self._support(view, name, None if choice is None else choice[n]) for n, name in enumerate(CHOICES)
        }

    def _configuration(self, view: View) -> jax.Array | None:
        """The numbers of an entangled configuration: the kept ones, or, with a key, any."""
        if not self.entangled or view.key is None:
            return view.frozen.get("choice")
        drawn = jax.random.randint(view.key, (len(CHOICES),), 0, jnp.array([len(kinds) for kinds in CHOICES.values()]))
        tables = jnp.array([np.resize([KINDS.index(kind) for kind in kinds], len(KINDS)) for kinds in CHOICES.values()])
        return tables[jnp.arange(len(CHOICES)), drawn]

    def _support(self, view: View, name: str, choice: jax.Array | None) -> Support:
        params, fields = view.params, self._fields(name)
        if not fields or not self._present(name, view.site):
            return None, 0.0
        low = (params[f"{name}u"], params[f"{name}d"]) if f"{name}u" in fields else None
        if choice is None:
            return (low, 0.0) if low else (None, params[name])
        vector = params[name] if low is None else low[1][0] if name in "ab" else low[1][:, 0]
        counts = {kind: (choice == KINDS.index(kind)).astype(vector.dtype) for kind in KINDS}
        row = vector * counts["vector"] + vector[0] * counts["constant"]
        return (low[0], low[1] * counts["low-rank"]) if low else None, row


#: The factors of a low-rank part, or None; and a vector or one number, or 0.
Support = tuple[tuple[jax.Array, jax.Array] | None, jax.Array | float]


def _scaled_product(x: jax.Array, w: jax.Array, up: jax.Array, down: jax.Array, wide: jnp.dtype) -> jax.Array:
    """`x @ (w * (up @ down))`, of which no pass keeps the matrix."""

    def product(x: jax.Array, w: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return matmul(x, (w.astype(up.dtype) * (up @ down)).astype(x.dtype), wide)

    return jax.checkpoint(product)(x, w, up, down)


GLoRA.CASES = (GLoRA(2), GLoRA(2, "vector", "constant", c="none", d="none", e="none"), GLoRA(2, entangled=True))
