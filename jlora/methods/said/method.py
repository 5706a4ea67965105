"""SAID: all weights are moved along a few random directions, by one trained vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.methods.lora import shared_dtype, trained_dtype
from jlora.methods.said.fastfood import constants, fastfood, padded


@dataclass(frozen=True)
class SAID(Method):
    """Structure-aware intrinsic dimension: `w + scale * P @ theta`, one trained `theta` for all matrices, `P` fixed and random.

    `P` is a Fastfood map, another one for each matrix: `P @ theta` has the entries of the matrix, row by row, and on average
    the norm of `theta`. With `structure_aware=False` (DID, the plain form) there is no `scale`, else one trained number a
    matrix, which is taken out of the budget. `theta` starts at zero and `scale` at one, so the start is the base's output.

    Trains `1 if structure_aware else 0` values a matrix. Shares `dimension - matrices if structure_aware else dimension`
    trained values. An adapter is these, and a 32-bit seed a matrix.

    The measure of a task's difficulty: the smallest `dimension` with which training reaches 90 % of what it reaches with all
    weights. As an adapter the smallest of all, and slow: a step makes each map anew, a few passes over arrays of the matrix's
    size, padded to a power of two. Merges, but has no smaller form: servers of LoRA can't take it.

    Args:
        dimension: trained values in all.
        structure_aware: whether each matrix has its scale.

    Raises:
        ValueError: for a hyperparameter out of range, fewer dimensions than matrices, or a matrix that is smaller than
            `dimension` even when padded.

    Example:
        >>> jlora.adapterize(params, {r".*/kernel": jlora.SAID(200)})

    Reference:
        Aghajanyan et al. 2020, arXiv:2012.13255; the map of each matrix as in the code of Compacter (Mahabadi et al. 2021,
        arXiv:2106.04647), whose gradients are wrong by a factor that differs between matrices: its learning rates don't
        carry over. The paper speaks of one map to all weights.
    """

    dimension: int = 1000
    structure_aware: bool = True

    family: ClassVar[str] = "Shared tensors"

    # So few values want a high rate: that of Compacter's run, where Adam hides the wrong size of the gradients.
    recipe: ClassVar[Recipe] = Recipe(rank=0, learning_rate=3e-2)

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("dimension",))

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """One number each."""
        return {"scale": (), "seed": ()} if self.structure_aware else {"seed": ()}

    @property
    def alike(self) -> frozenset[str]:
        """Scales are one."""
        return frozenset({"scale"} if self.structure_aware else ())

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """The vector."""
        return ("theta",)

    def check(self, site: Site) -> None:
        """Refuses a matrix with fewer entries than dimensions."""
        size = padded(site.in_size * site.out_size)
        if self.dimension > size:
            raise ValueError(
                f"dimension {self.dimension} is above {size}, to which the entries of the {site.in_size} x {site.out_size} "
                "matrix are padded; take a smaller one, or leave the leaf out"
            )

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Start:
        """`theta`, zero.

        Raises:
            ValueError: for fewer dimensions than matrices.
        """
        matrices = sum(math.prod(site.batch_shape) for site in sites) if self.structure_aware else 0
        if matrices >= self.dimension:
            raise ValueError(
                f"dimension {self.dimension} leaves nothing to share beside a scale for each of the {matrices} matrices; "
                "take a larger one, or structure_aware=False"
            )
        return Start({"theta": jnp.zeros(self.dimension - matrices, shared_dtype(sites))})

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """A scale of one, and the seed of the map."""
        scale = {"scale": jnp.ones((), trained_dtype(w))} if self.structure_aware else {}
        return Start(scale, {"seed": jax.random.bits(key, (), jnp.uint32)})

    def weight(self, view: View) -> jax.Array:
        """`w + scale * P @ theta`."""
        theta, w = view.shared["theta"], view.w
        update = fastfood(theta, *constants(view.frozen["seed"], padded(w.size), theta.dtype), w.size).reshape(w.shape)
        if self.structure_aware:
            update = update * view.params["scale"].astype(update.dtype)
        return w.astype(update.dtype) + update

    def labels(self, site: Site) -> dict[str, str]:
        """A scale is no factor of a product, and never decays."""
        return {"scale": "vector"} if self.structure_aware else {}


SAID.CASES = (SAID(20), SAID(12, structure_aware=False))
