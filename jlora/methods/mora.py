"""MoRA: one square matrix between a compression and a decompression that have no values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.added import Added
from jlora.core.products.contraction import drop
from jlora.core.protocol.hyperparameters import check_hyperparameters, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.methods.lora import trained_dtype

#: The authors' numbers of the ways to compress and decompress; 5 is none of them.
TYPES = (1, 2, 3, 4, 6)
_ROTARY = 6


@dataclass(frozen=True)
class MoRA(Method):
    """High-rank updating by one square matrix `m [r, r]`: `w + c @ m @ d`, or rotated copies of `m` down the diagonal (type 6).

    `r = sqrt((in + out) * rank)`, rounded: as many values as LoRA of that `rank` has, in an update of rank `r`, or with type 6
    of up to full rank. `c [in, r]` and `d [r, out]` hold zeros and ones: which inputs meet in an entry of `x @ c`, and where an
    entry of `x @ c @ m` goes, is the authors' `mora_type`. `m` starts at zero, so the start is the base's output; there is no
    scale. Trains `number(in, out)` values.

    Worth trying where new knowledge has to be stored, such as in continued pretraining. ReMoRA is
    `jlora.merge` and a new MoRA of another type every few thousand steps. The matrix lies whole on every device of a mesh.

    Args:
        rank: LoRA's rank with the same number of values.
        mora_type: 1: inputs `i` with equal `i % r` are added up, output `o` is entry `o % r`; the last inputs are filled up to
            a multiple of `r` with the first, which then count twice. 2: `r` groups of neighbours, the first of them longer
            by one where `r` does not divide. 3: inputs as in 2, outputs as in 1. 4: inputs as in 1, outputs as in 2. 6:
            inputs in blocks of `r`, filled up as in 1, each rotated by its number as rotary embeddings rotate (base
            10,000), through the same `m` and one after the other, cut off or repeated to the length of the output: of a
            matrix with more inputs than outputs, what the cut-off blocks hold is not used. The authors take 6 for small
            ranks, 1 or 2 for large ones.
        dropout: probability of dropping an entry of the update's input, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.MoRA(rank=8)})

    Reference:
        Jiang et al. 2024, arXiv:2405.12130; sizes and types as in the authors' code.
    """

    rank: int = 8
    mora_type: int = 6
    dropout: float = 0.0

    family: ClassVar[str] = "Structured updates"
    form: ClassVar[type[Added]] = Added
    recipe: ClassVar[Recipe] = Recipe(rank=8, rank_means="LoRA's rank with the same number of values")

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), {"mora_type": one_of(TYPES)})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Neither side of the matrix: every entry of `m` serves inputs and outputs from all over them."""
        return {"m": ("", "")}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    def side(self, rows: int, columns: int) -> int:
        """`r`, of a matrix `[rows, columns]`."""
        size = int(math.sqrt((rows + columns) * self.rank) + 0.5)
        return size // 2 * 2 if self.mora_type == _ROTARY else size

    def number(self, rows: int, columns: int) -> int:
        """Values of a matrix `[rows, columns]`."""
        return self.side(rows, columns) ** 2

    def check(self, site: Site) -> None:
        """Refuses a rank for which `m` would be larger than the matrix, or empty."""
        size, sides = self.side(site.in_size, site.out_size), (site.in_size, site.out_size)
        if not 0 < size <= min(sides):
            most = min(sides) ** 2 // sum(sides)
            raise ValueError(
                f"rank {self.rank} makes a square matrix of {size} for the {sides[0]} x {sides[1]} matrix, whose smaller side "
                f"is {min(sides)}; use {f'a rank of {most} or less' if most else 'another method'}"
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`m` zero."""
        size = self.side(*w.shape)
        return Start({"m": jnp.zeros((size, size), trained_dtype(w))})

    def labels(self, site: Site) -> dict[str, str]:
        """`m` learns as LoRA's B, which starts at zero too."""
        return {"m": "b"}

    def weight(self, view: View) -> jax.Array:
        """`w + c @ m @ d`."""
        m = view.params["m"]
        rows, columns = view.w.shape
        return view.w.astype(m.dtype) + self._update(jnp.eye(rows, dtype=m.dtype), m, columns)

    def update(self, view: View) -> Added:
        """Formed for the input, cut into pieces for the gradients of its own arrays."""
        return Added(view)

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """The base's product and `x @ c @ m @ d`, of sums and copies alone beside the product with `m`."""
        y = product(x)
        return y + self._update(drop(x, self.dropout, view.key), view.params["m"], y.shape[-1]).astype(y.dtype)

    def _update(self, x: jax.Array, m: jax.Array, columns: int) -> jax.Array:
        size = m.shape[0]
        if self.mora_type == _ROTARY:
            count = min(-(-x.shape[-1] // size), -(-columns // size))  # blocks behind these are cut off
            turned, filled = _rotated(m, count).astype(x.dtype), _filled(x, size)
            # Cut by one split, whose transpose is one concatenation; side by side the blocks would have to be moved apart.
            *parts, _ = jax.lax.split(
                filled, (size,) * count + (filled.shape[-1] - count * size,), axis=filled.ndim - 1
            )
            return _repeated(jnp.concatenate([part @ turned[n] for n, part in enumerate(parts)], axis=-1), columns)
        m = m.astype(x.dtype)
        z = _blocks(x, size).sum(-2) if self.mora_type in (1, 4) else _sums_of_neighbours(x, size)
        return _repeated(z @ m, columns) if self.mora_type in (1, 3) else _spread(z @ m, columns)


def _filled(x: jax.Array, size: int) -> jax.Array:
    """`x [..., n]`, filled up with its first entries to a multiple of `size`."""
    missing = -x.shape[-1] % size
    return jnp.concatenate([x, x[..., :missing]], axis=-1) if missing else x


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """The same as `[..., blocks, size]`."""
    return _filled(x, size).reshape(*x.shape[:-1], -1, size)


def _rotated(m: jax.Array, count: int) -> jax.Array:
    """`[count, size, size]`: `m` behind the rotation of each block, so that it is `m` that is rotated, and not the input.

    Block `i` is rotated by `i * 10000 ** (-2 j / size)` in the plane of its entries `j` and `j + size / 2`.
    """
    number, plane = jnp.arange(count, dtype=jnp.float32), jnp.arange(0, len(m), 2, dtype=jnp.float32)
    angle = number[:, None] * 10000.0 ** (-plane / len(m))
    cos, sin = (f(angle).astype(m.dtype)[:, :, None] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(m, 2)
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=1)


def _repeated(z: jax.Array, columns: int) -> jax.Array:
    """`z` one after the other to `columns` entries, or cut off."""
    return jnp.concatenate([z] * -(-columns // z.shape[-1]), axis=-1)[..., :columns]


def _neighbours(length: int, size: int) -> tuple[int, int, int]:
    """Groups of `length` entries in `size` groups: how many are longer, their size, and that of the others."""
    shorter, longer = divmod(length, size)
    return longer, shorter + 1, shorter


def _sums_of_neighbours(x: jax.Array, size: int) -> jax.Array:
    longer, more, fewer = _neighbours(x.shape[-1], size)
    first, rest = x[..., : longer * more], x[..., longer * more :]
    sums = [part.reshape(*x.shape[:-1], -1, n).sum(-1) for part, n in ((first, more), (rest, fewer)) if part.shape[-1]]
    return jnp.concatenate(sums, axis=-1)


def _spread(z: jax.Array, columns: int) -> jax.Array:
    longer, more, fewer = _neighbours(columns, z.shape[-1])
    return jnp.concatenate([jnp.repeat(z[..., :longer], more, -1), jnp.repeat(z[..., longer:], fewer, -1)], axis=-1)


MoRA.CASES = (MoRA(rank=1), MoRA(rank=1, mora_type=3, dropout=0.25))
