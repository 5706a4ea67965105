"""SineLoRA: the sine of a low-rank product, which has a far higher rank and no more values to train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import POSITIVE, check_hyperparameters, check_rank, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.methods.lora import kaiming, trained_dtype

GAINS = ("sqrt_in", "sqrt_out")


@dataclass(frozen=True)
class SineLoRA(Method):
    """Sine-activated low-rank adaptation: `w + s / g * sin(frequency * a @ b)` with `a [in, rank]`, `b [rank, out]`.

    `s = alpha / rank`, and the gain `g` is `sqrt(in)`. The sine is taken of every entry, and of a product of low rank it is
    a matrix of high rank; no entry of the update exceeds `s / g`. Starts at the base exactly, because `b` is zero. Trains
    `rank * (in + out)` values a matrix.

    Worth trying where LoRA's rank is the limit. Every step forms the update, so that it costs the more beside LoRA the
    fewer tokens a step has. Merges, but has no smaller form: servers of LoRA can't take it.

    Args:
        rank: columns of `a`; at most the smaller side of the matrix.
        alpha: numerator of `s`.
        frequency: factor of `a @ b` within the sine. The authors' code leaves it to the user (its default 0 trains
            nothing). None for `3 * g`, which is this library's choice: about 200 for a width of 4096. At the start an entry
            of the update moves `frequency / g` times as fast as LoRA's, so a larger frequency wants a smaller learning
            rate.
        gain: `g`. "sqrt_in" is `sqrt(in)`, as in the authors' code; "sqrt_out" is `sqrt(out)`, as other implementations
            have it.

    Raises:
        ValueError: for a hyperparameter out of range, or a rank above the matrix's sides.

    Reference:
        Ji et al. 2024, arXiv:2403.19243. The authors' DoRA of it takes the sine of the activation `x @ a @ b`, which is
        another function and no weight; `DoRA(SineLoRA(...))` here is one of the weight.
    """

    rank: int = 8
    alpha: float = 16.0
    frequency: float | None = None
    gain: str = "sqrt_in"

    family: ClassVar[str] = "Structured updates"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    # The authors' rate.
    recipe: ClassVar[Recipe] = Recipe(rank=8, learning_rate=3e-4)

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), {"frequency": POSITIVE, "gain": one_of(GAINS)})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """LoRA's."""
        return {"a": ("in", "rank"), "b": ("rank", "out")}

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        check_rank(self, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` uniform in ±1/sqrt(in), `b` zero."""
        dtype = trained_dtype(w)
        a, b = kaiming(key, (w.shape[0], self.rank), dtype), jnp.zeros((self.rank, w.shape[1]), dtype)
        return Start({"a": a, "b": b})

    def weight(self, view: View) -> jax.Array:
        """`w + s / g * sin(frequency * a @ b)`."""
        a, b = view.params["a"], view.params["b"]
        # Of the whole matrix, also where `view` is a slice of it.
        gain = math.sqrt(view.site.in_size if self.gain == "sqrt_in" else view.site.out_size)
        frequency = 3 * gain if self.frequency is None else self.frequency
        # Not in the 16 bits of an accelerator's default: the frequency multiplies the rounding too.
        angle = frequency * jnp.matmul(a, b, precision="highest")
        return view.w.astype(a.dtype) + self.alpha / self.rank / gain * sine(angle)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups."""
        return {"a": "a", "b": "b"}


@jax.custom_jvp
def sine(x: jax.Array) -> jax.Array:
    """The sine of 32-bit numbers, to a unit in the last place of 1; of others `jnp.sin`.

    By Cody and Waite's reduction to an eighth of a turn and the polynomials of Cephes' sinf and cosf, all of it arithmetic
    that compilers put into vectors, which XLA's CPU backend does not do with its own. The multiples of a quarter turn that
    are taken away are exact up to an angle of 1e5; beyond, the error is at most the spacing of such angles.
    """
    return _sine_and_cosine(x)[0]


@sine.defjvp
def _sine_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    value, slope = _sine_and_cosine(primals[0])
    return value, slope * tangents[0]


# A quarter turn in parts, the first three with 8 bits or fewer, so that multiples of them up to 2**16 are exact.
_QUARTER = (1.5703125, 4.825592041015625e-4, 1.2665987014770508e-6, 9.92093629470503e-10)


def _sine_and_cosine(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.dtype != jnp.float32:
        return jnp.sin(x), jnp.cos(x)
    turns = jnp.round(x * (2 / math.pi))
    rest = x
    for part in _QUARTER:
        rest = rest - turns * part
    rest = jnp.clip(rest, -0.8, 0.8)  # of an angle whose own spacing is above a quarter turn
    square = rest * rest
    s = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    c = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    c = c - 0.5 * square + 1
    odd = turns - 2 * jnp.floor(turns * 0.5) != 0
    # The sign of the sine changes with every second quarter, that of the cosine one quarter earlier.
    half, later = (jnp.floor(each * 0.5) for each in (turns, turns + 1))
    sign, other = (1 - 2 * (each - 2 * jnp.floor(each * 0.5)) for each in (half, later))
    return sign * jnp.where(odd, c, s), other * jnp.where(odd, s, c)


SineLoRA.CASES = (
    SineLoRA(rank=2, alpha=3.0, frequency=1.5),
    SineLoRA(rank=2, alpha=2.0, frequency=1.0, gain="sqrt_out"),
)
