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
#: Pi in parts, of which the first have so few bits that their products with whole and half numbers below 2**12 are exact.
_PI = (3.140625, 0.0009675025939941406, 1.5099580252808664e-07)
#: `(sin(x) / x - 1) / x**2` between -pi / 2 and pi / 2 as a polynomial of `x**2`: the best fit, within 1.4e-11 of the sine.
_POLYNOMIAL = (
    -0.1666666716337204, 0.008333329111337662, -0.00019840702589135617, 2.751885403995402e-06, -2.379469776769838e-08,
)  # fmt: skip


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
def sine(angle: jax.Array) -> jax.Array:
    """`sin(angle)`; in float32 by sums and products alone, which XLA's CPU backend runs on vectors, as it does no sine.

    Right within 2.5e-7 for angles up to 10,000, and beyond them within their own rounding; never above 1.
    """
    return _sine(angle, 0.0) if angle.dtype == jnp.float32 else jnp.sin(angle)


@sine.defjvp
def _sine_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """By the cosine, computed in the same way."""
    (angle,), (tangent,) = primals, tangents
    cosine = -_sine(angle, 0.5) if angle.dtype == jnp.float32 else jnp.cos(angle)
    return sine(angle), cosine * tangent


def _sine(angle: jax.Array, shift: float) -> jax.Array:
    """`sin(angle - shift * pi)`: by the nearest multiple of pi, and a polynomial of what is left."""
    turns = jnp.round(angle / math.pi - shift)
    left, odd = angle, turns - 2 * jnp.floor(turns / 2)
    for part in _PI:
        left = left - (turns + shift) * part
    left = jnp.clip(left, -math.pi / 2, math.pi / 2)  # of huge angles nothing else is sure
    square, tail = left * left, jnp.float32(_POLYNOMIAL[-1])
    for coefficient in _POLYNOMIAL[-2::-1]:
        tail = tail * square + coefficient
    return (1 - 2 * odd) * (left + left * square * tail)


SineLoRA.CASES = (
    SineLoRA(rank=2, alpha=3.0, frequency=1.5),
    SineLoRA(rank=2, alpha=2.0, frequency=1.0, gain="sqrt_out"),
)
