"""VB-LoRA: factors put together from vectors of one bank that all matrices share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.hyperparameters import NOT_NEGATIVE, POSITIVE, check_hyperparameters, integer
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Factors, Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftShared, PeftTensor
from jlora.methods.lora import shared_dtype, trained_dtype

# Both ways alike.
_SWAPPED = (lambda x: np.swapaxes(x, 0, 1), lambda x: np.swapaxes(x, 0, 1))


@dataclass(frozen=True)
class VBLoRA(Method):
    """LoRA from a vector bank: `w + a @ b`, each stretch of a column of `a` and a row of `b` a mixture of vectors of the bank.

    All leaves share the trained bank `[num_vectors, vector_length]`. A matrix has logits for every stretch of `vector_length`
    numbers: `la [ceil(in / vector_length), rank, num_vectors]` and `lb [rank, ceil(out / vector_length), num_vectors]`. A
    stretch is `sum over the topk largest logits of softmax(those logits) * their vectors`, so gradients reach the chosen ones
    alone. The bank starts uniform within `bank_bound` and the logits normal, so the start is near the base's output and not
    at it.

    Trains `rank * num_vectors * (-(-in // vector_length) + -(-out // vector_length))` values a matrix. Shares
    `num_vectors * vector_length` trained values. Costs optimizer memory for all logits, although a trained adapter is `topk`
    weights and numbers a stretch.

    Worth trying where many adapters have to be kept; wants learning rates well above LoRA's, the logits ten times the bank's.

    Args:
        rank: columns of `a`.
        num_vectors: vectors in the bank; more for larger models.
        vector_length: their length. Where it does not divide a side of a matrix, which PEFT refuses, the last stretch is cut.
        topk: how many vectors a stretch is mixed from.
        bank_bound: the bank starts uniform within it; at 0 nothing would ever have a gradient.
        logits_deviation: standard deviation of the logits at the start.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.VBLoRA(num_vectors=64, vector_length=64)})

    Reference:
        Li et al. 2024, arXiv:2405.15179; shapes, starts and defaults as in PEFT.
    """

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    bank_bound: float = 0.02
    logits_deviation: float = 0.1
    dropout: float = 0.0

    family: ClassVar[str] = "Shared tensors"
    exact_start: ClassVar[bool] = False

    # PEFT has each matrix's logits with the rank first for `A`, and behind the stretches for `B`.
    peft_kind: ClassVar[PeftKind] = PeftKind(
        "VBLORA",
        tensors=(PeftTensor("vblora_logits_A", "la", _SWAPPED), PeftTensor("vblora_logits_B", "lb", _SWAPPED)),
        settings=(
            PeftSetting("r", "rank", 4),
            PeftSetting("num_vectors", "num_vectors", 256),
            PeftSetting("vector_length", "vector_length", 256),
            PeftSetting("topk", "topk", 2),
            PeftSetting("vblora_dropout", "dropout", 0.0),
            PeftSetting("init_vector_bank_bound", "bank_bound", 0.02),
            PeftSetting("init_logits_std", "logits_deviation", 0.1),
        ),
        shared=(PeftShared("vblora_vector_bank", "bank"),),
        only={"save_only_topk_weights": False},
        own_biases="vblora_only",
        fan_in_fan_out=True,
        holds=lambda method, site: site.in_size % method.vector_length == site.out_size % method.vector_length == 0,
    )

    # Published scripts train the logits at 1e-2 and the bank at 1e-3; not verified in the paper, and no run here chose it.
    recipe: ClassVar[Recipe] = Recipe(rank=4, learning_rate=1e-2)

    def __post_init__(self) -> None:
        counts = ("rank", "num_vectors", "vector_length", "topk")
        bounds = {"bank_bound": POSITIVE, "logits_deviation": NOT_NEGATIVE}
        check_hyperparameters(self, bounds={**dict.fromkeys(counts, integer(1)), **bounds}, of=VBLoRA)
        if self.topk > self.num_vectors:
            raise ValueError(f"VBLoRA's topk ({self.topk}) is above the number of vectors ({self.num_vectors})")

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The logits' stretches are no inputs or outputs: a cut of the matrix need not fall between two of them."""
        return {"la": ("", "rank", ""), "lb": ("rank", "", "")}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """The bank."""
        return ("bank",)

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Start:
        """The bank, uniform within `bank_bound`."""
        dtype = shared_dtype(sites)
        shape = (self.num_vectors, self.vector_length)
        return Start({"bank": jax.random.uniform(key, shape, dtype, -self.bank_bound, self.bank_bound)})

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """The logits, normal."""
        rows, columns = (-(-size // self.vector_length) for size in w.shape)
        shapes = {"la": (rows, self.rank, self.num_vectors), "lb": (self.rank, columns, self.num_vectors)}
        drawn = {
            name: self.logits_deviation * jax.random.normal(each, shape, trained_dtype(w))
            for each, (name, shape) in zip(jax.random.split(key), shapes.items())
        }
        return Start(drawn)

    def factors(self, view: View) -> Factors:
        """The stretches one after another, cut to the matrix's sides."""
        rows, columns = view.w.shape
        la, lb = (self._mixed(view.params[name], view.shared["bank"]) for name in ("la", "lb"))
        a = jnp.swapaxes(la, 1, 2).reshape(-1, self.rank)[:rows]
        return Factors(a, lb.reshape(self.rank, -1)[:, :columns], dropout=self.dropout)

    def _mixed(self, logits: jax.Array, bank: jax.Array) -> jax.Array:
        """The mixtures `[..., vector_length]` that logits `[..., num_vectors]` choose."""
        largest, chosen = jax.lax.top_k(logits, self.topk)
        return jnp.einsum("...k,...kl->...l", jax.nn.softmax(largest), bank.astype(logits.dtype)[chosen])

    def weight(self, view: View) -> jax.Array:
        """`w + a @ b`."""
        return self.factors(view).weight(view.w)

    def labels(self, site: Site) -> dict[str, str]:
        """Both sides' logits alike: neither starts at zero."""
        return {"la": "a", "lb": "a"}

    def shared_rates(self) -> dict[str, float]:
        """The bank moves every matrix, and learns at a tenth of the logits' rate."""
        return {"bank": 0.1}


VBLoRA.CASES = (VBLoRA(rank=4, num_vectors=12, vector_length=4), VBLoRA(2, 5, 3, topk=3, bank_bound=0.5, dropout=0.25))
