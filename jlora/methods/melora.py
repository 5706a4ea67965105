"""MELoRA: several mini LoRAs on the diagonal, each between its own slice of the input and of the output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Factors, Method, Site, Start, View, factor_labels
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class MELoRA(Method):
    """Mini-ensemble of LoRAs: `w + s * (a @ b) * same_block`, one LoRA for each of `blocks` slices of inputs and outputs.

    `a [in, rank]` and `b [rank, out]` hold the factors of all of them: rows of `a` and columns of `b` of the same slice
    belong together, and `same_block` is 1 where row and column do. So the update is a block-diagonal matrix of rank
    `blocks * rank`, with the values of a LoRA of rank `rank`. `s = alpha / rank`. `b` starts at zero, so the start is the
    base's output. Trains `rank * (in + out)` values a matrix.

    Worth trying where the rank matters and trained values must be few. Costs in a step what LoRA of rank `blocks * rank`
    does. Inputs of one slice never reach outputs of another through the adapter; choose blocks that whole attention heads
    fall into.

    Args:
        rank: rank of every mini LoRA; at most the smaller side of a block.
        blocks: number of mini LoRAs; divides both sides of the matrix. The paper's GLUE runs have 2 of rank 8, its runs on
            LLaMA 8 of rank 1.
        alpha: numerator of the scale.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, and (by `adapterize`) for sides that the blocks don't divide.

    Reference:
        Ren et al. 2024, arXiv:2402.17263.
    """

    rank: int = 8
    blocks: int = 2
    alpha: float = 16.0
    dropout: float = 0.0

    family: ClassVar[str] = "LoRA and its variants"

    recipe: ClassVar[Recipe] = Recipe(rank_means="rank of every block")

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "blocks"))

    @property
    def scale(self) -> float:
        """`s = alpha / rank`."""
        return self.alpha / self.rank

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"a": ("in", "rank"), "b": ("rank", "out")}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    def check(self, site: Site) -> None:
        """Refuses sides that are no multiple of the number of blocks, and a rank above a block's sides."""
        check_blocks(self.blocks, site)
        side = min(site.in_size, site.out_size) // self.blocks
        if self.rank > side:
            raise ValueError(
                f"rank {self.rank} is above the smaller side of a block of the {site.in_size} x {site.out_size} matrix, of "
                f"which there are {self.blocks}; use {side} or less, or fewer blocks"
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` uniform in ±1/sqrt(rows of a block), `b` zero."""
        dtype = trained_dtype(w)
        a = math.sqrt(self.blocks) * kaiming(key, (w.shape[0], self.rank), dtype)
        return Start({"a": a, "b": jnp.zeros((self.rank, w.shape[1]), dtype)})

    def weight(self, view: View) -> jax.Array:
        """`w + s * (a @ b) * same_block`."""
        a, b = view.params["a"], view.params["b"]
        rows, columns = (block_numbers(side, self.blocks) for side in view.w.shape)
        return view.w.astype(a.dtype) + self.scale * jnp.where(rows[:, None] == columns, a @ b, 0)

    def factors(self, view: View) -> Factors:
        """Block-diagonal factors of rank `blocks * rank`: a copy of `a` and of `b` for each block, zero outside it.

        By blocks there would be fewer multiplications, but on a CPU a layer of width 512 or 2048 with its gradients took up to
        1.5 times as long so.
        """
        a, b = view.params["a"], self.scale * view.params["b"]
        diagonal = jnp.repeat(jnp.arange(self.blocks), self.rank)
        rows, columns = (block_numbers(side, self.blocks) for side in view.w.shape)
        a = jnp.where(rows[:, None] == diagonal, jnp.tile(a, (1, self.blocks)), 0)
        b = jnp.where(diagonal[:, None] == columns, jnp.tile(b, (self.blocks, 1)), 0)
        return Factors(a, b, dropout=self.dropout)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups of the factors."""
        return factor_labels(site, {"a": "a", "b": "b"})


def check_blocks(blocks: int, site: Site, name: str = "blocks") -> None:
    """Refuses a matrix whose sides are no multiples of the number of blocks, the hyperparameter of that name.

    Raises:
        ValueError: naming the sides, and the largest number of blocks below that would do.
    """
    common = math.gcd(site.in_size, site.out_size)
    if common % blocks:
        most = max(number for number in range(1, blocks) if common % number == 0)
        raise ValueError(
            f"{name} {blocks} must divide both sides of the {site.in_size} x {site.out_size} matrix; use {most}, or another "
            f"divisor of {common}"
        )


def block_numbers(side: int, blocks: int) -> jax.Array:
    """The number of the block that each row, or column, is in."""
    return jnp.arange(side) // (side // blocks)


MELoRA.CASES = (MELoRA(rank=2, blocks=2, alpha=3), MELoRA(rank=1, blocks=4, alpha=2, dropout=0.25))
