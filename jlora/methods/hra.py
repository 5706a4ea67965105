"""HRA: the input reflected several times before the product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import trained_dtype
from jlora.methods.oft.method import EXACT


@dataclass(frozen=True)
class HRA(Method):
    """Householder reflections: `h_rank ... h_2 h_1 w` with `h_k = 1 - 2 u_k u_kᵀ`, `u_k` column `k` of `u` at length 1.

    A product of reflections is orthogonal, and differs from the identity by a matrix of rank `rank` at most. The columns of
    `u [in, rank]` start in equal pairs, each drawn uniform, so that reflections cancel and the start is the base's output.
    Trains `rank * in` values a matrix.

    Worth trying between LoRA and OFT: orthogonal as the latter, of low rank as the former. Costs two thin products, each with
    the input on one side. The change of the weight has rank `rank` at most, so that servers of LoRA can have it without
    loss, by `jlora.save_peft(..., profile="serving", svd_rank=rank)`.

    Args:
        rank: number of reflections; at most the inputs of the matrix. An odd one can't start as the base: its columns are drawn
            apart, and its start is another function, as in PEFT.
        gram_schmidt: whether columns are made orthogonal first, which leaves `1 - 2 p` with `p` the projection on what they
            span. That is never the identity, so that the start is another function than the base; columns are drawn apart.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.HRA(rank=8)})

    Reference:
        Yuan et al. 2024, arXiv:2405.17484; formula, start and defaults as in PEFT, but for the start with `gram_schmidt`, where
        PEFT's equal pairs leave the second column of each to rounding errors.
    """

    rank: int = 8
    gram_schmidt: bool = False

    family: ClassVar[str] = "Rotations and scales"
    local: ClassVar[frozenset[str]] = frozenset({"out"})
    recipe: ClassVar[Recipe] = Recipe(rank=8, rank_means="number of reflections")

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "HRA",
        tensors=(PeftTensor("hra_u", "u"),),
        settings=(PeftSetting("r", "rank", 8), PeftSetting("apply_GS", "gram_schmidt", False)),
        own_biases="hra_only",
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",))

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """Whether the start is the base's output."""
        return self.rank % 2 == 0 and not self.gram_schmidt

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"u": ("in", "rank")}

    def check(self, site: Site) -> None:
        """Refuses more reflections than there are inputs."""
        if self.rank > site.in_size:
            raise ValueError(
                f"rank {self.rank} is above the {site.in_size} inputs of the {site.in_size} x {site.out_size} matrix; use "
                f"{site.in_size} or less"
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Uniform in ±1/sqrt(columns drawn), each column twice where the start is exact. Only directions count."""
        drawn = self.rank // 2 if self.exact_start else self.rank
        u = jax.random.uniform(key, (w.shape[0], drawn), trained_dtype(w), -(drawn**-0.5), drawn**-0.5)
        return Start({"u": jnp.repeat(u, self.rank // drawn, axis=1)})

    def reflected(self, x: jax.Array, u: jax.Array) -> jax.Array:
        """`x [..., in] @ h_rank ... h_1`, by two thin products: `x - x v t vᵀ`."""
        if self.gram_schmidt:
            v = jnp.linalg.qr(u)[0]
            back = 2 * v.T
        else:
            v = u / jnp.linalg.norm(u, axis=0)
            back = _joined(v)
        return x - jnp.matmul(jnp.matmul(x, v, precision=EXACT), back, precision=EXACT)

    def weight(self, view: View) -> jax.Array:
        """`h_rank ... h_1 w`, the rows of whose transpose are reflected in the other order."""
        u = view.params["u"]
        return self.reflected(view.w.astype(u.dtype).T, u[:, ::-1]).T

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """`(x @ h_rank ... h_1) @ w`."""
        u = view.params["u"]
        return product(self.reflected(x.astype(u.dtype), u))


def _joined(v: jax.Array) -> jax.Array:
    """`t vᵀ` with `1 - v t vᵀ = h_rank ... h_1`, `v [in, rank]` of columns of length 1.

    `t` is the inverse of the lower triangle of `vᵀ v`, with the half of its diagonal.
    """
    inner = jnp.matmul(v.T, v, precision=EXACT)
    lower = jnp.tril(inner, -1) + jnp.eye(v.shape[1], dtype=v.dtype) / 2
    return jax.scipy.linalg.solve_triangular(lower, v.T, lower=True)


HRA.CASES = (HRA(rank=4), HRA(rank=2, gram_schmidt=True))
