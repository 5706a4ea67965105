"""OFT: the input rotated block by block before the product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.hyperparameters import POSITIVE, check_hyperparameters, instead, integer
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import trained_dtype
from jlora.methods.oft.rule import BoundedRotation, nearest

# What a rotation is made of is small; rounded to 10 bits, as GPUs do, a chain of products would not be orthogonal.
EXACT = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class OFT(Method):
    """Orthogonal fine-tuning: `r @ w` with `r` of orthogonal blocks on the diagonal, each made of a skew-symmetric `s`.

    Each row of `q` is what is above the diagonal of one `s`, row by row; `s = q - q.T`. By default a block is
    `i + 2 s + 2 s² + 2 s³ + s⁴`, which is nearly orthogonal for small `s` and needs no inverse. With `neumann=False` it is
    `(i - s) (i + s)⁻¹`, exactly orthogonal, and a rotation the other way: arrays trained with one setting mean another
    function under the other. `q` starts at zero, so the start is the base's output. Trains
    `(1 if block_share else blocks or in // block) * (block or in // blocks) * ((block or in // blocks) - 1) // 2` values a
    matrix.

    Worth trying where the angles between what neurons answer to should stay, as for images of a subject. Merges, but has no
    smaller form: servers of LoRA can't take it. Costs a product with the blocks, `block` multiply-adds for each input.

    Args:
        block: side of the blocks; must divide the inputs of every matrix. 0 where `blocks` is given.
        blocks: number of blocks of every matrix instead; must divide its inputs. 0 where `block` is given.
        neumann: whether blocks are a series, or exact.
        terms: number of terms of the series, the last one without its factor of 2. As in PEFT, 3 means the same as 4.
        block_share: whether all blocks of a matrix are the same one.
        coft: whether rotations are bounded: each block's `s` has a Frobenius norm of at most `eps / sqrt(rows of q)`. It is
            scaled down to that before it is used, and (by `jlora.optimizer` and `jlora.with_rules`) after every step.
        eps: the bound, where `coft` is set. PEFT's default leaves next to nothing to learn.

    Raises:
        ValueError: for a hyperparameter out of range, both or none of `block` and `blocks`, and (by `adapterize`) inputs that
            they don't divide.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.OFT(block=16)})

    Reference:
        Qiu et al. 2023, arXiv:2306.07280; the rotated input and the series: Qiu et al. 2025, arXiv:2506.19847. Formula and
        defaults as in PEFT.
    """

    block: int = 32
    blocks: int = 0
    neumann: bool = True
    terms: int = 5
    block_share: bool = False
    coft: bool = False
    eps: float = 6e-5

    family: ClassVar[str] = "Rotations and scales"
    local: ClassVar[frozenset[str]] = frozenset({"out"})
    recipe: ClassVar[Recipe] = Recipe(rank=0)

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "OFT",
        tensors=(PeftTensor("oft_R.weight", "q"),),
        settings=(
            PeftSetting("oft_block_size", "block", 32),
            PeftSetting("r", "blocks", 0),
            PeftSetting("use_cayley_neumann", "neumann", True),
            PeftSetting("num_cayley_neumann_terms", "terms", 5),
            PeftSetting("block_share", "block_share", False),
            PeftSetting("coft", "coft", False),
            PeftSetting("eps", "eps", 6e-5),
        ),
        changed=("use_cayley_neumann", "0.18.0"),
        training=("module_dropout",),
        own_biases="oft_only",
        fan_in_fan_out=True,
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self, bounds={"terms": integer(2), "eps": POSITIVE})
        check_block(self)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"q": ("", "")}

    @property
    def optimizer_rule(self) -> BoundedRotation | None:
        """The bound, after every step."""
        return BoundedRotation(self.eps) if self.coft else None

    def check(self, site: Site) -> None:
        """Refuses a matrix whose inputs the blocks don't divide."""
        check_inputs(self, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Zero."""
        side = side_of(self, w.shape[0])
        number = 1 if self.block_share else w.shape[0] // side
        return Start({"q": jnp.zeros((number, side * (side - 1) // 2), trained_dtype(w))})

    def turns(self, view: View) -> jax.Array:
        """What each block adds to the identity, `[blocks, block, block]`."""
        side, q = side_of(self, view.w.shape[0]), view.params["q"]
        if self.coft:  # the gradient is that of the bounded value, as it is where the value itself is bounded
            q += jax.lax.stop_gradient(nearest(jax.lax.stop_gradient(q), self.eps) - q)
        s = skew(q, side)
        change = neumann(s, self.terms) if self.neumann else cayley(s)
        return jnp.broadcast_to(change, (view.w.shape[0] // side, side, side))

    def weight(self, view: View) -> jax.Array:
        """`r @ w`, block by block."""
        change = self.turns(view)
        return turned(view.w.astype(change.dtype).T, jnp.swapaxes(change, -1, -2)).T

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """`(x @ r) @ w`, with the blocks of `r` on the parts of `x`."""
        change = self.turns(view)
        return product(turned(x.astype(change.dtype), change))


def turned(x: jax.Array, change: jax.Array) -> jax.Array:
    """`x [..., in]` times `1 + change` on the diagonal, `change [blocks, block, block]`; `x` itself loses nothing."""
    parts = x.reshape(*x.shape[:-1], *change.shape[:2])
    return x + jnp.einsum("...kb,kbc->...kc", parts, change).reshape(x.shape)


def skew(q: jax.Array, side: int) -> jax.Array:
    """Skew-symmetric matrices `[..., side, side]` with `q [..., side * (side - 1) / 2]` above their diagonals, row by row."""
    index, sign = np.zeros((side, side), int), np.zeros((side, side), np.int8)
    above = np.triu_indices(side, 1)
    index[above], sign[above] = np.arange(q.shape[-1]), 1
    return jnp.take(q, index + index.T, axis=-1) * jnp.asarray(sign - sign.T, q.dtype)


def neumann(s: jax.Array, terms: int) -> jax.Array:
    """`2 s + 2 s² + ... + sⁿ`, with `n = terms - 1`: the series of `(i + s) (i - s)⁻¹`, without the identity."""
    total = 2 * s
    if terms > 2:
        power = s
        for _ in range(2, max(terms, 4) - 1):
            power = jnp.matmul(power, s, precision=EXACT)
            total += 2 * power
        total += jnp.matmul(power, s, precision=EXACT)
    return total


def cayley(s: jax.Array) -> jax.Array:
    """`(i - s) (i + s)⁻¹` without the identity, which is `-2 (i + s)⁻¹ s`: so small rotations are not rounded beside it."""
    return -2 * jnp.linalg.solve(jnp.eye(s.shape[-1], dtype=s.dtype) + s, s)


def side_of(method: Any, inputs: int) -> int:
    """The side of the blocks of a matrix, for a method with the hyperparameters `block` and `blocks`."""
    return method.block or inputs // method.blocks


def check_block(method: Any) -> None:
    """Refuses hyperparameters `block` and `blocks` of which not exactly one says something.

    Raises:
        ValueError: naming the method.
    """
    check_hyperparameters(method, bounds={"block": integer(0), "blocks": integer(0)})
    if bool(method.block) == bool(method.blocks):
        raise ValueError(
            f"{type(method).__name__} takes either block, the side of its blocks, or blocks, their number, and 0 for the "
            f"other; got block={method.block} and blocks={method.blocks}"
        )


def check_inputs(method: Any, site: Site, factors: int = 1) -> None:
    """Refuses a matrix that blocks, or pairs of their halves in further factors, don't divide the inputs of.

    Raises:
        ValueError: naming what does.
    """
    inputs, pairs = site.in_size, 2 ** (factors - 1)
    sides = [side for side in range(2, inputs + 1) if not inputs % (side * pairs) and (pairs == 1 or not side % 2)]
    name, value = ("block", method.block) if method.block else ("blocks", method.blocks)
    choices = sides if method.block else [inputs // side for side in reversed(sides)]
    if value in choices:
        return
    wanted = "divide" if pairs == 1 else f"give {factors} factors of an even side that divide"
    raise ValueError(
        f"{name} {value} must {wanted} the {inputs} inputs of the {inputs} x {site.out_size} matrix; "
        f"{instead(value, choices)}"
    )


OFT.CASES = (OFT(block=4), OFT(block=0, blocks=2, neumann=False, block_share=True))
