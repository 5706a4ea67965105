"""EVA: LoRA along the inputs' largest variances, with ranks for the matrices whose inputs they explain best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.data_starts import principal_axes
from jlora.core.protocol.gated import Gated
from jlora.core.protocol.hyperparameters import check_hyperparameters, number
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Site, Start
from jlora.methods.lora import LoRA, trained_dtype


@dataclass(frozen=True)
class EVA(Gated):
    """Explained variance adaptation: `w + s * (a * gate) @ b` with `a [in, r]`, `b [r, out]`, `gate [r]` of ones and zeros.

    `s = alpha / rank`, the same in all matrices, as with PEFT's `adjust_scaling_factors`. `a` starts as the directions of the
    largest variances of the matrix's inputs, `b` at zero. Every matrix has room for `r = rho * rank` of them, but `rank` in
    the mean are in use: of all directions of all matrices of the method those that explain the largest shares of their
    input's variance. A matrix may go without; one gets more where few directions explain much of its input. Trains
    `min(round(rho * rank), in, out) * (in + out)` values a matrix, of which those behind a gate of 0 start at zero and stay
    there; `jlora.compact` drops them.

    Starts from data, of which `jlora.prepare` takes what it needs: forward passes over many more tokens than the matrix has
    inputs, and `4 * in**2` bytes a matrix meanwhile. The paper goes on until the directions stay what they are; here it is
    the data given. Costs in a step what LoRA of rank `rho * rank` costs, until it is compacted.

    Worth trying where LoRA starts slowly; with `rho=1` all ranks stay equal, and it is `LoRA(rank, init="eva")`.

    Args:
        rank: mean rank of a matrix.
        alpha: numerator of the scale.
        rho: the largest rank of a matrix over `rank`; at least 1.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, and (by `adapterize`) for a rank above the matrix's sides, or a matrix
            that is looked up, which has no input.

    Example:
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.EVA(rank=2)}
        >>> loss_fn = lambda params, tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)
        >>> adapted = jlora.adapterize(params, spec, prepared=jlora.prepare(params, spec, loss_fn, [tokens]))
        >>> sum(jlora.ranks(adapted).values()) / len(jlora.ranks(adapted))
        2.0

    Reference:
        Paischer et al. 2024, arXiv:2410.07170. Directions are those around the mean of the inputs, and shares of the whole
        variance, as in PEFT's incremental PCA.
    """

    rank: int = 8
    alpha: float = 8.0
    rho: float = 2.0
    dropout: float = 0.0

    family: ClassVar[str] = "Rank allocation"

    recipe: ClassVar[Recipe] = Recipe(rank_means="mean rank", batches=LoRA.recipe.batches)

    def __post_init__(self) -> None:
        check_hyperparameters(
            self, ("rank",), {"rho": number(lambda v: 1 <= v < float("inf"), "finite and at least 1")}
        )

    @property
    def needs(self) -> frozenset[str]:
        """What tells the variances of the inputs."""
        return LoRA(init="eva").needs

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides, and what is looked up."""
        LoRA(self.rank, init="eva").check(site)

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """The directions, zeros, and in place of gates the shares of variance, by which `together` gives out ranks."""
        width, dtype = min(round(self.rho * self.rank), *w.shape), trained_dtype(w)
        a, shares = principal_axes(**statistics, number=width)
        return Start({"a": a.astype(dtype), "b": jnp.zeros((width, w.shape[1]), dtype)}, {"gate": shares.astype(dtype)})

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """Opens the gates of the largest shares; of equal ones those of the first leaf and matrix."""
        every = jnp.concatenate([start.frozen["gate"].reshape(-1) for start in starts])
        matrices = sum(start.frozen["gate"][..., 0].size for start in starts)
        first = jnp.argsort(-every, stable=True)[: self.rank * matrices]
        opened, found = jnp.zeros_like(every).at[first].set(1), []
        for start in starts:
            shape = start.frozen["gate"].shape
            gate, opened = jnp.split(opened, [start.frozen["gate"].size])
            gate = gate.reshape(shape).astype(start.frozen["gate"].dtype)
            params = {**start.params, "a": start.params["a"] * gate[..., None, :]}
            found.append(replace(start, params=params, frozen={"gate": gate}))
        return found


EVA.CASES = (EVA(rank=2, rho=1.0), EVA(rank=2, alpha=3, rho=1.7, dropout=0.25))
