"""IA3: a trained scale of every output, or of every input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import trained_dtype


@dataclass(frozen=True)
class IA3(Method):
    """Inhibits and amplifies: `w * l` with a scale for each output, which its bias has too, or `l * w` with one for each input.

    The paper scales the outputs of keys and values and the inputs of the last product of a feed-forward block. All scales start
    at 1, so the start is the base's output. Trains `out if side == "output" else in` values a matrix.

    Worth trying where there are few examples, or where a task may cost no more than some vectors; learns less than LoRA where
    there is much to learn. Costs next to nothing: a multiplication for each output, or input.

    Args:
        side: "output" or "input".

    Raises:
        ValueError: for another side.

    Example:
        >>> jlora.adapterize(params, {r".*/v_proj/kernel": jlora.IA3(), "out/kernel": jlora.IA3("input")})

    Reference:
        Liu et al. 2022, arXiv:2205.05638; formula and start as in PEFT.
    """

    side: str = "output"

    family: ClassVar[str] = "Rotations and scales"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})
    # The rate of PEFT's comparison of methods, in which LoRA has 1e-4.
    recipe: ClassVar[Recipe] = Recipe(rank=0, learning_rate=5e-3)

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "IA3",
        tensors=(
            PeftTensor("ia3_l", "l", "column", when=lambda method: method.side == "output"),
            PeftTensor("ia3_l", "l", "row", when=lambda method: method.side == "input"),
        ),
        settings=(PeftSetting("feedforward_modules", "side", "output", listed="input"),),
        unused=("init_ia3_weights",),
        fan_in_fan_out=True,
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self, bounds={"side": one_of(("output", "input"))})

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        """A scale of the outputs is one of what is added to them, too."""
        return ("bias",) if self.side == "output" else ()

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"l": ("out",) if self.side == "output" else ("in",)}

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Ones."""
        return Start({"l": jnp.ones(w.shape[1 if self.side == "output" else 0], trained_dtype(w))})

    def weight(self, view: View) -> jax.Array:
        """`w * l`, column by column or row by row."""
        scale = view.params["l"]
        return view.w.astype(scale.dtype) * (scale if self.side == "output" else scale[:, None])

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """`(x @ w) * l`, or `(x * l) @ w`."""
        scale = view.params["l"]
        if self.side == "input":
            return product(x.astype(scale.dtype) * scale)
        return product(x).astype(scale.dtype) * scale

    def merged_beside(self, view: View) -> Arrays:
        """The bias times `l`."""
        return {name: leaf.astype(view.params["l"].dtype) * view.params["l"] for name, leaf in view.beside.items()}


IA3.CASES = (IA3(), IA3("input"))
