"""Bottleneck adapters: a thin network before, behind or beside a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.contraction import drop
from jlora.core.protocol.hyperparameters import NOT_ZERO, check_hyperparameters, integer, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.methods.lora import kaiming, trained_dtype

#: What the input and the output of the network are, by `side`: as axes of the matrix.
SIDES = {"parallel": ("in", "out"), "output": ("out", "out"), "input": ("in", "in")}
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda z: z,
}
INITS = ("kaiming", "normal")

# The linear maps by the names of transformers: into the feed-forward block, out of it, and the inputs of attention.
_MLP_IN = r".*/(gate_proj|up_proj|fc_in|fc1|c_fc|dense_h_to_4h|wi|wi_0|wi_1|intermediate/dense)/kernel"
_MLP_OUT = r".*/(?<!attention/)(down_proj|fc_out|fc2|dense_4h_to_h|wo|mlp/c_proj|output/dense)/kernel"
_MLP = r".*/(up_proj|fc_in|fc1|c_fc|dense_h_to_4h|wi|wi_1|intermediate/dense)/kernel|" + _MLP_OUT
_ATTENTION = r".*/(q_proj|k_proj|v_proj|query|key|value|query_key_value|c_attn)/kernel"
# The feed-forward block of the models that the job reads, but its gate.
_TARGETS = r".*/((up|down)_proj|intermediate/dense|(?<!attention/)output/dense)/kernel"
PLACEMENTS = {
    "parallel_mlp": {_MLP: "parallel"},
    "parallel_attention": {_ATTENTION: "parallel"},
    "series": {_MLP_OUT: "output", _MLP_IN: "input"},
    "series_after_mlp": {_MLP_OUT: "output"},
}


@dataclass(frozen=True)
class Bottleneck(Method):
    """Bottleneck adapters: a network `f(z) = scale * act(z @ d) @ u` beside a product, behind it or before it.

    With `side` "parallel" the output is `x @ w + f(x)`; with "output" it is `z + f(z)`, `z = x @ w + bias` (a series adapter);
    with "input" it is `(x + f(x)) @ w`. `d [., rank]` and `u [rank, .]` are as wide as the side that they are at. Trains
    `rank * (2 * in if side == "input" else 2 * out if side == "output" else in + out) + (1 if learned_scale else 0)` values a
    matrix.

    Worth trying where the change that a task wants is not linear. What it does no weight in its place can do: it can't be
    merged, and costs its products at inference too.

    Args:
        rank: width of the network. It may be larger than the matrix.
        side: "parallel", "output" or "input".
        activation: "tanh", "relu", "gelu", "gelu_tanh" (its approximation), "silu", "sigmoid" or "identity".
        scale: factor of the network's output.
        learned_scale: trains the factor, from `scale`, one for each matrix.
        init: "kaiming" starts at the base exactly, with `d` uniform in ±1/sqrt(its inputs) and `u` zero (the authors'
            "mam_adapter"). "normal" draws both with deviation 0.02 (their default, "bert"): the start is not the base's then.
        dropout: probability of dropping an entry of the network's input, where a key is given.

    The network computes in 32 bits at least. A lookup in an embedding, or a transposed use, is no product to stand at, and is
    refused when the function is lifted.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/v_proj/kernel": jlora.Bottleneck(rank=64)})
        >>> jlora.adapterize(params, jlora.Bottleneck.spec("parallel_attention", rank=64))

    Reference:
        Hu et al. 2023 (LLM-Adapters), arXiv:2304.01933; series: Houlsby et al. 2019, arXiv:1902.00751; parallel: He et al.
        2022, arXiv:2110.04366.
    """

    rank: int = 256
    side: str = "parallel"
    activation: str = "tanh"
    scale: float = 1.0
    learned_scale: bool = False
    init: str = "kaiming"
    dropout: float = 0.0

    family: ClassVar[str] = "Bottleneck adapters"
    mergeable: ClassVar[bool] = False

    # Parallel in the feed-forward block, with the rate of the authors' study, whose best width is 256: too many values for a
    # default.
    recipe: ClassVar[Recipe] = Recipe(rank=64, rank_means="width of the network", learning_rate=3e-4, targets=_TARGETS)

    def __post_init__(self) -> None:
        names = {"side": one_of(SIDES), "activation": one_of(ACTIVATIONS), "init": one_of(INITS)}
        check_hyperparameters(self, bounds={"rank": integer(1, "a positive integer"), "scale": NOT_ZERO, **names})

    @classmethod
    def spec(cls, placement: str = "parallel_mlp", **hyperparameters: Any) -> dict[str, Bottleneck]:
        """A spec with the placements of the authors' study, for models with the usual names of transformers.

        Args:
            placement: "parallel_mlp": beside the linear maps into the feed-forward block and out of it, but no gate;
                "parallel_attention": beside those of queries, keys and values; "series": before the maps into the feed-forward
                block and behind the one out of it; "series_after_mlp": behind that one alone.
            **hyperparameters: of `Bottleneck`, but the side.

        Raises:
            ValueError: for another placement.
        """
        if placement not in PLACEMENTS:
            raise ValueError(f"the placement must be one of {tuple(PLACEMENTS)}, got {placement!r}")
        return {pattern: cls(side=side, **hyperparameters) for pattern, side in PLACEMENTS[placement].items()}

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        """The bias, which is in the input of a network behind the product."""
        return ("bias",) if self.side == "output" else ()

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """Whether the start is the base's output."""
        return self.init == "kaiming"

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        before, after = SIDES[self.side]
        return {"d": (before, "rank"), "u": ("rank", after), **({"scale": ()} if self.learned_scale else {})}

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """The network by `init`, and the factor if it is trained."""
        size, dtype = {"in": w.shape[0], "out": w.shape[1], "rank": self.rank}, trained_dtype(w)
        d, u = (tuple(size[axis] for axis in self.axes[name]) for name in "du")
        keys = jax.random.split(key)
        if self.init == "normal":
            drawn = (0.02 * jax.random.normal(keys[0], d, dtype), 0.02 * jax.random.normal(keys[1], u, dtype))
        else:
            drawn = (kaiming(keys[0], d, dtype), jnp.zeros(u, dtype))
        return Start(
            dict(zip("du", drawn)) | ({"scale": jnp.full((), self.scale, dtype)} if self.learned_scale else {})
        )

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """The output by `side`."""
        if self.side == "input":
            fx = self._network(x, view)
            return product(x.astype(fx.dtype) + fx)
        y = product(x)
        z = x if self.side == "parallel" else y
        if "bias" in view.beside:
            z = z + view.beside["bias"].astype(z.dtype)
        fz = self._network(z, view)
        return y.astype(fz.dtype) + fz

    def _network(self, z: jax.Array, view: View) -> jax.Array:
        """`f(z)`, in the dtype of the trained arrays."""
        d, u = view.params["d"], view.params["u"]
        hidden = ACTIVATIONS[self.activation](drop(z, self.dropout, view.key).astype(d.dtype) @ d)
        return view.params.get("scale", self.scale) * (hidden @ u)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups."""
        return {"d": "a", "u": "b", **({"scale": "vector"} if self.learned_scale else {})}


Bottleneck.CASES = (
    Bottleneck(rank=3, learned_scale=True),
    Bottleneck(rank=2, side="output", activation="gelu", init="normal", scale=2.0),
    Bottleneck(rank=3, side="input", activation="silu", dropout=0.25),
)
