"""BOFT: the input rotated by a product of sparse factors, as in a butterfly network, and the outputs scaled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import trained_dtype
from jlora.methods.oft.method import cayley, check_block, check_inputs, side_of, turned


@dataclass(frozen=True)
class BOFT(Method):
    """Orthogonal butterfly fine-tuning: `(b_m ... b_2 b_1 w) * s`, each `b` of orthogonal blocks after a change of places.

    The blocks of `b_1` lie on the diagonal; those of a later `b_j` join halves of blocks among `2**(j - 1)` neighbours, so that
    factors together mix what no one of them does. A block is `(i - q) (i + q)⁻¹` with the skew-symmetric `q = (r - r.T) / 2`,
    `r` trained. `r` starts at zero and `s [out]` at 1, so the start is the base's output. A bias is not scaled. Trains
    `depth * in * (block or in // blocks) + out` values a matrix; of `r` only the skew-symmetric half counts.

    Worth trying where OFT's blocks should reach further for the same number of values. Costs `depth` products with small
    blocks, and one inverse of each of these in every step.

    Args:
        block: side of the blocks; must divide the inputs of every matrix. 0 where `blocks` is given.
        blocks: number of blocks of every matrix instead; must divide its inputs. 0 where `block` is given.
        depth: number of factors, `m`; above 1 blocks must be even, and `2**(m - 1)` of them must divide the inputs. PEFT
            without its CUDA extension has one factor, whatever its configuration says.

    Raises:
        ValueError: for a hyperparameter out of range, both or none of `block` and `blocks`, and (by `adapterize`) inputs that
            they don't divide.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.BOFT(block=8, depth=2)})

    Reference:
        Liu et al. 2023, arXiv:2311.06243; formula and defaults as in PEFT.
    """

    block: int = 4
    blocks: int = 0
    depth: int = 1

    family: ClassVar[str] = "Rotations and scales"
    local: ClassVar[frozenset[str]] = frozenset({"out"})
    recipe: ClassVar[Recipe] = Recipe(rank=0)

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "BOFT",
        tensors=(PeftTensor("boft_R", "r"), PeftTensor("boft_s", "s", "column")),
        settings=(
            PeftSetting("boft_block_size", "block", 4),
            PeftSetting("boft_block_num", "blocks", 0),
            PeftSetting("boft_n_butterfly_factor", "depth", 1),
        ),
        training=("boft_dropout",),
        own_biases="boft_only",
        fan_in_fan_out=True,
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("depth",))
        check_block(self)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"r": ("", "", "", ""), "s": ("out",)}

    def check(self, site: Site) -> None:
        """Refuses a matrix whose inputs the blocks don't divide."""
        check_inputs(self, site, self.depth)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`r` zero, `s` one."""
        side, dtype = side_of(self, w.shape[0]), trained_dtype(w)
        r = jnp.zeros((self.depth, w.shape[0] // side, side, side), dtype)
        return Start({"r": r, "s": jnp.ones(w.shape[1], dtype)})

    def changes(self, view: View) -> jax.Array:
        """What the blocks of all factors add to the identity, `[depth, blocks, block, block]`."""
        r = view.params["r"]
        return cayley((r - jnp.swapaxes(r, -1, -2)) / 2)

    def weight(self, view: View) -> jax.Array:
        """`(b_m ... b_1 w) * s`, by the transposed blocks on the rows of `w.T`, the first factor first."""
        changes = self.changes(view)
        turns = enumerate(jnp.swapaxes(changes, -1, -2))
        w = view.w.astype(changes.dtype).T
        for number, change in turns:
            w = _factor(w, change, number)
        return w.T * view.params["s"]

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """`((x @ b_m ... b_1) @ w) * s`."""
        changes, s = self.changes(view), view.params["s"]
        x = x.astype(changes.dtype)
        for number in reversed(range(self.depth)):
            x = _factor(x, changes[number], number)
        return product(x).astype(s.dtype) * s


def _factor(x: jax.Array, change: jax.Array, number: int) -> jax.Array:
    """`x [..., in] @ b` with the factor of a number, counted from 0.

    Of `2**number` neighbouring blocks the halves are taken in turns from the front and from the middle.
    """
    halves = (2, 2**number, change.shape[-1] // 2)
    if number == 0:
        return turned(x, change)
    places = x.reshape(*x.shape[:-1], -1, *halves)
    mixed = turned(jnp.swapaxes(places, -3, -2).reshape(x.shape), change)
    back = mixed.reshape(*x.shape[:-1], -1, halves[1], 2, halves[2])
    return jnp.swapaxes(back, -3, -2).reshape(x.shape)


BOFT.CASES = (BOFT(block=4), BOFT(block=2, depth=2))
