"""TensorTrain: a matrix product operator, whose central core layers may share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlora.core.products.trains import contracted
from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.hyperparameters import check_hyperparameters, integer
from jlora.stored.compressed import factoring


@dataclass(frozen=True)
class TensorTrain(Code):
    """A matrix product operator: `w` is about the product of a chain of cores `[bond, row digit, column digit, bond]`.

    The chain is `t0`, .., `central`, .., the last `t`, with `depth` cores on each side of the central one. Rows and columns are
    numbered by digits as in `jlora.MPO`: `depth` of base `mode`, one of base `ceil(size / mode^(2 depth))`, and `depth` of base
    `mode` again; an entry is the product of the matrices that its digits choose, and rows and columns beyond the matrix are
    cut off. A bond is as long as both sides of it have entries, and at most `bond`: from `mode^(2 depth)` on the form is exact.
    The outer cores are orthonormal, and found by singular value decompositions from both ends. The squared error is at most
    the sum over the bonds of the squared singular values that were left out there.

    With `share` the central core, by far the largest, is that of all layers of a leaf, the other cores each layer's own. The
    bonds of each layer are then turned so that the central cores come together, and their mean is kept: `sweeps` times the
    nearest turns for the mean, and the mean for the turns, beginning with the first layer's core. No sweep makes the error
    larger. Layers that are alike lose nothing. The paper begins with a model whose layers are equal, and trains; of a
    pretrained model with layers of its own little is left.

    Args:
        bond: the largest length of a bond.
        mode: size of an outer core's digits; 4 in the paper, nearly everywhere.
        depth: outer cores on each side; 2 in the paper.
        share: whether layers have one central core.
        sweeps: of the search for it.
        dtype: of what is kept: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: for a hyperparameter out of range, a matrix with a side below `mode^(2 depth)`, or layers of several sizes.

    Example:
        >>> base = jlora.quantize(params, {r".*/q_proj/kernel": jlora.TensorTrain(bond=3, mode=2, depth=1)})

    Reference:
        Liu et al. 2023, arXiv:2303.16753; what a chain of cores means as in its code. Oseledets 2011 for the bound.
    """

    bond: int = 64
    mode: int = 4
    depth: int = 2
    share: bool = False
    sweeps: int = 10
    dtype: str = "float32"

    def __post_init__(self) -> None:
        bounds = {"bond": integer(1), "mode": integer(2), "depth": integer(1), "sweeps": integer(0)}
        check_hyperparameters(self, bounds={**bounds, "dtype": factoring.DTYPE})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Digits are no whole rows or columns."""
        return dict.fromkeys(self.names, ("",) * 4)

    @property
    def trained(self) -> frozenset[str]:
        """All."""
        return frozenset(self.axes)

    @property
    def names(self) -> list[str]:
        """The cores in their order."""
        own = [f"t{place}" for place in range(2 * self.depth)]
        return [*own[: self.depth], "central", *own[self.depth :]]

    @property
    def local(self) -> frozenset[str]:
        """Nowhere."""
        return frozenset()

    @property
    def over(self) -> str:
        """With `share` the layers."""
        return "layers" if self.share else ""

    @property
    def common(self) -> frozenset[str]:
        """With `share` the central core."""
        return frozenset({"central"} if self.share else ())

    def check(self, rows: int, columns: int) -> None:
        """Refuses matrices whose digits would number more than they have."""
        least = self.mode ** (2 * self.depth)
        if min(rows, columns) < least:
            raise ValueError(
                f"the {rows} x {columns} matrix has a side below {least}, the rows that the outer cores of mode {self.mode} "
                f"and depth {self.depth} number; take smaller ones, or leave it out of the spec"
            )

    def check_group(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Refuses layers of several sizes."""
        if len(found := sorted(set(sizes))) > 1:
            raise ValueError(f"layers with one central core must have one size, got {found}")

    def encode(self, w: jax.Array) -> Arrays:
        """Orthonormal cores from both ends, and what is left between."""
        left, middle, right = self._split(w)
        cores = [*left, middle, *right]
        return factoring.kept(dict(zip(self.names, cores, strict=True)), self.dtype)

    def encode_together(self, matrices: Sequence[jax.Array]) -> list[Arrays]:
        """The same with turned bonds and the mean of what is left between."""
        if not self.share:
            return [self.encode(w) for w in matrices]
        split = [self._split(w) for w in matrices]
        before, mean, after = _aligned(jnp.stack([middle for _, middle, _ in split]), self.sweeps)
        found = []
        for turn, back, (left, _, right) in zip(before, after, split, strict=True):
            left = [*left[:-1], jnp.einsum("aijb,bc->aijc", left[-1], turn, precision="highest")]
            right = [jnp.einsum("ab,bijc->aijc", back.T, right[0], precision="highest"), *right[1:]]
            found.append(factoring.kept(dict(zip(self.names, [*left, mean, *right], strict=True)), self.dtype))
        return found

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """The matrix that the cores make."""
        return contracted([fields[name].astype(jnp.float32) for name in self.names])[:rows, :columns]

    def _split(self, w: jax.Array) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
        """Left cores, the central one and right cores of a matrix."""
        outer = self.mode**self.depth
        sizes = [-(-size // outer**2) for size in w.shape]
        padded = jnp.pad(w, [(0, size * outer**2 - own) for size, own in zip(sizes, w.shape)])
        digits = [[self.mode] * self.depth + [size] + [self.mode] * self.depth for size in sizes]
        count = 2 * self.depth + 1
        order = [axis for place in range(count) for axis in (place, count + place)]
        x = padded.reshape(*digits[0], *digits[1]).transpose(order)
        left, x = self._cores(x.reshape(-1, sizes[0] * sizes[1] * self.mode ** (2 * self.depth)))
        # From the other end, so that its digits come first.
        ends = x.reshape(left[-1].shape[-1] * sizes[0] * sizes[1], *[self.mode**2] * self.depth)
        x = ends.transpose(range(self.depth, -1, -1)).reshape(-1, ends.shape[0])
        right, x = self._cores(x)
        middle = x.T.reshape(-1, *sizes, right[-1].shape[-1])
        return left, middle, [core.transpose(3, 1, 2, 0) for core in reversed(right)]

    def _cores(self, x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """`depth` orthonormal cores of an array whose first axis is their digits, and what is left, `[bond, ...]`."""
        cores: list[jax.Array] = []
        before = 1
        for _ in range(self.depth):
            x = x.reshape(before * self.mode**2, -1)
            length = min(self.bond, len(x))
            # A bond of full length needs no other basis.
            u = jnp.eye(length) if length == len(x) else factoring.truncated(x, length)[0]
            cores.append(u.reshape(before, self.mode, self.mode, length))
            x = jnp.matmul(u.T, x, precision="highest")
            before = length
        return cores, x


def _aligned(middles: jax.Array, sweeps: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns `g` and `h` `[layers, bond, bond]` of the bonds, and the mean nearest to all `g.T @ middle @ h`.

    Args:
        middles: `[layers, bond, rows, columns, bond]`.
        sweeps: how often each is found anew; without any there are no turns.
    """
    before, after = (jnp.broadcast_to(jnp.eye(side), (len(middles), side, side)) for side in middles.shape[1::3])
    if not sweeps:
        return before, jnp.mean(middles, 0), after

    def sweep(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mean, after = state[1:]
        before = _nearest(_turned("laijb,lbc->laijc", middles, after), mean)
        half = _turned("laijb,lac->lcijb", middles, before)
        after = _nearest(jnp.moveaxis(half, 4, 1), jnp.moveaxis(mean, 3, 0))
        return before, jnp.mean(_turned("laijb,lbc->laijc", half, after), 0), after

    return jax.lax.fori_loop(0, sweeps, sweep, (before, middles[0], after))


def _turned(how: str, x: jax.Array, turns: jax.Array) -> jax.Array:
    return jnp.einsum(how, x, turns, precision="highest")


def _nearest(x: jax.Array, wanted: jax.Array) -> jax.Array:
    """The turns `g [layers, bond, bond]` by which `g.T @ x` is nearest to what is wanted, along the bond that comes first."""
    met = jnp.einsum("laijb,cijb->lac", x, wanted, precision="highest")
    u, _, v = jnp.linalg.svd(met)
    return jnp.matmul(u, v, precision="highest")


TensorTrain.CASES = (TensorTrain(3, 2, 1), TensorTrain(4, 2, 1, share=True))
