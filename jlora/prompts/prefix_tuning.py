"""Prefix-tuning: keys and values of virtual tokens in every layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import NOT_NEGATIVE, check_hyperparameters, integer
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Site, Start, View
from jlora.methods.lora import shared_dtype, trained_dtype
from jlora.prompts.encoders import linear, linear_start
from jlora.prompts.virtual import VIRTUAL, Virtual

# Products in whose result queries, keys and values lie beside each other, and such of queries alone, by usual names.
_FUSED = re.compile(r"(.*_)?(qkv|Wqkv|query_key_value|c_attn|in_proj)(_.*)?")
_QUERY = re.compile(r"q|query|q_proj|q_lin|wq")


@dataclass(frozen=True)
class PrefixTuning(Virtual):
    """Trains the keys and values of virtual tokens in front of every text, in every layer that it adapts.

    Goes to the products that make keys and values: at the positions of the virtual tokens, which `jlora.prompted` puts in front
    of a function's input, their result is `rows [tokens, out]`, before a bias, rotary positions and norms of the function's
    own. What else the virtual tokens do reaches nothing.

    With `hidden`, a network makes the rows while they are trained, `tanh(embedding @ w1 + b1) @ w2 + b2`, of which all leaves
    share the first part; `jlora.without_encoder` leaves the rows alone, which give the same outputs. Trains
    `((hidden + 1) if hidden else tokens) * (out if columns is None else columns[1] - columns[0])` values a matrix. Shares
    `hidden and tokens * width + width * hidden + hidden` trained values.

    Worth trying for tasks of writing, where many adapters have to be kept.

    Args:
        tokens: how many virtual tokens.
        hidden: width of the network; 0 for none.
        width: width of the network's embeddings; of use with `hidden` alone.
        deviation: standard deviation of the rows at the start, without a network.
        columns: first column and the one behind the last that keys and values have in a fused product, such as `(768, 2304)`
            for a `c_attn` of width 768; None for all.

    Raises:
        ValueError: for a hyperparameter out of range, a fused product without `columns`, a product of queries, and (when
            called) for one whose input is not `[batch, length, in]`.

    Example:
        >>> jlora.adapterize(params, {r".*/(k|v)_proj/kernel": jlora.PrefixTuning(tokens=20)}, sites=sites)

    Reference:
        Li and Liang 2021, arXiv:2101.00190; the network as in PEFT.
    """

    tokens: int = 20
    hidden: int = 0
    width: int = 512
    deviation: float = 0.02
    columns: tuple[int, int] | None = None

    family: ClassVar[str] = "Prompts"
    context: ClassVar[frozenset[str]] = frozenset({VIRTUAL})
    recipe: ClassVar[Recipe] = Recipe(rank=0, learning_rate=1e-2, targets=r".*/(k|v)_proj/kernel")

    def __post_init__(self) -> None:
        counts = {"tokens": integer(1), "hidden": integer(0), "width": integer(1)}
        check_hyperparameters(self, bounds={**counts, "deviation": NOT_NEGATIVE})
        if self.columns is not None and not (
            len(self.columns) == 2
            and all(type(n) is int for n in self.columns)
            and 0 <= self.columns[0] < self.columns[1]
        ):
            raise ValueError(f"PrefixTuning's columns must be a first and a last column, got {self.columns!r}")

    def check(self, site: Site) -> None:
        """Refuses what makes no keys or values, and a fused product of which nobody said which columns do."""
        last = [key for key in site.keys if key not in ("kernel", "weight", "w")][-1:]
        if site.kind != "dot":
            raise ValueError(
                f"prefix-tuning goes to the products that make keys and values, and this leaf is read by a {site.kind}"
            )
        if any(_QUERY.fullmatch(key) for key in last):
            raise ValueError("prefix-tuning goes to the products that make keys and values, and this one makes queries")
        if self.columns is None and any(_FUSED.fullmatch(key) for key in last):
            raise ValueError(
                "queries, keys and values are made by one product here: say which columns are keys and values, as in "
                f"PrefixTuning(columns=({site.out_size // 3}, {site.out_size})) where all three are as wide"
            )
        if self.columns is not None and self.columns[1] > site.out_size:
            raise ValueError(f"columns {self.columns} are not all among the {site.out_size} of the product")

    @property
    def encoded(self) -> bool:
        return self.hidden > 0

    @property
    def without_encoder(self) -> PrefixTuning:
        """The same with rows of its own."""
        return replace(self, hidden=0)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        column = "out" if self.columns is None else ""
        return {"w2_kernel": ("", column), "w2_bias": (column,)} if self.hidden else {"rows": ("", column)}

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """The first part of the network."""
        return ("embedding", "w1_kernel", "w1_bias") if self.hidden else ()

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Start:
        """Normal embeddings, and a linear layer."""
        dtype = shared_dtype(sites)
        if not self.hidden:
            return Start({})
        keys = jax.random.split(key)
        embedding = jax.random.normal(keys[0], (self.tokens, self.width), dtype)
        return Start({"embedding": embedding, **linear_start(keys[1], "w1", self.width, self.hidden, dtype)})

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Normal rows; with a network its last layer."""
        first, last = self._columns(w.shape[1])
        if self.hidden:
            return Start(linear_start(key, "w2", self.hidden, last - first, trained_dtype(w)))
        return Start({"rows": self.deviation * jax.random.normal(key, (self.tokens, last - first), trained_dtype(w))})

    def rows(self, view: View) -> jax.Array:
        """The keys, or values, of the virtual tokens, `[tokens, columns]`."""
        if not self.hidden:
            return view.params["rows"]
        hidden = jnp.tanh(linear(view.shared, "w1", view.shared["embedding"]))
        return linear(view.params, "w2", hidden.astype(view.params["w2_kernel"].dtype))

    def evaluated(self, view: View) -> Arrays:
        """What the network makes."""
        return {"rows": self.rows(view)}

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """`x @ w`, with the rows at the positions of virtual tokens; as it is where a call has none."""
        y, number = product(x), view.context.get(VIRTUAL)
        if number is None:
            return y
        first, last = self._columns(y.shape[-1])
        number = _as_positions(number, x.shape[:-1], view.site.path)[..., None]
        drawn = self.rows(view)[jnp.maximum(number[..., 0], 0)].astype(y.dtype)
        return y.at[..., first:last].set(jnp.where(number >= 0, drawn, y[..., first:last]))

    def _columns(self, width: int) -> tuple[int, int]:
        return (0, width) if self.columns is None else self.columns

    def labels(self, site: Site) -> dict[str, str]:
        """One group: the rows are no factors."""
        return dict.fromkeys(self.axes, "a")

    def shared_labels(self, trained: Any) -> dict[str, str]:
        """As those of the leaves."""
        return dict.fromkeys(trained, "a")


def _as_positions(number: jax.Array, shape: tuple[int, ...], path: str) -> jax.Array:
    """Numbers of virtual tokens `[batch, length]` as the positions of an activation lie.

    Raises:
        ValueError: where it has no such positions.
    """
    wide = tuple(size for size in shape if size != 1)
    if shape == number.shape or wide == tuple(size for size in number.shape if size != 1) or shape == (number.size,):
        return number.reshape(shape)
    raise ValueError(
        f"{path}: prefix-tuning wants the product's input as [batch, length, in] with batch and length {number.shape}, or both "
        f"as one axis, to know which positions are virtual; got {(*shape, 'in')}"
    )


PrefixTuning.CASES = (
    PrefixTuning(tokens=3),
    PrefixTuning(tokens=2, hidden=4, width=3),
    PrefixTuning(tokens=2, columns=(2, 6)),
)
