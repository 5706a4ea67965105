"""Rotary position embeddings and their scalings.

A head's vector is rotated in the planes (i, i + d/2), i < d/2, by the angle `position * frequency[i]`: the "half-split"
layout of Hugging Face checkpoints. Scaling changes the frequencies so that a model reads longer text than it was
trained on.

References: RoFormer (arXiv:2104.09864); dynamic NTK and YaRN (arXiv:2309.00071); Llama 3 (arXiv:2407.21783); LongRoPE
(arXiv:2402.13753).
"""

import dataclasses
import math
import reprlib

import jax
import jax.numpy as jnp
import numpy as np

from jlora.disk.json_files import shown
from jlora.models.config import flag, optional, positive, required, whole

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions become angles.

    Args:
        rope_type: One of `ROPE_TYPES`.
        theta: Base of the geometric series of wavelengths.
        factor: How many times longer than in training the text may be.
        original_length: Length in training, in tokens (`original_max_position_embeddings`).
        low_frequency_factor: llama3: waves longer than `original_length / low_frequency_factor` are stretched in full.
        high_frequency_factor: llama3: waves shorter than `original_length / high_frequency_factor` are kept.
        beta_fast: yarn: planes that turn more often than this within `original_length` are kept.
        beta_slow: yarn: planes that turn less often than this are stretched in full.
        attention_factor: yarn, longrope: multiplies cos and sin.
        truncate: yarn: round the borders of the ramp to whole planes.
        part: Part of a head, from its beginning, that turns; the rest stays as it is.
        short_factors: longrope: stretch of each plane in texts up to `original_length`.
        long_factors: longrope: stretch of each plane in longer texts.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    part: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, hf: dict, partial: bool = False) -> "RopeConfig":
        """Reads `rope_parameters`, or `rope_theta` with `rope_scaling`, of a Hugging Face config.

        Args:
            hf: Content of `config.json`.
            partial: The model can turn a part of a head.

        Raises:
            ValueError: The type is none of `ROPE_TYPES`, a number it needs is missing, or only a part of a head turns in a
                model that can't do it.
        """
        named = (hf.get(name) for name in ("rope_parameters", "rope_scaling"))
        settings = next((value for value in named if value is not None and value != {}), {})
        if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
            raise ValueError(
                f"config.json: the rope settings must be one object for all layers, got {shown(settings)}."
            )
        rope_type = settings.get("rope_type", settings.get("type", "default"))
        if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
            raise ValueError(
                f"config.json: rope type {reprlib.repr(rope_type)} is not supported; supported: {', '.join(ROPE_TYPES)}."
            )
        part = optional(settings, "partial_rotary_factor", optional(hf, "partial_rotary_factor", 1.0))
        if part != 1.0 and not partial:
            raise ValueError("config.json: partial_rotary_factor other than 1.0 is not supported.")
        part = positive({"partial_rotary_factor": part}, "partial_rotary_factor")
        own_theta = settings if settings.get("rope_theta") is not None else hf
        theta = positive(own_theta, "rope_theta", 10000.0, above=1.0)
        if rope_type == "default":
            return cls(theta=theta, part=part)
        if rope_type == "longrope":
            return cls(rope_type=rope_type, theta=theta, part=part, **_longrope_fields(hf, settings))
        longest = whole(hf, "max_position_embeddings")
        original = {"llama3": settings, "yarn": settings}.get(rope_type, {})
        fields = {
            "theta": theta,
            "factor": positive(settings, "factor", where="rope"),
            "original_length": whole(original, "original_max_position_embeddings", longest, where="rope"),
        }
        extra = {"llama3": _llama3_fields, "yarn": _yarn_fields}.get(rope_type)
        return cls(rope_type=rope_type, part=part, **fields, **(extra(settings) if extra else {}))

    def turned(self, head_dim: int) -> int:
        """How many numbers of a head turn."""
        return int(head_dim * self.part)

    def inverse_frequencies(self, head_dim: int, length: jax.Array | None = None) -> jax.Array:
        """Radians a token for each of the `head_dim / 2` planes, float32.

        Args:
            head_dim: Width of what turns of a head, even.
            length: Longest position + 1 in this call; the dynamic type and longrope alone read it.
        """
        if self.rope_type == "dynamic":
            return self._dynamic(head_dim, length)
        inverse = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.rope_type == "linear":
            inverse = inverse / self.factor
        elif self.rope_type == "llama3":
            inverse = self._llama3(inverse)
        elif self.rope_type == "yarn":
            inverse = self._yarn(inverse, head_dim)
        elif self.rope_type == "longrope":
            short, long = (jnp.asarray(inverse / each, jnp.float32) for each in (self.short_factors, self.long_factors))
            return jnp.where((0 if length is None else length) > self.original_length, long, short)
        return jnp.asarray(inverse, jnp.float32)

    def _dynamic(self, head_dim: int, length: jax.Array | None) -> jax.Array:
        longest = jnp.maximum(0 if length is None else length, self.original_length).astype(jnp.float32)
        stretch = self.factor * longest / self.original_length - (self.factor - 1)
        theta = self.theta * stretch ** (head_dim / (head_dim - 2))
        return theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)

    def _llama3(self, inverse: np.ndarray) -> np.ndarray:
        turns = self.original_length * inverse / (2 * math.pi)
        keep = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return keep * inverse + (1 - keep) * inverse / self.factor

    def _yarn(self, inverse: np.ndarray, head_dim: int) -> np.ndarray:
        def plane(turns: float) -> float:
            """The (fractional) plane that turns this often within the original length."""
            return head_dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = plane(self.beta_fast), plane(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        # A ramp of no width would divide by zero.
        high = high + 0.001 if low == high else high
        stretch = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
        return stretch * inverse / self.factor + (1 - stretch) * inverse


def _llama3_fields(settings: dict) -> dict:
    low, high = (positive(settings, key, where="rope") for key in ("low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise ValueError(f"config.json: low_freq_factor {low} must be below high_freq_factor {high}.")
    return {"low_frequency_factor": low, "high_frequency_factor": high}


def _yarn_fields(settings: dict) -> dict:
    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    factor = positive(settings, "factor", where="rope")
    usual = temperature(1.0)
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        weight, weight_all = (positive(settings, key, where="rope") for key in ("mscale", "mscale_all_dim"))
        usual = temperature(weight) / temperature(weight_all)
    return {
        "attention_factor": positive(settings, "attention_factor", usual, "rope"),
        "beta_fast": positive(settings, "beta_fast", 32.0, "rope"),
        "beta_slow": positive(settings, "beta_slow", 1.0, "rope"),
        "truncate": flag(settings, "truncate", True, "rope"),
    }


def _longrope_fields(hf: dict, settings: dict) -> dict:
    longest = whole(hf, "max_position_embeddings")
    original = whole(
        settings, "original_max_position_embeddings", whole(hf, "original_max_position_embeddings", longest)
    )
    factor = positive(settings, "factor", longest / original, "rope")
    if "original_max_position_embeddings" in hf or "original_max_position_embeddings" in settings:
        factor = longest / original
    usual = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "original_length": original,
        "attention_factor": positive(settings, "attention_factor", usual, "rope"),
        "short_factors": _factors(settings, "short_factor"),
        "long_factors": _factors(settings, "long_factor"),
    }


def _factors(settings: dict, key: str) -> tuple[float, ...]:
    found = required(settings, key, "rope")
    if not isinstance(found, list) or not found or len(found) > 2**15:
        raise ValueError(f"config.json: {key!r} in its rope settings must be a list of numbers, got {shown(found)}.")
    return tuple(positive({key: each}, key, where="rope") for each in found)


def rotation(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 `[batch, length, turned / 2]`, of the angles at `positions` `[batch, length]`.

    `turned` is how many numbers of a head turn, all `head_dim` but in models that turn a part.
    """
    frequencies = rope.inverse_frequencies(rope.turned(head_dim), jnp.max(positions) + 1)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Turns `x` `[batch, length, heads, head_dim]` by the angles of `rotation`, in float32; keeps the dtype of x."""
    if (turned := 2 * cosine.shape[-1]) < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :turned], cosine, sine), x[..., turned:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
