"""GraLoRA: a grid of blocks, each with a low-rank product of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.hyperparameters import check_hyperparameters, check_rank, integer
from jlora.core.protocol.method import Factors, Method, Site, Start, View, factor_labels
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import kaiming, trained_dtype
from jlora.methods.melora import block_numbers, check_blocks


@dataclass(frozen=True)
class GraLoRA(Method):
    """Granular LoRA: `w + s * d`, where `d` has `blocks` x `blocks` blocks, each a product of rank `rank / blocks`.

    `a [in, rank]` and `b [rank, out]` are cut into blocks along all axes. Block (n, j) of `d` is the product of the block of
    `a` with rows n and ranks j and the block of `b` with ranks n and columns j. With the values of a LoRA of rank `rank`
    the update has rank `blocks * rank`, and an input with outliers reaches the gradients of its own blocks alone.
    `s = alpha / (rank + hybrid_rank)`. `b` starts at zero, so the start is the base's output. Trains
    `(rank + hybrid_rank) * (in + out)` values a matrix.

    Worth trying where LoRA of a large rank gains nothing more. Costs in a step what LoRA of rank
    `blocks * rank + hybrid_rank` does.

    Args:
        rank: columns of `a`; a multiple of `blocks`, and at most the smaller side of the matrix.
        blocks: blocks along each side; divides both. PEFT advises 2 up to rank 32, and 4 from rank 64 on.
        hybrid_rank: rank of an ordinary LoRA beside it, `a_general @ b_general`; 0 for none.
        alpha: numerator of the scale.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, a rank that the blocks don't divide, and (by `adapterize`) such sides.

    Reference:
        Jung et al. 2025, arXiv:2505.20355; formula, starting values and defaults as in PEFT.
    """

    rank: int = 32
    blocks: int = 2
    hybrid_rank: int = 0
    alpha: float = 64.0
    dropout: float = 0.0

    family: ClassVar[str] = "LoRA and its variants"

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "GRALORA",
        tensors=(
            PeftTensor("gralora_A", "a", layout_of=lambda method: (method.row_blocks, _rows)),
            PeftTensor("gralora_B", "b", layout_of=lambda method: (method.column_blocks, _columns)),
            PeftTensor(
                "gralora_A_general.weight", "a_general", "transposed", when=lambda method: method.hybrid_rank > 0
            ),
            PeftTensor(
                "gralora_B_general.weight", "b_general", "transposed", when=lambda method: method.hybrid_rank > 0
            ),
        ),
        settings=(
            PeftSetting("r", "rank", 32),
            PeftSetting("gralora_k", "blocks", 2),
            PeftSetting("hybrid_r", "hybrid_rank", 0),
            PeftSetting("alpha", "alpha", 64.0),
            PeftSetting("gralora_dropout", "dropout", 0.0),
        ),
        own_biases="gralora_only",
        fan_in_fan_out=True,
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "blocks"), {"hybrid_rank": integer(0)})
        if self.rank % self.blocks:
            raise ValueError(f"GraLoRA's rank must be a multiple of its {self.blocks} blocks, got {self.rank}")

    @property
    def scale(self) -> float:
        """`s = alpha / (rank + hybrid_rank)`."""
        return self.alpha / (self.rank + self.hybrid_rank)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        axes = {"a": ("in", "rank"), "b": ("rank", "out")}
        return {**axes, "a_general": axes["a"], "b_general": axes["b"]} if self.hybrid_rank else axes

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    def check(self, site: Site) -> None:
        """Refuses sides that are no multiple of the number of blocks, and ranks above the matrix's sides."""
        check_blocks(self.blocks, site)
        check_rank(self, site, ("rank", "hybrid_rank"))

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` uniform in ±1/sqrt(rows of a block), `b` zero; the ordinary LoRA as LoRA."""
        dtype, (rows, columns) = trained_dtype(w), w.shape
        key_a, key_general = jax.random.split(key)
        a = math.sqrt(self.blocks) * kaiming(key_a, (rows, self.rank), dtype)
        start = {"a": a, "b": jnp.zeros((self.rank, columns), dtype)}
        if self.hybrid_rank:
            start["a_general"] = kaiming(key_general, (rows, self.hybrid_rank), dtype)
            start["b_general"] = jnp.zeros((self.hybrid_rank, columns), dtype)
        return Start(start)

    def weight(self, view: View) -> jax.Array:
        """`w + s * d`, with the blocks of `d` as the letters n (rows) and j (columns) of one product."""
        a, b, (rows, columns), k = view.params["a"], view.params["b"], view.w.shape, self.blocks
        a, b = a.reshape(k, rows // k, k, -1), b.reshape(k, -1, k, columns // k)
        update = jnp.einsum("nijq,nqjo->nijo", a, b).reshape(rows, columns)
        if self.hybrid_rank:
            update += view.params["a_general"] @ view.params["b_general"]
        return view.w.astype(a.dtype) + self.scale * update

    def factors(self, view: View) -> Factors:
        """Of rank `blocks * rank`: for each block of the grid its ranks of `a` and `b`, zero outside its rows and columns."""
        a, b, (rows, columns), k = view.params["a"], view.params["b"], view.w.shape, self.blocks
        each = self.rank // k
        row_block, column_block = (jnp.repeat(jnp.arange(k), size) for size in (self.rank, each))
        a = jnp.where(block_numbers(rows, k)[:, None] == row_block, jnp.tile(a, (1, k)), 0)
        b = jnp.repeat(b.reshape(k, 1, each, columns), k, axis=1).reshape(-1, columns)
        b = jnp.where(jnp.tile(column_block, k)[:, None] == block_numbers(columns, k), b, 0)
        if self.hybrid_rank:
            a = jnp.concatenate([a, view.params["a_general"]], axis=1)
            b = jnp.concatenate([b, view.params["b_general"]])
        return Factors(a, self.scale * b, dropout=self.dropout)

    def row_blocks(self, a: np.ndarray) -> np.ndarray:
        """`a` as PEFT has it, `[blocks, in / blocks, rank]`."""
        return a.reshape(self.blocks, -1, self.rank)

    def column_blocks(self, b: np.ndarray) -> np.ndarray:
        """`b` as PEFT has it, `[blocks, rank, out / blocks]`."""
        return np.stack(np.split(b, self.blocks, axis=-1))

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups of the factors."""
        return factor_labels(site, {name: name[0] for name in self.axes})


def _rows(blocks: np.ndarray) -> np.ndarray:
    """Blocks `[blocks, rows, rank]` below each other."""
    return blocks.reshape(-1, blocks.shape[-1])


def _columns(blocks: np.ndarray) -> np.ndarray:
    """Blocks `[blocks, rank, columns]` beside each other."""
    return np.concatenate(list(blocks), axis=-1)


GraLoRA.CASES = (GraLoRA(rank=4, alpha=6), GraLoRA(rank=4, blocks=4, hybrid_rank=2, alpha=6, dropout=0.25))
