"""A decoder for longer texts than it was trained on: its rotary positions stretched."""

import dataclasses
import math
from typing import Any

from jlora.models.llama import Llama
from jlora.models.phi3 import Phi3
from jlora.models.rope import RopeConfig

# What `stretched` makes, as `config.json` names it.
TYPES = ("linear", "yarn")


def stretched(model: Llama, length: int, rope_type: str = "linear", attention: str | None = None) -> Llama:
    """The model for texts of `length` tokens, on the same params; it wants some training on such texts.

    Args:
        model: a Llama, or one of the families built on it, whose rotary positions are not stretched yet.
        length: the longest text, in tokens; more than `max_position_embeddings`.
        rope_type: "linear": positions are divided by `ceil(length / max_position_embeddings)` (position interpolation, as in
            LongLoRA). "yarn": planes that turn often keep their speed, those that turn slowly are divided so, and scores get a
            temperature. A Phi-3 gets the same positions as "longrope", by a stretch for each plane: its files have no other.
        attention: "full", or "s2" for `s2_attention` in training; by default as in the model.

    Raises:
        TypeError: for a model that is none.
        ValueError: for a length that needs no stretching, another type, positions that are stretched already, or layers that
            turn by different ones, as Gemma 3's do.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> longer = jlora.models.stretched(model, 2048, attention="s2")

    Reference:
        Chen et al. 2023, arXiv:2306.15595 (linear); Peng et al. 2023, arXiv:2309.00071 (YaRN).
    """
    if not isinstance(model, Llama):
        raise TypeError(f"model: wanted a Llama or a family built on it, got a {type(model).__name__}")
    config = model.config
    if rope_type not in TYPES:
        raise ValueError(f"rope_type must be one of {TYPES}, got {rope_type!r}")
    if config.rope.rope_type != "default":
        raise ValueError(f"the model's positions are stretched already, by {config.rope.rope_type!r}")
    if getattr(config, "local_rope", None) is not None:
        raise ValueError("the model's local layers turn by other positions than the rest, which can't be stretched yet")
    original = config.max_position_embeddings
    if length <= original:
        raise ValueError(f"the model reads {original} tokens as it is; a length of {length} needs no stretching")
    factor = float(math.ceil(length / original))
    # As `RopeConfig.from_hf` reads what transformers writes: linear positions know no original length.
    told: dict[str, Any] = {"original_length": length}
    if rope_type == "yarn":
        told = {"original_length": original, "attention_factor": 0.1 * math.log(factor) + 1.0}
    rope = dataclasses.replace(config.rope, rope_type=rope_type, factor=factor, **told)
    if isinstance(model, Phi3):
        rope = _by_planes(rope, config.head_dim, original)
    attention = config.attention if attention is None else attention
    return model.clone(
        config=dataclasses.replace(config, rope=rope, max_position_embeddings=length, attention=attention)
    )


def _by_planes(rope: RopeConfig, head_dim: int, original: int) -> RopeConfig:
    """The same positions as a stretch of each plane, in texts of any length."""
    plain, slower = (
        each.inverse_frequencies(each.turned(head_dim))
        for each in (dataclasses.replace(rope, rope_type="default"), rope)
    )
    factors = tuple((plain / slower).tolist())
    told = {"original_length": original, "short_factors": factors, "long_factors": factors}
    attention = rope.attention_factor
    return RopeConfig("longrope", theta=rope.theta, part=rope.part, attention_factor=attention, **told)


def stretched_settings(hf: dict[str, Any], model: Any) -> dict[str, Any]:
    """The content of a `config.json` with the stretched positions of a model, where it has such."""
    rope = getattr(model.config, "rope", None)
    if (
        rope is None
        or rope.rope_type not in (*TYPES, "longrope")
        or model.config.max_position_embeddings == hf.get("max_position_embeddings")
    ):
        return hf
    told: dict[str, Any] = {"rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type == "longrope":
        told = {"rope_type": "longrope", "attention_factor": rope.attention_factor}
        told |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.rope_type != "linear":
        told["original_max_position_embeddings"] = rope.original_length
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    return hf | {key: {**(hf.get(key) or {}), **told}, "max_position_embeddings": model.config.max_position_embeddings}
