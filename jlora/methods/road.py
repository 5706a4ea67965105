"""RoAd: pairs of outputs rotated and scaled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, instead, number, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import trained_dtype

VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass(frozen=True)
class RoAd(Method):
    """Two-dimensional rotary adaptation: `w @ r`, where `r` turns pairs of outputs by `theta` and scales them by `alpha`.

    Outputs, with their bias, come in groups, and the first half of a group is paired with the second. A pair `(y1, y2)` becomes
    `(c1 y1 - s1 y2, s2 y1 + c2 y2)` with `c = alpha * cos(theta)` and `s = alpha * sin(theta)`. The variant "road_1" has an
    angle and a scale for a pair, "road_2" for each output, "road_4" for each `c` and each `s`. Angles start at 0 and scales
    at 1, so the start is the base's output. Trains `{"road_1": 1, "road_2": 2, "road_4": 4}[variant] * out` values a matrix.

    Worth trying where IA3 is too little: a task costs a few vectors, too, which may differ from row to row of a batch.
    Costs next to nothing: some multiplications for each output.

    Args:
        variant: "road_1", "road_2" or "road_4".
        group: outputs of a group, an even number; must divide the outputs of every matrix. It says which are pairs.

    Raises:
        ValueError: for a hyperparameter out of range, and (by `adapterize`) outputs that the groups don't divide.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.RoAd(group=16)})

    Reference:
        Liao and Monz 2024, arXiv:2409.00119; formula and defaults as in PEFT.
    """

    variant: str = "road_1"
    group: int = 64

    family: ClassVar[str] = "Rotations and scales"
    local: ClassVar[frozenset[str]] = frozenset({"in"})
    # The rate of PEFT's comparison of methods, in which LoRA has 1e-4.
    recipe: ClassVar[Recipe] = Recipe(rank=0, learning_rate=1e-3)

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "ROAD",
        tensors=(PeftTensor("road_theta", "theta"), PeftTensor("road_alpha", "alpha")),
        settings=(PeftSetting("variant", "variant", "road_1"), PeftSetting("group_size", "group", 64)),
    )
    beside: ClassVar[tuple[str, ...]] = ("bias",)

    def __post_init__(self) -> None:
        even = number(lambda v: isinstance(v, int) and v > 0 and v % 2 == 0, "a positive even number")
        check_hyperparameters(self, bounds={"variant": one_of(VARIANTS), "group": even})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """A value may be one of a pair of outputs, and so lies whole on every device of a mesh."""
        return {"theta": ("",), "alpha": ("",)}

    def check(self, site: Site) -> None:
        """Refuses a matrix whose outputs the groups don't divide."""
        outputs = site.out_size
        if outputs % self.group:
            fitting = [n for n in range(2, outputs + 1, 2) if outputs % n == 0]
            use = instead(self.group, fitting, "no even number does")
            raise ValueError(
                f"group {self.group} must divide the {outputs} outputs of the {site.in_size} x {outputs} matrix; {use}"
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Angles 0, scales 1."""
        shape, dtype = (w.shape[1] * VARIANTS[self.variant] // 2,), trained_dtype(w)
        return Start({"theta": jnp.zeros(shape, dtype), "alpha": jnp.ones(shape, dtype)})

    def turned(self, y: jax.Array, params: Arrays) -> jax.Array:
        """`y [..., out] @ r`."""
        half = self.group // 2
        theta, alpha = (self._by_output(params[name]) for name in ("theta", "alpha"))
        sign = jnp.asarray([[-1], [1]], theta.dtype)
        same, other = alpha[0] * jnp.cos(theta[0]), alpha[1] * jnp.sin(theta[1]) * sign
        pairs = y.astype(theta.dtype).reshape(*y.shape[:-1], -1, 2, half)
        return (pairs * same + jnp.flip(pairs, -2) * other).reshape(y.shape)

    def _by_output(self, values: jax.Array) -> jax.Array:
        """What multiplies an output itself, and the other one of its pair, `[2, groups, 2 or 1, half]`."""
        half = self.group // 2
        if self.variant == "road_4":
            return jnp.swapaxes(values.reshape(-1, 2, 2, half), 0, 1)
        one = values.reshape(-1, 1 if self.variant == "road_1" else 2, half)
        return jnp.stack([one, one])

    def weight(self, view: View) -> jax.Array:
        """`w @ r`."""
        return self.turned(view.w, view.params)

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """`(x @ w) @ r`."""
        return self.turned(product(x), view.params)

    def merged_beside(self, view: View) -> Arrays:
        """The bias, turned."""
        return {name: self.turned(leaf, view.params) for name, leaf in view.beside.items()}


RoAd.CASES = (RoAd(group=4), RoAd("road_4", group=2))
