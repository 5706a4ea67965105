"""MPO: a tensor train whose central core all layers share, as an update."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.trains import contracted
from jlora.core.protocol.hyperparameters import POSITIVE, check_hyperparameters, integer, one_of
from jlora.core.protocol.layers import kinds
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.methods.lora import shared_dtype, trained_dtype


@dataclass(frozen=True)
class MPO(Method):
    """Matrix product operator: `w + scale * t0 · ... · central · ... · tn`, a chain of cores whose central one layers share.

    Rows and columns are numbered by digits: `depth` of base `mode`, one of base `ceil(size / mode**(2 * depth))`, and `depth`
    of base `mode` again. A core `[bond, row digit, column digit, bond]` belongs to each place, and an entry of the update is
    the product of the matrices that its digits choose; rows and columns beyond the matrix are cut off. Between two cores the
    bond is as long as both sides have entries, and at most `bond`. The central core, by far the largest, is one for all leaves
    whose paths differ only in the number of their layer; the others are each matrix's own. The last core starts at zero, so
    the start is the base's output.

    Trains `2 * mode**2 * sum(map(lambda k: min(bond, mode**(2 * k)) * min(bond, mode**(2 * k + 2)), range(depth)))` values a
    matrix. Shares `0 if learn == "auxiliary" else kinds * min(bond, mode**(2 * depth))**2 * -(-in // mode**(2 * depth)) *
    -(-out // mode**(2 * depth))` trained values.

    The paper decomposes the weights themselves and so compresses the model; here the decomposed matrix is the update, and the
    base stays. Forms the weight in every pass. Worth trying on deep models, where one central core serves many layers.

    Args:
        bond: the largest length of a bond; `mode**(2 * depth)` and more cut nothing off.
        mode: size of an auxiliary core's digits; 4 in the paper, nearly everywhere.
        depth: auxiliary cores on each side; 2 in the paper.
        scale: factor of the update.
        learn: "all" cores, or the "auxiliary" ones alone, the paper's fine-tuning: then the central cores stay as drawn.

    Raises:
        ValueError: for a hyperparameter out of range, or a matrix with a side below `mode**(2 * depth)`.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|k|v|o)_proj/kernel": jlora.MPO(bond=8)})

    Reference:
        Liu et al. 2023, arXiv:2303.16753; what a chain of cores means as in its code. Starts are jlora's: the paper's cores
        come from decomposed weights.
    """

    bond: int = 8
    mode: int = 4
    depth: int = 1
    scale: float = 1.0
    learn: str = "all"

    family: ClassVar[str] = "Shared tensors"

    def __post_init__(self) -> None:
        bounds = {"mode": integer(2), "bond": integer(1), "depth": integer(1), "scale": POSITIVE}
        check_hyperparameters(self, bounds={**bounds, "learn": one_of(("all", "auxiliary"))}, of=MPO)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Those of the auxiliary cores, whose digits are no whole rows or columns, and of the number of the leaf's kind."""
        own = [k for k in range(2 * self.depth + 1) if k != self.depth]
        return {**{f"t{k}": ("",) * 4 for k in own}, "kind": ()}

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """The central cores of all kinds, one behind another."""
        return ("central",)

    def check(self, site: Site) -> None:
        """Refuses matrices most of whose auxiliary cores nothing would use."""
        least = self.mode ** (2 * self.depth)
        if min(site.in_size, site.out_size) < least:
            raise ValueError(
                f"the {site.in_size} x {site.out_size} matrix has a side below {least}, the rows that the auxiliary cores of "
                f"mode {self.mode} and depth {self.depth} number; take smaller ones"
            )

    def _length(self, place: int) -> int:
        """Of the bond before the core at a place."""
        return min(self.bond, self.mode ** (2 * min(place, 2 * self.depth + 1 - place)))

    def _middle(self, size: int) -> int:
        """The base of the digit in the middle of a side."""
        return -(-size // self.mode ** (2 * self.depth))

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Start:
        """`central [kinds, bond, rows, columns, bond]`, as large as the largest leaf needs."""
        rows, columns = (self._middle(max(sizes)) for sizes in zip(*((site.in_size, site.out_size) for site in sites)))
        left, right = self._length(self.depth), self._length(self.depth + 1)
        dtype = shared_dtype(sites)
        central = jax.random.normal(key, (kinds(sites)[1], left, rows, columns, right), dtype) / math.sqrt(left)
        return Start({"central": central}) if self.learn == "all" else Start({}, {"central": central})

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Auxiliary cores that keep the size of what they multiply; the first as LoRA's `a`, the last zero."""
        cores, dtype = {}, trained_dtype(w)
        for place in range(2 * self.depth + 1):
            if place == self.depth:
                continue
            shape = (self._length(place), self.mode, self.mode, self._length(place + 1))
            size = 1 / math.sqrt(w.shape[0] if place == 0 else shape[0])
            drawn = size * jax.random.normal(jax.random.fold_in(key, place), shape, dtype)
            cores[f"t{place}"] = drawn if place < 2 * self.depth else jnp.zeros(shape, dtype)
        return Start(cores, {"kind": jnp.zeros((), jnp.int32)})

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """The number of every leaf's kind."""
        return [
            replace(start, frozen={"kind": jnp.full(site.batch_shape, kind, jnp.int32)})
            for start, site, kind in zip(starts, sites, kinds(sites)[0], strict=True)
        ]

    def weight(self, view: View) -> jax.Array:
        """`w + scale * ...`, the cores multiplied from right to left."""
        rows, columns = view.w.shape
        central = _of_kind(view.shared["central"], view.frozen["kind"])
        central = central[:, : self._middle(rows), : self._middle(columns)]
        cores = [view.params.get(f"t{place}", central) for place in range(2 * self.depth + 1)]
        update = contracted(cores)[:rows, :columns]
        return view.w.astype(update.dtype) + self.scale * update

    def labels(self, site: Site) -> dict[str, str]:
        """The last core, which starts at zero, is LoRA's `b`."""
        last = f"t{2 * self.depth}"
        return {name: "b" if name == last else "a" for name in self.axes if name != "kind"}


@jax.custom_jvp
def _of_kind(central: jax.Array, kind: jax.Array) -> jax.Array:
    """`central[kind]`."""
    return central[kind]


@_of_kind.defjvp
def _of_kind_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """As a sum over the kinds: in its transpose the leaves' gradients meet in one pass, not each in zeros of its own."""
    central, kind = primals
    chosen = (jnp.arange(len(central)) == kind).astype(central.dtype).reshape(-1, *[1] * (central.ndim - 1))
    return _of_kind(central, kind), jnp.sum(chosen * tangents[0], axis=0)


MPO.CASES = (MPO(bond=4, mode=2), MPO(bond=3, mode=2, scale=2.0, learn="auxiliary"))
