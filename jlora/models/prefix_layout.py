"""How keys and values of virtual tokens lie in PEFT's files, for `jlora.save_peft` and `jlora.load_peft`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.models.bert import Bert, BertConfig
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.rope import RopeConfig, rotate, rotation


@dataclass(frozen=True)
class PrefixLayout:
    """Heads of keys and values, and what the model does with a key before it is compared.

    PEFT keeps the keys as a cache has them, behind rotary positions; jlora as the product gives them, before.

    Args:
        head_dim: width of a head.
        turn: `turn(keys, back)`, the keys `[layers, tokens, heads, head_dim]` of tokens at positions 0, 1, .. with the model's
            rotary positions, or without them again; None for a model that has none.
    """

    head_dim: int
    turn: Callable[[np.ndarray, bool], np.ndarray] | None = None


def peft_prefix(model: Any) -> PrefixLayout:
    """The layout of a model of this package.

    Args:
        model: a model of this package, or its config.

    Raises:
        TypeError: for anything else.
        ValueError: for a model that normalizes its keys, or whose positions depend on the length of the text: PEFT's keys are
            behind that, and can't be brought before it.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> prefix = jlora.models.peft_prefix(model)
    """
    backbone = getattr(model, "backbone", model)
    if isinstance(backbone, Bert | BertConfig):
        config = getattr(backbone, "config", backbone)
        return PrefixLayout(config.hidden_size // config.num_attention_heads)
    if not isinstance(backbone, Llama | LlamaConfig):
        raise TypeError(f"model: wanted a model of jlora.models or its config, got a {type(model).__name__}")
    config = getattr(backbone, "config", backbone)
    if config.qk_norm:
        raise ValueError("the model normalizes its keys, behind which PEFT keeps a prefix and jlora does not")
    if config.rope.rope_type == "dynamic":
        raise ValueError(
            "rotary positions of type 'dynamic' depend on the text's length; PEFT keeps a prefix behind them"
        )
    return PrefixLayout(config.head_dim, lambda keys, back: turned(config.rope, keys, back))


def turned(rope: RopeConfig, keys: np.ndarray, back: bool) -> np.ndarray:
    """Keys `[layers, tokens, heads, head_dim]` with rotary positions 0, 1, .., or, `back`, without them."""
    cosine, sine = rotation(rope, keys.shape[-1], jnp.arange(keys.shape[1])[None])
    if back:  # the angles' opposites; a factor of cosines and sines is taken out again
        cosine, sine = cosine / rope.attention_factor**2, -sine / rope.attention_factor**2
    return np.asarray(rotate(jnp.asarray(keys), cosine, sine))
