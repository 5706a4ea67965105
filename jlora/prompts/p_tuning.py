"""P-tuning: virtual tokens whose embeddings a small network makes while they are trained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax

from jlora.core.protocol.hyperparameters import check_hyperparameters, integer, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Start, View
from jlora.methods.lora import trained_dtype
from jlora.prompts.encoders import linear, linear_start, lstm, lstm_start
from jlora.prompts.prompt_tuning import PromptTuning
from jlora.prompts.virtual import VirtualRows

ENCODERS = ("mlp", "lstm")


@dataclass(frozen=True)
class PTuning(VirtualRows):
    """Prompt tuning through an encoder: the virtual tokens' embeddings are `encoder(prompt)`, with `prompt [tokens, out]`.

    The encoder couples the virtual tokens and makes them learn more evenly. It is of no use afterwards:
    `jlora.without_encoder` leaves `PromptTuning` with what it makes, which gives the same outputs. Trains
    `tokens * out + (2 * out * hidden + hidden * hidden + 2 * hidden + out if encoder == "mlp" else
    8 * hidden * (out + hidden + 1) + (layers - 1) * 8 * hidden * (3 * hidden + 1) + 4 * hidden * hidden + 2 * hidden +
    2 * hidden * out + out)` values a matrix.

    Args:
        tokens: how many virtual tokens.
        encoder: "mlp": three linear layers with ReLU between them, each virtual token by itself. "lstm": an LSTM that reads the
            virtual tokens both ways, and two linear layers.
        hidden: width of the encoder.
        layers: of the LSTM.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> adapted = jlora.adapterize(params, {"embed_tokens/embedding": jlora.PTuning(tokens=20, hidden=32)})

    Reference:
        Liu et al. 2021, arXiv:2103.10385; networks and starts as in PEFT.
    """

    tokens: int = 20
    encoder: str = "mlp"
    hidden: int = 128
    layers: int = 2

    family: ClassVar[str] = "Prompts"
    # Not chosen by a sweep.
    recipe: ClassVar[Recipe] = Recipe(rank=0, learning_rate=1e-3, targets="embedding")

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("tokens", "hidden", "layers"), integer(1))
        check_hyperparameters(self, bounds={**counts, "encoder": one_of(ENCODERS)})

    @property
    def encoded(self) -> bool:
        return True

    @property
    def without_encoder(self) -> PromptTuning:
        """Prompt tuning of as many tokens."""
        return PromptTuning(self.tokens)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The network's arrays are whole on every device."""
        head = 3 if self.encoder == "mlp" else 2
        axes: dict[str, tuple[str, ...]] = {"prompt": ("", "")}
        for n in range(head):
            axes |= {f"linear_{n}_kernel": ("", ""), f"linear_{n}_bias": ("",)}
        for n in range(self.layers if self.encoder == "lstm" else 0):
            for way in ("forward", "backward"):
                stem = f"lstm_{n}_{way}"
                axes |= {f"{stem}_input": ("", ""), f"{stem}_hidden": ("", ""), f"{stem}_bias": ("",)}
        return axes

    def start(self, key: jax.Array, w: jax.Array, site: object) -> Start:
        """Normal virtual tokens, and the network's arrays uniform in ±1/sqrt(inputs)."""
        width, dtype = w.shape[1], trained_dtype(w)
        first, *keys = jax.random.split(key, 4 + self.layers)
        found: Arrays = {"prompt": jax.random.normal(first, (self.tokens, width), dtype)}
        sizes = [width, self.hidden, self.hidden, width]
        if self.encoder == "lstm":
            sizes = [2 * self.hidden, 2 * self.hidden, width]
            for n in range(self.layers):
                found |= lstm_start(keys[3 + n], f"lstm_{n}", 2 * self.hidden if n else width, self.hidden, dtype)
        for n, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            found |= linear_start(keys[n], f"linear_{n}", inputs, outputs, dtype)
        return Start(found)

    def rows(self, view: View) -> jax.Array:
        """`encoder(prompt)`."""
        return self._encode(view.params)

    def evaluated(self, view: View) -> Arrays:
        """What the encoder makes, as the embeddings of the virtual tokens."""
        return {"prompt": self.rows(view)}

    def _encode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        x = arrays["prompt"]
        for n in range(self.layers if self.encoder == "lstm" else 0):
            x = lstm(arrays, f"lstm_{n}", x)
        last = 2 if self.encoder == "mlp" else 1
        for n in range(last):
            x = jax.nn.relu(linear(arrays, f"linear_{n}", x))
        return linear(arrays, f"linear_{last}", x)


PTuning.CASES = (PTuning(tokens=3, hidden=4), PTuning(tokens=2, encoder="lstm", hidden=3, layers=2))
