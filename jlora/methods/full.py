"""Full: the leaf itself is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View, default_label
from jlora.core.protocol.peft import Peft
from jlora.methods.lora import trained_dtype


@dataclass(frozen=True)
class Full(Method):
    """Trains the leaf itself: `w = params["w"]`, for heads, norms and biases, of any shape.

    Starts as the leaf, in float32 at least; the function sees it in the base's dtype. Trains `in * out` values of a matrix.

    Example:
        >>> jlora.adapterize(params, {r".*/bias": jlora.Full(), jlora.ALL_LINEAR: jlora.LoRA(8)}, sites=sites)

    Reference:
        Ordinary fine-tuning, of some leaves.
    """

    family: ClassVar[str] = "Trained leaves and rows"
    matrix: ClassVar[bool] = False
    restarts: ClassVar[bool] = False
    # A tenth of the adapters': what is moved is the pretrained weights themselves.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=5e-5, targets="all")

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """No roles: `w` has the leaf's own axes, and is sharded as the leaf is."""
        return {"w": ()}

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """A trained copy of the leaf."""
        return Start({"w": w.astype(trained_dtype(w))})

    def weight(self, view: View) -> jax.Array:
        return view.params["w"]

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft:
        """A trained module or bias of PEFT's."""
        return Peft("whole", {"w": params["w"]})

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s group of an array that is no factor, which depends on its number of axes."""
        return {"w": default_label(len(site.shape) - len(site.batch_axes))}


Full.CASES = (Full(),)
