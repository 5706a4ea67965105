"""LoRA and rsLoRA: a low-rank additive update."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.data_starts import (
    DIRECTIONS,
    SCALES,
    lora_ga_options,
    of_gradient,
    of_residual,
    principal_axes,
    randomised_svd,
    through_covariance,
)
from jlora.core.protocol.hyperparameters import check_hyperparameters, integer, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Factors, Method, Site, Start, View
from jlora.core.protocol.peft import Peft
from jlora.core.protocol.statistics import RESIDUAL

SCALINGS = ("standard", "rslora")
INITS = ("default", "kaiming", "gaussian", "orthonormal", "orthogonal", "embedding", "random", "olora", "pissa")
INITS += ("eva", "corda", "corda_kpm", "lora_ga", "residual")
#: Names with a part to choose, for messages.
PATTERNS = ("pissa_niter_<k>", "residual_niter_<k>", "lora_ga_<direction>_<scale>")
#: What starts from data needs (see `Method.needs`).
_INPUTS = {"eva": {"covariance", "mean"}, "corda": {"normalised_covariance"}, "corda_kpm": {"normalised_covariance"}}
_NEEDS = {**_INPUTS, "residual": {RESIDUAL}}
_FAST = re.compile(r"(pissa|residual)_niter_(\d+)")


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation: `w + s * a @ b` with `a [in, rank]`, `b [rank, out]`.

    `s = alpha / rank`, or `alpha / sqrt(rank)` with `scaling="rslora"`, which keeps the update's size the same at every
    rank. Starts at the base exactly, because one factor is zero (but for the inits "random" and "residual"). Trains
    `rank * (in + out)` values a matrix.

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
            "eva": `a` the directions of the inputs' largest variances, orthonormal, `b` zero (EVA; with ranks given out by
            these variances it is `jlora.EVA`).
            "corda", "corda_kpm": the first, or the last, triplets of the SVD of `c w`, with `c` the covariance of the
            inputs, `a = inv(c) u sqrt(S / s)`, `b = sqrt(S / s) v.T` (CorDA's instruction-previewed mode, which learns fastest,
            and its knowledge-preserved mode, which forgets least).
            "lora_ga": `a` the first `rank` left singular vectors of the gradient, `b` the next `rank` right ones times their
            singular values and `out ** (1 / 4) / sqrt(gamma)`, with `gamma` 16 (LoRA-GA). "lora_ga_<direction>_<scale>", or one
            of the two, for PEFT's other ways: the directions "ArB2r" (the default), "A2rBr", "ArBr" and "random", the scales
            "stable" (the default), "stable_<gamma>", "weight_svd", "gd_scale" and "unit".
            "residual": `s * a @ b` is the best approximation of that rank of `w_original - w`, what a quantized base lost:
            `a = u sqrt(S / s)`, `b = sqrt(S / s) v.T` of its first triplets (LoftQ).
            "residual_niter_<k>": the same by a randomised SVD with k subspace iterations, for wide matrices.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given; an
            embedding's lookup has no such input, and no dropout.

    EVA, CorDA and LoRA-GA start from data, of which `jlora.prepare` takes what they need: EVA and CorDA forward passes over
    many more tokens than the matrix has inputs, and `4 * in**2` bytes a matrix meanwhile; LoRA-GA the gradients of some
    batches.

    "residual" starts near the original's output and not at the base's. `jlora.loftq` makes base and start together,
    `jlora.residuals` the start on a base that was quantized elsewhere. The authors' code and PEFT don't divide by `s`, so that
    their start is the nearest only where `s` is 1; here it is at any `alpha`.

    "olora", "pissa", "corda" and "lora_ga" start at factors `a0`, `b0` that are not zero, and the weight is
    `w + s * (a @ b - a0 @ b0)`. The papers edit the base to `w - s * a0 @ b0` instead. Here the base stays what it is, bit for
    bit, whatever its dtype; the start is exact, and so is taking the adapter away. `a0` and `b0` are constants, kept and saved
    with the adapter, and the update is the plain LoRA `[a - a0 | a0] @ [b; b - b0]` of twice the rank, which is how it runs and
    ships. Under dropout only this update drops its input (PEFT drops the moved part of the base too). Use no weight decay: it
    would shrink what was moved out of the base.

    Raises:
        ValueError: for a rank, alpha, dropout or name out of range, and (by `adapterize`) for a start from inputs of what is
            looked up, which has none.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=8, alpha=16)})
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=2, init="eva")}
        >>> loss_fn = lambda params, tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)
        >>> adapted = jlora.adapterize(params, spec, prepared=jlora.prepare(params, spec, loss_fn, [tokens]))

    Reference:
        Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; OLoRA: Büyükakyüz 2024,
        arXiv:2406.01775; PiSSA: Meng et al. 2024, arXiv:2404.02948; EVA: Paischer et al. 2024, arXiv:2410.07170; CorDA: Yang et
        al. 2024, arXiv:2406.05223; LoRA-GA: Wang et al. 2024, arXiv:2407.05000; LoftQ: Li et al. 2023, arXiv:2310.08659.
    """

    rank: int = 8
    alpha: float = 8.0
    scaling: str = "standard"
    init: str = "default"
    dropout: float = 0.0

    family: ClassVar[str] = "LoRA and its variants"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    # Starts from inputs want some ten thousand tokens.
    recipe: ClassVar[Recipe] = Recipe(batches=8)

    def __post_init__(self) -> None:
        init = (_is_init, f"one of {(*INITS, *PATTERNS)}, with the directions {DIRECTIONS} and scales {SCALES}")
        bounds = {"rank": integer(1, "a positive integer"), "scaling": one_of(SCALINGS), "init": init}
        check_hyperparameters(self, bounds=bounds, of=LoRA)
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f'LoRA\'s init "orthogonal" needs an even rank, got {self.rank}; "orthonormal" takes any')

    @property
    def scale(self) -> float:
        """`s`, the factor of `a @ b`."""
        return lora_scale(self.alpha, self.rank, self.scaling)

    @property
    def from_weight(self) -> bool:
        """Whether the factors start at `a0`, `b0` whose product is not zero and is subtracted again."""
        return self.init.startswith(("olora", "pissa", "corda", "lora_ga"))

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the inputs, the gradient, or the residual, for starts that are made of these."""
        if self.init.startswith("lora_ga"):
            return frozenset({"gradient"})
        return frozenset(_NEEDS.get(self.init.partition("_niter_")[0], ()))

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """Whether the start is the base's output."""
        return self.init != "random" and RESIDUAL not in self.needs

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        roles = {"a": ("in", "rank"), "b": ("rank", "out")}
        return {**roles, "a0": roles["a"], "b0": roles["b"]} if self.from_weight else roles

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides, and a start from data that the matrix has not."""
        if self.rank > min(site.in_size, site.out_size):
            raise ValueError(
                f"rank {self.rank} is above the smaller side of the {site.in_size} x {site.out_size} matrix; "
                f"use rank {min(site.in_size, site.out_size)} or less, or jlora.Full()"
            )
        if self.init in _INPUTS and site.kind == "gather":
            raise ValueError(f'the init "{self.init}" is of inputs, and a lookup has none; use "default" here')
        if self.init.startswith("lora_ga") and 2 * self.rank > min(site.in_size, site.out_size):
            raise ValueError(
                f"LoRA-GA takes {2 * self.rank} singular vectors of the gradient for rank {self.rank}, but the matrix is "
                f"{site.in_size} x {site.out_size}; use rank {min(site.in_size, site.out_size) // 2} or less"
            )

    def init_name(self, site: Site) -> str:
        """The init that "default" stands for at a site."""
        if self.init != "default":
            return self.init
        return "embedding" if site.kind == "gather" else "kaiming"

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """The factors by `init`; where their product is not zero they are constants as well, `a0` and `b0`."""
        key_a, key_b = jax.random.split(key)
        a, b = (w.shape[0], self.rank), (self.rank, w.shape[1])
        name, dtype = self.init_name(site), trained_dtype(w)
        if self.from_weight:
            start_a, start_b = (each.astype(dtype) for each in self._nonzero(key, w.astype(dtype), statistics))
            return Start({"a": start_a, "b": start_b}, {"a0": start_a, "b0": start_b})
        if name == "orthogonal":
            return Start(dict(zip("ab", _orthogonal_halves(key, a, b, dtype))))
        if name == "embedding":
            return Start({"a": jnp.zeros(a, dtype), "b": jax.random.normal(key_b, b, dtype)})
        if name == "eva":
            axes, _ = principal_axes(**statistics, number=self.rank)
            return Start({"a": axes.astype(dtype), "b": jnp.zeros(b, dtype)})
        if RESIDUAL in self.needs:
            fast = _FAST.fullmatch(name)
            of, iterations = (key, int(fast[2])) if fast else (None, 0)
            a_and_b = of_residual(statistics[RESIDUAL], self.rank, self.scale, of, iterations)
            return Start({field: each.astype(dtype) for field, each in zip("ab", a_and_b)})
        draw = {"gaussian": _gaussian, "orthonormal": jax.nn.initializers.orthogonal()}.get(name, kaiming)
        start_b = kaiming(key_b, b, dtype) if name == "random" else jnp.zeros(b, dtype)
        return Start({"a": draw(key_a, a, dtype), "b": start_b})

    def _nonzero(self, key: jax.Array, w: jax.Array, statistics: Arrays) -> tuple[jax.Array, jax.Array]:
        """`a0` and `b0` of "olora", "pissa", "corda" and "lora_ga"."""
        if (options := lora_ga_options(self.init)) is not None:
            return of_gradient(key, statistics["gradient"], w, self.rank, self.scale, options)
        if self.init.startswith("corda"):
            covariance = statistics["normalised_covariance"]
            return through_covariance(covariance, w, self.rank, self.scale, least=self.init == "corda_kpm")
        if self.init == "olora":
            # Columns of the unpivoted QR's Q depend only on the columns before them, so a thin QR is enough.
            q = jnp.linalg.qr(w[: self.rank].T)[0]
            return w @ q, q.T
        if (fast := _FAST.fullmatch(self.init)) is not None:
            u, sigma, vt = randomised_svd(key, w, self.rank, int(fast[2]))
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

    @classmethod
    def joined(cls, methods: Sequence[Self]) -> tuple[Self, list[float]] | None:
        """With the largest rank and the first's scale; zero columns of `a` and rows of `b` get no gradient."""
        first = methods[0]
        if any((each.dropout, each.from_weight) != (first.dropout, first.from_weight) for each in methods):
            return None
        # How the factors were drawn is past, but for the learning rates of an embedding's, and for what is subtracted.
        init = first.init if first.from_weight or first.init in ("default", "embedding") else "kaiming"
        rank = max(each.rank for each in methods)
        common = replace(first, rank=rank, alpha=first.scale * rank, scaling="standard", init=init)
        return common, [each.scale / first.scale for each in methods]

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft:
        """PEFT's LoRA; where its start is subtracted again, `[a | a0] @ [b; -b0]` of twice the rank."""
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


