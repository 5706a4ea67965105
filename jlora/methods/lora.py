"""LoRA and rsLoRA: a low-rank additive update."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.hyperparameters import check_hyperparameters, integer, one_of
from jlora.core.protocol.method import Factors, Method, Site, Start, View
from jlora.core.protocol.peft import Peft

SCALINGS = ("standard", "rslora")
INITS = ("default", "kaiming", "gaussian", "orthonormal", "orthogonal", "embedding", "random", "olora", "pissa")
_FAST_PISSA = re.compile(r"pissa_niter_(\d+)")


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
            "orthonormal": `a` has orthonormal columns, `b` zero.
            "orthogonal": both factors are nonzero, and `a @ b` is zero, because they lie in orthogonal halves of the rank
            (PEFT's "orthogonal"); needs an even rank.
            "embedding": `a` zero, `b` standard normal (loralib's and PEFT's embeddings).
            "random": both factors kaiming, so that the start differs from the base; for tests.
            "olora": `b` orthonormal rows, the first `rank` of the QR factorisation of `w.T`, and `a = w @ b.T` (OLoRA).
            "pissa": the top singular triplets of `w`, `a = u sqrt(S / s)`, `b = sqrt(S / s) v.T` (PiSSA).
            "pissa_niter_<k>": the same by a randomised SVD with k subspace iterations, for wide matrices.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given; an
            embedding's lookup has no such input, and no dropout.

    "olora" and "pissa" start at factors `a0`, `b0` taken from the weight, and the weight is `w + s * (a @ b - a0 @ b0)`. The
    papers edit the base to `w - s * a0 @ b0` instead. Here the base stays what it is, bit for bit, whatever its dtype; the
    start is exact, and so is taking the adapter away. `a0` and `b0` are constants, kept and saved with the adapter, and
    the update is the plain LoRA `[a - a0 | a0] @ [b; b - b0]` of twice the rank, which is how it runs and ships. Under
    dropout only this update drops its input (PEFT drops the moved part of the base too). Use no weight decay: it would
    shrink what was moved out of the base.

    Raises:
        ValueError: for a rank, alpha, dropout or name out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=8, alpha=16)})

    Reference:
        Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; OLoRA: Büyükakyüz 2024,
        arXiv:2406.01775; PiSSA: Meng et al. 2024, arXiv:2404.02948.
    """

    rank: int = 8
    alpha: float = 8.0
    scaling: str = "standard"
    init: str = "default"
    dropout: float = 0.0

    family: ClassVar[str] = "LoRA and its variants"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    def __post_init__(self) -> None:
        init = (lambda v: v in INITS or bool(_FAST_PISSA.fullmatch(str(v))), f"one of {(*INITS, 'pissa_niter_<k>')}")
        bounds = {"rank": integer(1, "a positive integer"), "scaling": one_of(SCALINGS), "init": init}
        check_hyperparameters(self, bounds=bounds, of=LoRA)
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f'LoRA\'s init "orthogonal" needs an even rank, got {self.rank}; "orthonormal" takes any')

    @property
    def scale(self) -> float:
        """`s`, the factor of `a @ b`."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @property
    def from_weight(self) -> bool:
        """Whether the factors start as a part of the weight, `a0 @ b0`, which is subtracted again."""
        return self.init == "olora" or self.init.startswith("pissa")

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """Whether the start is the base's output."""
        return self.init != "random"

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        roles = {"a": ("in", "rank"), "b": ("rank", "out")}
        return {**roles, "a0": roles["a"], "b0": roles["b"]} if self.from_weight else roles

    @property
    def uses_key(self) -> bool:
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
        """The factors by `init`; those taken from the weight are constants as well, `a0` and `b0`."""
        key_a, key_b = jax.random.split(key)
        a, b = (w.shape[0], self.rank), (self.rank, w.shape[1])
        name, dtype = self.init_name(site), trained_dtype(w)
        if self.from_weight:
            start_a, start_b = self._of_weight(key, w.astype(dtype))
            return Start({"a": start_a, "b": start_b}, {"a0": start_a, "b0": start_b})
        if name == "orthogonal":
            return Start(dict(zip("ab", _orthogonal_halves(key, a, b, dtype))))
        if name == "embedding":
            return Start({"a": jnp.zeros(a, dtype), "b": jax.random.normal(key_b, b, dtype)})
        draw = {"gaussian": _gaussian, "orthonormal": jax.nn.initializers.orthogonal()}.get(name, kaiming)
        start_b = kaiming(key_b, b, dtype) if name == "random" else jnp.zeros(b, dtype)
        return Start({"a": draw(key_a, a, dtype), "b": start_b})

    def _of_weight(self, key: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`a0` and `b0` of "olora" and "pissa"."""
        if self.init == "olora":
            # Columns of the unpivoted QR's Q depend only on the columns before them, so a thin QR is enough.
            q = jnp.linalg.qr(w[: self.rank].T)[0]
            return w @ q, q.T
        if (fast := _FAST_PISSA.fullmatch(self.init)) is not None:
            u, sigma, vt = randomised_svd(key, w, self.rank, int(fast[1]))
        else:
            u, sigma, vt = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(sigma[: self.rank] / self.scale)
        return u[:, : self.rank] * root, root[:, None] * vt[: self.rank]

    def weight(self, view: View) -> jax.Array:
        """`w + s * a @ b`, or `w + s * (a @ b - a0 @ b0)`."""
        a, b = view.params["a"], view.params["b"]
        update = a @ b
        if self.from_weight:
            update -= view.frozen["a0"] @ view.frozen["b0"]
        return view.w.astype(a.dtype) + self.scale * update

    def factors(self, view: View) -> Factors:
        """`a` and `s * b`: scaling the smaller of the two costs least."""
        a, b = view.params["a"], view.params["b"]
        if self.from_weight:
            # As `(a - a0) @ b + a0 @ (b - b0)`: `a @ b - a0 @ b0` would be a small difference of large parts, of which 16 bits
            # keep nothing.
            a0, b0 = view.frozen["a0"], view.frozen["b0"]
            a, b = jnp.concatenate([a - a0, a0], axis=1), jnp.concatenate([b, b - b0])
        return Factors(a, self.scale * b, dropout=self.dropout)

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft:
        """PEFT's LoRA; where it starts from a part of the weight, `[a | a0] @ [b; -b0]` of twice the rank."""
        a, b, fields, alpha, root = params["a"], params["b"], {}, self.alpha, self.scaling == "rslora"
        if self.from_weight:
            a, b = np.concatenate([a, frozen["a0"]], axis=-1), np.concatenate([b, -frozen["b0"]], axis=-2)
            fields, alpha = {"a": ("a", "a0"), "b": ("b", "b0")}, alpha * (2**0.5 if root else 2)
        return Peft("lora", {"a": a, "b": b}, fields, alpha, root, self.dropout)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; with the start of an embedding both factors are in "embedding"."""
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


def _orthogonal_halves(key: jax.Array, a: Any, b: Any, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Factors in the spans of the even and the odd rows of one orthogonal matrix, so that `a @ b` is zero."""
    key_q, key_a, key_b = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(key_q, (b[0], b[0]), dtype))[0]
    left = jax.random.normal(key_a, (a[0], b[0] // 2), dtype) / 10
    right = jax.random.normal(key_b, (b[0] // 2, b[1]), dtype) / 10
    return left @ q[0::2], q[1::2].T @ right


def randomised_svd(key: jax.Array, w: jax.Array, rank: int, iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`u [in, rank]`, `sigma [rank]`, `vt [rank, out]` of about the best approximation of `w` of that rank.

    Subspace iteration from a Gaussian start, a few columns wider than the rank (Halko et al. 2011, arXiv:0909.4061).
    """
    width = min(rank + 8, *w.shape)
    q = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], width), w.dtype))[0]
    for _ in range(iterations):
        q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]
    u, sigma, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return (q @ u)[:, :rank], sigma[:rank], vt[:rank]


LoRA.CASES = (
    LoRA(rank=4, alpha=8),
    LoRA(rank=3, alpha=5, scaling="rslora", init="gaussian"),
    LoRA(rank=2, init="orthonormal", dropout=0.25),
    LoRA(rank=4, alpha=6, init="olora"),
    LoRA(rank=2, alpha=4, init="pissa", scaling="rslora"),
    LoRA(rank=2, init="embedding"),
    LoRA(rank=2, init="random"),
)
