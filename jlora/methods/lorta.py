"""LoRTA: one low-rank tensor for the updates of all heads, kinds of matrices and layers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import NOT_NEGATIVE, check_hyperparameters, integer, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.layers import kinds, layer_numbers
from jlora.core.protocol.method import Arrays, Factors, Method, Site, Start, View
from jlora.methods.lora import SCALINGS, lora_scale, shared_dtype


@dataclass(frozen=True)
class LoRTA(Method):
    """Low-rank tensor adaptation: `w + s * (concat over heads h of b.T * c_h * c_m * c_l) @ a.T`, with all factors shared.

    A tensor in canonical polyadic form holds the updates of all matrices: `a [size, rank]`, `b [rank, head size]`, and a row of
    `rank` factors for each head (`c_h`), kind of leaf (`c_m`: queries, keys, ...) and layer (`c_l`). The heads cut a matrix's
    rows, as in the reference's code, or its columns, where `by_rows` does not match the leaf's path: there the update is
    `s * a @ (concat over h of b * c_h * c_m * c_l)`. `s = alpha / rank`, or `alpha / sqrt(rank)`. `b` starts at zero, so the
    start is the base's output.

    Trains `0` values a matrix. Shares
    `rank * ((out + -(-in // heads) if by_rows == ".*" else in + -(-out // heads)) + heads + kinds + layers)` trained values.

    The paper adapts the queries, keys, values and outputs of attention, all of one size. Here leaves may differ: `a` and `b`
    are as large as the largest needs, and others take their first rows, columns and heads; so keys and values of grouped
    queries, cut by columns, have the first heads. Which row of `c_m` and `c_l` is a matrix's is found in its path and
    axes, and kept in two constants.

    Worth trying where an adapter must be very small. A weight of the factors acts on every layer, so gradients are large sums.

    Args:
        rank: components of the tensor.
        heads: how many blocks a matrix of the largest size is cut into; 1 leaves matrices whole.
        alpha: numerator of the scale.
        scaling: "standard" or "rslora".
        by_rows: a regex that matches the whole paths of the leaves whose heads are cut along the input. By default all, as in
            the reference; r".*/o_proj/kernel" cuts queries, keys and values along their outputs, where their heads are.
        init_scale: `c` start uniform within `sqrt(6 / ((1 + 5 * init_scale**2) * rank))`; the reference has 0.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, or a regex that is none.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|k|v|o)_proj/kernel": jlora.LoRTA(rank=4, heads=8)})

    Reference:
        Hounie et al. 2024, arXiv:2410.04060; starts and the cut along rows as in its code. Which axis the paper means to cut,
        and its learning rates, were not verified.
    """

    rank: int = 8
    heads: int = 1
    alpha: float = 8.0
    scaling: str = "standard"
    by_rows: str = ".*"
    init_scale: float = 0.0
    dropout: float = 0.0

    family: ClassVar[str] = "Shared tensors"

    # So few values learn slowly: ten times LoRA's. In 80 steps of the shipped model 5e-3 and 2e-2 did far better than 1e-3.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=5e-3)

    def __post_init__(self) -> None:
        bounds = {"scaling": one_of(SCALINGS), "init_scale": NOT_NEGATIVE, "heads": integer(1), "rank": integer(1)}
        check_hyperparameters(self, bounds=bounds, of=LoRTA, regexes=("by_rows",))

    @property
    def scale(self) -> float:
        """`s`."""
        return lora_scale(self.alpha, self.rank, self.scaling)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Those of the two numbers: which rows of `c_l` and `c_m` are the matrix's."""
        return {"layer": (), "kind": ()}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """All factors of the tensor."""
        return ("a", "b", "c_h", "c_m", "c_l")

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Start:
        """The factors, as large as the largest leaf needs."""
        cut, whole = zip(*(_heads_first(site.in_size, site.out_size, self._cuts_rows(site)) for site in sites))
        sizes = {"c_h": self.heads, "c_m": kinds(sites)[1], "c_l": layer_numbers(sites)[1]}
        dtype = shared_dtype(sites)
        key, key_a = jax.random.split(key)
        bound = math.sqrt(6 / ((1 + 5 * self.init_scale**2) * self.rank))
        factors = {
            name: jax.random.uniform(each, (size, self.rank), dtype, -bound, bound)
            for each, (name, size) in zip(jax.random.split(key, 3), sizes.items())
        }
        # By the rank and not by the size: torch takes the second axis of `[size, rank]` for the inputs.
        bound = 1 / math.sqrt(self.rank)
        a = jax.random.uniform(key_a, (max(whole), self.rank), dtype, -bound, bound)
        return Start({"a": a, "b": jnp.zeros((self.rank, -(-max(cut) // self.heads)), dtype), **factors})

    def _cuts_rows(self, site: Site) -> bool:
        return re.fullmatch(self.by_rows, site.path) is not None

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Nothing of its own but the numbers, which `together` fills in."""
        return Start({}, {name: jnp.zeros((), jnp.int32) for name in self.axes})

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """The numbers of every matrix's kind and layer."""
        numbers, found = zip(layer_numbers(sites)[0], kinds(sites)[0]), []
        for start, (layer, kind) in zip(starts, numbers, strict=True):
            constants = {"layer": jnp.asarray(layer, jnp.int32), "kind": jnp.full(layer.shape, kind, jnp.int32)}
            found.append(replace(start, frozen=constants))
        return found

    def factors(self, view: View) -> Factors:
        """The side with the heads `[side, rank]`, and `a`, in the order of the matrix's sides."""
        shared, by_rows = view.shared, self._cuts_rows(view.site)
        rows, columns = view.w.shape
        cut, whole = _heads_first(rows, columns, by_rows)
        c = shared["c_h"] * shared["c_m"][view.frozen["kind"]] * shared["c_l"][view.frozen["layer"]]
        heads = (c[:, None, :] * shared["b"].T).reshape(-1, self.rank)[:cut]
        a = shared["a"][:whole]
        if by_rows:
            return Factors(heads, self.scale * a.T, dropout=self.dropout)
        return Factors(a, self.scale * heads.T, dropout=self.dropout)

    def weight(self, view: View) -> jax.Array:
        """`w + s * ...`, of the factors."""
        return self.factors(view).weight(view.w)

    def labels(self, site: Site) -> dict[str, str]:
        """None: a leaf trains nothing of its own."""
        return {}

    def shared_labels(self, trained: Arrays) -> dict[str, str]:
        """`b`, which starts at zero, is LoRA's `b`."""
        return {name: "b" if name == "b" else "a" for name in trained}


def _heads_first(rows: int, columns: int, by_rows: bool) -> tuple[int, int]:
    """The side that is cut into heads, and the other."""
    return (rows, columns) if by_rows else (columns, rows)


LoRTA.CASES = (
    LoRTA(rank=4, heads=2),
    LoRTA(rank=3, heads=3, alpha=5, scaling="rslora", by_rows="none", init_scale=1.0, dropout=0.25),
)
