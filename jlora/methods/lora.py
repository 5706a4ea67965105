"""LoRA and rsLoRA: a low-rank additive update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.method import Factors, Method, Site, Start, View

SCALINGS = ("standard", "rslora")
INITS = ("default", "kaiming", "gaussian", "orthogonal", "embedding", "random")


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation: `w + s * a @ b` with `a [in, rank]`, `b [rank, out]`.

    `s = alpha / rank`, or `alpha / sqrt(rank)` with `scaling="rslora"`, which keeps the update's size the same at every
    rank. Starts at the base exactly, because one factor is zero. Trains `rank * (in + out)` values a matrix.

    The good first choice: cheap, mergeable, understood by every server.

    Args:
        rank: columns of `a`; at most the smaller side of the matrix.
        alpha: numerator of the scale.
        scaling: "standard" or "rslora".
        init: how the nonzero factor is drawn.
            "default": "embedding" where the function looks the leaf up, else "kaiming".
            "kaiming": `a` uniform in ±1/sqrt(in), `b` zero (loralib and PEFT).
            "gaussian": `a` normal with deviation 1/rank, `b` zero (PEFT's "gaussian").
            "orthogonal": `a` has orthonormal columns (PEFT's "orthogonal" starts away from the base; this one does not),
            `b` zero.
            "embedding": `a` zero, `b` standard normal (loralib's and PEFT's embeddings).
            "random": both factors kaiming, so that the start differs from the base; for tests of plumbing.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given; an
            embedding's lookup has no such input, and no dropout.

    Raises:
        ValueError: for a rank, alpha, dropout or name out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=8, alpha=16)})

    Reference:
        Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    """

    rank: int = 8
    alpha: float = 8.0
    scaling: str = "standard"
    init: str = "default"
    dropout: float = 0.0

    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"LoRA's rank must be a positive integer, got {self.rank!r}")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"LoRA's alpha must be positive and finite, got {self.alpha!r}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"LoRA's scaling must be one of {SCALINGS}, got {self.scaling!r}")
        if self.init not in INITS:
            raise ValueError(f"LoRA's init must be one of {INITS}, got {self.init!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA's dropout must be at least 0 and below 1, got {self.dropout!r}")

    @property
    def scale(self) -> float:
        """`s`, the factor of `a @ b`."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """Whether the start is the base's output."""
        return self.init != "random"

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Roles of the factors' axes."""
        return {"a": ("in", "rank"), "b": ("rank", "out")}

    @property
    def uses_key(self) -> bool:
        """Dropout draws."""
        return self.dropout > 0

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        if self.rank > min(site.in_size, site.out_size):
            raise ValueError(
                f"rank {self.rank} is above the smaller side of the {site.in_size} x {site.out_size} matrix; "
                f"use rank {min(site.in_size, site.out_size)} or less, or jlora.Full()"
            )

    def init_name(self, site: Site) -> str:
        """The init that "default" stands for at a site."""
        if self.init != "default":
            return self.init
        return "embedding" if site.kind == "gather" else "kaiming"

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Draws the factors."""
        key_a, key_b = jax.random.split(key)
        a, b = (w.shape[0], self.rank), (self.rank, w.shape[1])
        name, dtype = self.init_name(site), trained_dtype(w)
        if name == "embedding":
            return Start({"a": jnp.zeros(a, dtype), "b": jax.random.normal(key_b, b, dtype)})
        draw = {"gaussian": _gaussian, "orthogonal": jax.nn.initializers.orthogonal()}.get(name, kaiming)
        start_b = kaiming(key_b, b, dtype) if name == "random" else jnp.zeros(b, dtype)
        return Start({"a": draw(key_a, a, dtype), "b": start_b})

    def weight(self, view: View) -> jax.Array:
        """`w + s * a @ b`."""
        a, b = view.params["a"], view.params["b"]
        return view.w.astype(a.dtype) + self.scale * (a @ b)

    def factors(self, view: View) -> Factors:
        """`a` and `s * b`: scaling the smaller of the two costs least."""
        return Factors(view.params["a"], self.scale * view.params["b"], dropout=self.dropout)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups."""
        if self.init_name(site) == "embedding":
            return {"a": "embedding", "b": "embedding"}
        return {"a": "a", "b": "b"}


def trained_dtype(w: jax.Array) -> jnp.dtype:
    """What adapters of a base are stored in: float32 at least, so that small updates are not rounded away."""
    return jnp.dtype(jnp.float32) if jnp.dtype(w.dtype).itemsize < 4 else w.dtype


def kaiming(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Uniform in ±1/sqrt(shape[0])."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _gaussian(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / shape[1]


LoRA.CASES = (
    LoRA(rank=4, alpha=8),
    LoRA(rank=3, alpha=5, scaling="rslora", init="gaussian"),
    LoRA(rank=2, init="orthogonal", dropout=0.25),
    LoRA(rank=2, init="embedding"),
    LoRA(rank=2, init="random"),
)
