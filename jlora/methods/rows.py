"""Rows: some rows of an embedding, trained themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Factors, Method, Site, Start, View
from jlora.core.protocol.peft import Peft
from jlora.methods.lora import trained_dtype


@dataclass(frozen=True)
class Rows(Method):
    """Trains some rows of the matrix: `w` with `w[indices] = rows`, for new or special tokens of an embedding.

    Starts as the rows are, in float32 at least. Trains `len(indices) * out` values a matrix; all other rows stay as they are.

    The right choice where a few tokens were added to a vocabulary.

    Args:
        indices: numbers of the rows, each once.

    Raises:
        ValueError: for indices that are not whole numbers from 0 on, or repeat.

    Example:
        >>> jlora.adapterize(params, {r".*/embed.*/embedding": jlora.Rows((3, 7))}, sites=sites)

    Reference:
        "Trainable tokens" of PEFT, which stores the rows alike.
    """

    indices: tuple[int, ...] = (0,)

    family: ClassVar[str] = "Trained leaves and rows"
    local: ClassVar[frozenset[str]] = frozenset({"out"})
    restarts: ClassVar[bool] = False
    recipe: ClassVar[Recipe] = Recipe(targets="embedding", asks=("indices",))

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.indices)
        if not self.indices or not whole or len(set(self.indices)) < len(self.indices):
            raise ValueError(f"Rows' indices must be different whole numbers from 0 on, got {self.indices!r}")

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"rows": ("", "out")}

    def check(self, site: Site) -> None:
        """Refuses a row number beyond the matrix's rows."""
        if max(self.indices) >= site.in_size:
            raise ValueError(f"row {max(self.indices)} is not one of the matrix's {site.in_size} rows")

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """The rows as they are."""
        return Start({"rows": w[jnp.array(self.indices)].astype(trained_dtype(w))})

    def weight(self, view: View) -> jax.Array:
        """`w` with the rows replaced."""
        rows = view.params["rows"]
        return view.w.astype(rows.dtype).at[jnp.array(self.indices)].set(rows)

    def factors(self, view: View) -> Factors:
        """`a [in, rows]` one-hot and `b [rows, out]` the change: their product is the change at the rows' places."""
        rows, at = view.params["rows"], jnp.array(self.indices)
        places = (
            jnp.zeros((view.w.shape[0], len(self.indices)), rows.dtype).at[at, jnp.arange(len(self.indices))].set(1)
        )
        return Factors(places, rows - view.w[at].astype(rows.dtype))

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft:
        """PEFT's trainable tokens."""
        return Peft("rows", {"rows": params["rows"]})


Rows.CASES = (Rows((0, 3)),)
