"""C3A: an update of circulant blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import trained_dtype

INITS = ("zero", "xavier_uniform", "kaiming_uniform", "gaussian")


@dataclass(frozen=True)
class C3A(Method):
    """Circular convolution adaptation: `w + u / in` with `u` of circulant blocks, each given by one trained vector.

    The block of rows `n` and columns `m` has the entries `kernel[m, n, (row - column) % block]`, with the shape
    `[out / block, in / block, block]`: a product with it is a circular convolution. Trains `in * out // block` values a
    matrix, and the update may have full rank.

    Worth trying for updates of high rank with few values. Every step forms the update. Merges, but has no smaller form:
    servers of LoRA can't take it.

    Args:
        block: side of the blocks; must divide both sides of every matrix. PEFT advises the greatest common divisor of the
            sides of all matrices.
        init: "zero" starts at the base exactly. "xavier_uniform" (PEFT's default), "kaiming_uniform" and "gaussian" draw
            the kernel uniform within `sqrt(6 / (in + out))`, uniform within `1 / sqrt(in)`, or standard normal, as PEFT
            does: the start is not the base's output then.

    Raises:
        ValueError: for a hyperparameter out of range, or a block that does not divide both sides of a matrix.

    Reference:
        Chen et al. 2024, arXiv:2407.19342; formula and starts as in PEFT.
    """

    block: int = 256
    init: str = "zero"

    family: ClassVar[str] = "Structured updates"

    # The update is divided by `in`, which wants a rate far above LoRA's: that of PEFT's comparison of methods.
    recipe: ClassVar[Recipe] = Recipe(rank=0, learning_rate=0.3)

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "C3A",
        tensors=(PeftTensor("c3a_kernel", "kernel"),),
        settings=(PeftSetting("block_size", "block", 256, pattern="block_size_pattern"),),
        own_biases="c3a_only",
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("block",), {"init": one_of(INITS)})

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """Whether the start is the base's output."""
        return self.init == "zero"

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """A block is no slice of a side, so that the kernel lies whole on every device of a mesh."""
        return {"kernel": ("", "", "")}

    def check(self, site: Site) -> None:
        """Refuses a matrix of whose sides the block is no divisor."""
        sides = site.in_size, site.out_size
        if any(side % self.block for side in sides):
            raise ValueError(
                f"block {self.block} must divide both sides of the {sides[0]} x {sides[1]} matrix; use "
                f"{math.gcd(*sides)} or a divisor of it"
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """The kernel by `init`."""
        (rows, columns), dtype = w.shape, trained_dtype(w)
        shape = (columns // self.block, rows // self.block, self.block)
        if self.init == "gaussian":
            return Start({"kernel": jax.random.normal(key, shape, dtype)})
        bounds = {
            "zero": 0.0,
            "xavier_uniform": math.sqrt(6 / (rows + columns)),
            "kaiming_uniform": 1 / math.sqrt(rows),
        }
        bound = bounds[self.init]
        return Start({"kernel": jax.random.uniform(key, shape, dtype, -bound, bound)})

    def labels(self, site: Site) -> dict[str, str]:
        """The kernel learns as LoRA's B, which starts at zero too."""
        return {"kernel": "b"}

    def weight(self, view: View) -> jax.Array:
        """`w + u / in`."""
        blocks = circulant(view.params["kernel"])  # [out / block, in / block, block, block]
        update = jnp.transpose(blocks, (1, 2, 0, 3)).reshape(view.w.shape)
        return view.w.astype(update.dtype) + update / view.w.shape[0]


def circulant(first: jax.Array) -> jax.Array:
    """The matrices `[..., n, n]` with the entries `first[..., (row - column) % n]`."""
    # Repeated, and cut into lines one longer than its period, a vector moves on by one from line to line. So there is no
    # gather, whose gradient would be a scatter.
    n = first.shape[-1]
    lines = jnp.tile(first, n + 1).reshape(*first.shape[:-1], n, n + 1)
    return lines[..., :0:-1]


C3A.CASES = (C3A(4), C3A(2, init="xavier_uniform"))
