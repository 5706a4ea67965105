"""SHiRA: a few entries of the weight itself, trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.hyperparameters import ABOVE_ZERO_TO_ONE, NOT_ZERO, check_hyperparameters, integer, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Sparse, Start, View
from jlora.core.protocol.peft import Peft
from jlora.methods.lora import trained_dtype

#: For each kind of mask what it needs from `jlora.prepare`.
MASKS = {"random": (), "struct": (), "weight": (), "gradient": ("absolute_gradient",), "snip": ("gradient",)}


@dataclass(frozen=True)
class SHiRA(Method):
    """Sparse high-rank adaptation: `w + scale * scatter(index, values)` with `values [k]` trained, `index [k]` fixed.

    Starts at the base exactly, with values of zero. `index` holds flat positions `row * out + column` in rising order.
    Trains `entries or rank * (in + out) or max(1, round(density * in * out))` values a matrix; that number is `k`.

    Worth it where adapters are switched often (`jlora.switch` overwrites `k` entries, and puts them back bit for bit) or
    several are added to one base, since sparse updates disturb each other little. The update's rank is not bounded.

    Args:
        mask: which entries; of entries that rank equal, the first count as larger.
            "random": drawn without replacement.
            "struct": the diagonal, then as many whole lines at equal distances as `k` allows, then single entries in the order
            of the matrix; `k = out * in / f + min(in, out) * (f - 1) / f` gives every f-th row of a square matrix.
            "weight": the largest of `|w|`.
            "gradient": the largest mean over the batches of `|gradient|`; needs `jlora.prepare`.
            "snip": the largest `|w * gradient|` with the mean gradient of all batches; needs `jlora.prepare`.
        density: share of the entries, where neither of the next two is given.
        entries: `k` itself; 0 means that it is not given.
        rank: the rank of the LoRA with as many values (PEFT's `r`); 0 means that it is not given.
        scale: factor of the values.
        offset: takes the next `k` entries after those of the adapters with smaller offsets, so that adapters on one base
            are disjoint (for "random" with the same key).
        lines: the lines of "struct": "rows" of `w [in, out]`, or "columns".

    There is no weight decay, as in the paper: the values belong to the group "vector". With LoRA+ they have the rate of `b`,
    since they start at zero as `b` does.

    Raises:
        ValueError: for a number or name out of range, more entries than the matrix has, or a matrix of more than 2**31
            entries.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.SHiRA("weight", density=0.01)})

    Reference:
        Bhardwaj et al. 2024, arXiv:2406.13175. `DoRA(SHiRA(...))` is `m / n * (w + update)` with the columns' lengths
        trained, and so changes every entry; the paper's SHiRA-DoRA is another thing, a DoRA of high rank of which only
        the masked entries are kept, `w + mask * (dora(w) - w)`.
    """

    mask: str = "random"
    density: float = 0.01
    entries: int = 0
    rank: int = 0
    scale: float = 1.0
    offset: int = 0
    lines: str = "rows"

    family: ClassVar[str] = "Sparse updates"

    # At LoRA's rate: experiments/shira found both best within 1e-3 to 1e-2. Masks by gradients want the mean of a few batches.
    recipe: ClassVar[Recipe] = Recipe(
        rank=0, rank_means="that of a LoRA with as many values, instead of a density", batches=8
    )

    def __post_init__(self) -> None:
        bounds = {"mask": one_of(MASKS), "density": ABOVE_ZERO_TO_ONE, "scale": NOT_ZERO}
        bounds |= dict.fromkeys(("entries", "rank", "offset"), integer(0))
        bounds["lines"] = one_of(("rows", "columns"), '"rows" or "columns"')
        check_hyperparameters(self, bounds=bounds, of=SHiRA)
        if self.entries and self.rank:
            raise ValueError(f"SHiRA takes entries or rank, not both; got entries={self.entries}, rank={self.rank}")

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Neither axis is one of the matrix's: both arrays lie whole on every device of a mesh."""
        return {"values": ("",), "index": ("",)}

    @property
    def needs(self) -> frozenset[str]:
        """The gradient by which the masks "gradient" and "snip" rank entries."""
        return frozenset(MASKS[self.mask])

    @property
    def alike(self) -> frozenset[str]:
        """A structured mask is the same for all matrices of a shape."""
        return frozenset({"index"} if self.mask == "struct" else ())

    def number(self, rows: int, columns: int) -> int:
        """`k`, the trained values of a matrix `[rows, columns]`."""
        return self.entries or self.rank * (rows + columns) or max(1, round(self.density * rows * columns))

    def check(self, site: Site) -> None:
        """Refuses a matrix with too few entries, or with too many for 32-bit positions."""
        size, k = site.in_size * site.out_size, self.number(site.in_size, site.out_size)
        if (self.offset + 1) * k > size:
            wanted = f"{k} entries" + (f" after those of {self.offset} adapters" if self.offset else "")
            raise ValueError(
                f"{wanted} are more than the {size} of the {site.in_size} x {site.out_size} matrix; take fewer"
            )
        if size > 2**31:
            raise ValueError(f"{size} entries are more than 32-bit positions can tell apart; leave the leaf out")

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """Chooses the entries; the values are zero."""
        rows, columns = w.shape
        k = self.number(rows, columns)
        first, last = self.offset * k, (self.offset + 1) * k
        if self.mask == "struct":
            index = jnp.asarray(struct_index(rows, columns, k, self.lines, self.offset), jnp.int32)
        elif self.mask == "random":
            index = jnp.sort(jax.random.permutation(key, w.size)[first:last])
        else:
            ranked = jnp.argsort(self._score(w, statistics).reshape(-1), stable=True, descending=True)
            index = jnp.sort(ranked[first:last])
        return Start({"values": jnp.zeros(k, trained_dtype(w))}, {"index": index.astype(jnp.int32)})

    def _score(self, w: jax.Array, statistics: dict[str, jax.Array]) -> jax.Array:
        """`[in, out]`, whose largest entries "weight", "gradient" and "snip" take."""
        if self.mask == "gradient":
            return statistics["absolute_gradient"]
        w = w.astype(trained_dtype(w))
        return jnp.abs(w if self.mask == "weight" else w * statistics["gradient"])

    def weight(self, view: View) -> jax.Array:
        """`w + scale * scatter(index, values)`; the cast keeps a 16-bit base from rounding the update."""
        values = view.params["values"]
        rows, columns = jnp.divmod(view.frozen["index"], jnp.int32(view.w.shape[1]))
        return view.w.astype(values.dtype).at[rows, columns].add(self.scale * values, unique_indices=True)

    def sparse(self, view: View) -> Sparse:
        """The entries; the scale is put into the values."""
        return Sparse(view.frozen["index"], self.scale * view.params["values"])

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft:
        """PEFT's SHiRA, with the scale in the values."""
        values = params["values"]
        values = values if self.scale == 1 else values * values.dtype.type(self.scale)
        return Peft("shira", {"values": values, "index": frozen["index"]})

    def labels(self, site: Site) -> dict[str, str]:
        """No decay: it would pull the weight back to the base."""
        return {"values": "vector"}


