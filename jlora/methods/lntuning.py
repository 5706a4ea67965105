"""LN tuning: the scales and shifts of normalization layers are trained, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jlora.core.protocol.job import Recipe
from jlora.core.protocol.peft import PeftKind, PeftTensor
from jlora.methods.full import Full


@dataclass(frozen=True)
class LNTuning(Full):
    """Layer normalization tuning: `Full` on the scales and shifts of normalization layers, as PEFT knows it.

    Trains `in * out` values of a matrix; of a norm's vector, all its entries. Worth trying where a few thousand have to do.
    Merging puts the trained leaves into the params. A leaf beside a trained one, such as a norm's shift, goes to PEFT as it is.

    Example:
        >>> spec = {r".*[nN]orm/(scale|bias)": jlora.LNTuning()}

    Reference:
        Zhao et al. 2023, arXiv:2312.11420.
    """

    family: ClassVar[str] = "Trained leaves and rows"
    # A tenth of the adapters', as for any trained leaf.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=5e-5, targets=r".*[nN]orm.*/(scale|bias)")

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "LN_TUNING", tensors=(PeftTensor("ln_tuning_layers.weight", "w"), PeftTensor("ln_tuning_layers.bias", "w"))
    )


LNTuning.CASES = (LNTuning(),)
