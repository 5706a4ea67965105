"""MiSS: the rows of one small matrix, repeated down the whole weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.update import Update
from jlora.core.protocol.hyperparameters import check_hyperparameters, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Factors, Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import trained_dtype

VARIANTS = ("miss", "bat", "mini")


@dataclass(frozen=True)
class MiSS(Method):
    """Matrix shard sharing: `w + u`, where row `i` of `u` is row `i % rank` of a trained `b [rank, out]`.

    So the inputs are added up in `rank` sums, which meet `b`: LoRA with a first factor of zeros and ones, and with about half
    of its values. `b` starts at zero, so the start is the base's output; there is no scale. Trains
    `out * rank if variant == "bat" else rank * (out if variant == "miss" else mini_rank)` values a matrix.

    Args:
        rank: rows of `b`; at most the number of inputs.
        variant: "miss". "mini": `b [rank, mini_rank]`, repeated over the outputs too. "bat": blocks of `rank x rank`; for each
            group `k` of outputs a `b_k [rank, rank]`, and block `[n, k]` of the update is `b_kᵀ @ (w_nk + 1)`, with the
            identity for 1. It depends on the weight and forms it.
        mini_rank: columns of `b` for "mini"; divides the number of outputs.
        dropout: probability of dropping an entry of the update's input, where a key is given; not for "bat".

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.MiSS(rank=16)})

    Reference:
        Kang and Yin 2024, arXiv:2409.15371, "MiSS", earlier "Bone"; shapes as in PEFT.
    """

    rank: int = 64
    variant: str = "miss"
    mini_rank: int = 1
    dropout: float = 0.0

    family: ClassVar[str] = "Structured updates"
    recipe: ClassVar[Recipe] = Recipe(rank=64)

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "MISS",
        tensors=(PeftTensor("miss_block", "b"),),
        settings=(
            PeftSetting("r", "rank", 64),
            PeftSetting("mini_r", "mini_rank", 1),
            PeftSetting("miss_dropout", "dropout", 0.0),
            PeftSetting(
                "init_weights",
                "variant",
                True,
                values=(("miss", True), ("miss", False), ("bat", "bat"), ("mini", "mini")),
            ),
        ),
        own_biases="MiSS_only",
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "mini_rank"), {"variant": one_of(VARIANTS)})
        if self.dropout and self.variant == "bat":
            raise ValueError('MiSS has no dropout with variant="bat", which changes the weight itself')

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        if self.variant == "bat":
            return {"b": ("", "rank", "rank")}
        return {"b": ("rank", "out" if self.variant == "miss" else "")}

    @property
    def local(self) -> frozenset[str]:  # type: ignore[override]
        """Columns of the weight may be cut where `b` has one for each."""
        return frozenset({"out"} if self.variant == "miss" else ())

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    @property
    def form(self) -> type[Update] | None:  # type: ignore[override]
        """Factors, but for "bat"."""
        return None if self.variant == "bat" else Factors

    def update(self, view: View) -> Update | None:
        """The factors, if it has some."""
        return self.factors(view)

    def check(self, site: Site) -> None:
        """Refuses sizes that don't divide, and a rank above the number of inputs."""
        rows, columns = site.in_size, site.out_size
        if self.rank > rows:
            raise ValueError(f"rank {self.rank} is above the {rows} inputs of the {rows} x {columns} matrix")
        if self.variant == "mini" and columns % self.mini_rank:
            raise ValueError(
                f"mini_rank {self.mini_rank} must divide the {columns} outputs of the {rows} x {columns} matrix"
            )
        if self.variant == "bat" and (rows % self.rank or columns % self.rank):
            raise ValueError(
                f'with variant="bat" rank {self.rank} must divide both sides of the {rows} x {columns} matrix'
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`b` zero."""
        columns = w.shape[1] if self.variant == "miss" else self.mini_rank
        shape = (self.rank, columns) if self.variant != "bat" else (w.shape[1] // self.rank, self.rank, self.rank)
        return Start({"b": jnp.zeros(shape, trained_dtype(w))})

    def weight(self, view: View) -> jax.Array:
        """`w + u`."""
        b = view.params["b"]
        w, (rows, columns) = view.w.astype(b.dtype), view.w.shape
        if self.variant == "bat":
            blocks = w.reshape(rows // self.rank, self.rank, columns // self.rank, self.rank)
            moved = jnp.einsum("kij,nikc->njkc", b, blocks) + jnp.transpose(b, (2, 0, 1))
            return w + moved.reshape(w.shape)
        found = self.factors(view)
        assert found is not None
        return found.weight(w)

    def factors(self, view: View) -> Factors | None:
        """The sums of the inputs, as a matrix of zeros and ones `[in, rank]`, and `b`, repeated over the outputs."""
        if self.variant == "bat":
            return None
        b, (rows, columns) = view.params["b"], view.w.shape
        sums = (jnp.arange(rows)[:, None] % self.rank == jnp.arange(self.rank)).astype(b.dtype)
        return Factors(sums, jnp.tile(b, (1, columns // b.shape[1])), dropout=self.dropout)

    def labels(self, site: Site) -> dict[str, str]:
        """`b` learns as LoRA's B, which starts at zero too."""
        return {"b": "b"}


MiSS.CASES = (MiSS(2), MiSS(4, variant="bat"), MiSS(2, variant="mini", mini_rank=4, dropout=0.25))