def _is_init(name: object) -> bool:
    """Whether a start has this name."""
    text = str(name)
    return name in INITS or _FAST.fullmatch(text) is not None or lora_ga_options(text) is not None


def trained_dtype(w: jax.Array) -> jnp.dtype:
    """What adapters of a base are stored in: float32 at least, so that small updates are not rounded away."""
    return jnp.dtype(jnp.float32) if jnp.dtype(w.dtype).itemsize < 4 else w.dtype


def shared_dtype(sites: Sequence[Site]) -> jnp.dtype:
    """What arrays that leaves share are stored in: the widest that `trained_dtype` gives for any of them."""
    return jnp.dtype("float64" if any(site.dtype == "float64" for site in sites) else "float32")


def lora_scale(alpha: float, rank: int, scaling: str) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` where the scaling is "rslora"."""
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


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


LoRA.CASES = (
    LoRA(rank=4, alpha=8),
    LoRA(rank=3, alpha=5, scaling="rslora", init="gaussian"),
    LoRA(rank=2, init="orthonormal", dropout=0.25),
    LoRA(rank=4, alpha=6, init="olora"),
    LoRA(rank=2, alpha=4, init="pissa", scaling="rslora"),
    LoRA(rank=2, init="embedding"),
    LoRA(rank=2, init="random"),
    LoRA(rank=2, init="eva"),
    LoRA(rank=2, alpha=3, init="corda"),
    LoRA(rank=3, init="lora_ga"),
    LoRA(rank=2, alpha=3, init="residual"),
)
