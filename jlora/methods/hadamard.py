"""The Hadamard adapter: a gain and a shift of attention's outputs, element by element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Method, Site, Start, View
from jlora.methods.full import Full
from jlora.methods.lora import trained_dtype

SIDES = {"output": "out", "input": "in"}
# The output layer of attention and the normalization behind it, by the names of transformers.
_ATTENTION = r".*/(o_proj|out_proj|attn/c_proj|attention/output/dense)/kernel"
_NORM = r".*/(attention/output/LayerNorm|post_attention_layernorm|self_attn_layer_norm)/(scale|bias)"


@dataclass(frozen=True)
class Hadamard(Method):
    """Hadamard adapter: the outputs of a matrix become `g * (x @ w + bias) + b`, element by element.

    With `side="input"` it is `(g * x + b) @ w + bias`. `g` starts at one and `b` at zero, so that the start is the base's
    output. `b` goes into the bias beside the matrix: where the tree has none, only `g` is trained. Trains
    `out if side == "output" else in` values a matrix, and as many again where it has a bias.

    The paper puts it on the output of self-attention, and trains the normalization behind that too: `Hadamard.spec`. It tunes a
    classifier in two stages, first the head alone, then adapters and normalization with the head as it is; the example below.
    With `jlora finetune` the head is trained beside the adapters. Worth trying where an adapter of very few values is wanted.
    Merges exactly.

    Args:
        side: "output", or "input". The paper speaks of attention's output, which may be meant before its output layer
            ("input") or behind it ("output").

    Raises:
        ValueError: for another side.

    Example:
        >>> head = jlora.adapterize(params, {r".*/head/(kernel|bias)": jlora.Full()})
        >>> trained = jlora.merge(head)  # after the first stage, of which the training loop is left out here
        >>> adapted = jlora.adapterize(trained, {r".*/v_proj/kernel": jlora.Hadamard()})  # or jlora.Hadamard.spec()

    Reference:
        Chen et al. 2023, arXiv:2407.11033. There is no code of the authors; names and formula are the paper's.
    """

    side: str = "output"

    family: ClassVar[str] = "Rotations and scales"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})
    beside: ClassVar[tuple[str, ...]] = ("bias",)

    # Gains near one want larger steps than LoRA's factors: a rate near that of IA3.
    recipe: ClassVar[Recipe] = Recipe(rank=0, learning_rate=3e-3, targets=r".*/(o_proj|attention/output/dense)/kernel")

    def __post_init__(self) -> None:
        check_hyperparameters(self, bounds={"side": one_of(SIDES)})

    @classmethod
    def spec(cls, side: str = "output", norms: bool = True) -> dict[str, Method]:
        """A spec of the paper's second stage, for models with the usual names of transformers.

        Args:
            side: as that of `Hadamard`.
            norms: whether the normalization behind attention is trained too, in full.
        """
        return {_ATTENTION: cls(side), **({_NORM: Full()} if norms else {})}

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"g": (SIDES[self.side],), "b": (SIDES[self.side],)}

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Ones; and zeros where there is a bias."""
        size, dtype = w.shape[self.side == "output"], trained_dtype(w)
        return Start({"g": jnp.ones(size, dtype), **({"b": jnp.zeros(size, dtype)} if site.beside else {})})

    def weight(self, view: View) -> jax.Array:
        """`w` with its columns, or its rows, times `g`."""
        g = view.params["g"]
        return view.w.astype(g.dtype) * (g if self.side == "output" else g[:, None])

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """The product with `g`; `b` is in the bias, which the function goes on to add."""
        g = view.params["g"]
        return product(x.astype(g.dtype) * g) if self.side == "input" else product(x).astype(g.dtype) * g

    def merged_beside(self, view: View) -> Arrays:
        """`g * bias + b`, or `bias + b @ w`."""
        g, b = view.params["g"], view.params["b"]
        bias = view.beside["bias"].astype(g.dtype)
        return {"bias": g * bias + b if self.side == "output" else bias + b @ view.w.astype(g.dtype)}

    def labels(self, site: Site) -> dict[str, str]:
        """Vectors, which never decay."""
        return dict.fromkeys("gb" if site.beside else "g", "vector")


Hadamard.CASES = (Hadamard(), Hadamard("input"))