def struct_index(rows: int, columns: int, k: int, lines: str, offset: int = 0) -> np.ndarray:
    """The flat positions `[k]` of SHiRA's "struct" mask, in rising order.

    With an offset the diagonal and the lines are shifted by it, and leave out what smaller offsets take.
    """
    if lines == "columns":
        across = struct_index(columns, rows, k, "rows", offset)
        return np.sort(across % rows * columns + across // rows)
    free, found = np.ones((rows, columns), bool), np.zeros(0, np.int64)
    for shift in range(offset + 1):
        along = np.arange(min(rows, columns))
        diagonal = (along, (along + shift) % columns) if rows <= columns else ((along + shift) % rows, along)
        chosen = np.zeros((rows, columns), bool)
        chosen[diagonal] = free[diagonal]
        if chosen.sum() > k:
            chosen.reshape(-1)[np.flatnonzero(chosen)[k:]] = False
        lined = _with_lines(chosen, free, shift, k)
        rest = np.flatnonzero(free & ~lined)[: k - lined.sum()]
        lined.reshape(-1)[rest] = True
        found, free = np.flatnonzero(lined), free & ~lined
    return found


def _with_lines(chosen: np.ndarray, free: np.ndarray, shift: int, k: int) -> np.ndarray:
    """`chosen` with as many free rows at equal distances as fit into `k` entries in all."""
    rows, taken, gain = len(chosen), chosen.sum(), (free & ~chosen).sum(axis=1)
    marked = chosen.copy()
    best = np.zeros(0, int)
    for number in range(1, rows + 1):
        at = (np.arange(number) * rows // number + shift) % rows
        if taken + gain[at].sum() > k:
            break
        best = at
    marked[best] |= free[best]
    return marked


SHiRA.CASES = (
    SHiRA("random", density=0.25),
    SHiRA("struct", entries=24),
    SHiRA("weight", rank=2, scale=0.5),
    SHiRA("gradient", density=0.3, offset=1),
    SHiRA("snip", density=0.2),
)
