"""The models and batches on which steps are measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora.models import Llama, LlamaConfig, mean_pool
from jlora.models import load as load_model

DATA = Path(os.environ.get("JLORA_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are shape (a), `SHAPES` says what the others change."""

    shape: str = "llama"
    layers: int = 6
    width: int = 512
    hidden: int = 1408
    heads: int = 8
    vocab: int = 512
    batch: int = 4
    length: int = 256
    rank: int = 8
    dtype: str = "float32"
    repeats: int = 15


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "minilm": {"batch": 32, "length": 128},
    "scanned": {},
    # Two layers of a 7B model fill a large GPU at 16,384 tokens without filling its memory when all of them are trained.
    "gpu": {
        "layers": 2,
        "width": 4096,
        "hidden": 11008,
        "heads": 32,
        "vocab": 32000,
        "batch": 1,
        "length": 4096,
        "rank": 16,
        "dtype": "bfloat16",
    },
}


def settings_for(shape: str, **changes: Any) -> Settings:
    """The settings of a shape, with what the caller changes (None changes nothing)."""
    asked = {name: value for name, value in changes.items() if value is not None}
    return replace(Settings(shape=shape, **SHAPES[shape]), **asked)


@dataclass(frozen=True)
class Problem:
    """A model with a loss.

    Attributes:
        net: the Linen module.
        params: its params.
        batch: inputs of `loss`.
        loss: `(apply, params, batch) -> scalar`, where `apply` is the module's, perhaps lifted.
        embedding: keys of the input embedding in `params`.
        inputs: what the module is called with.
        kernels: pattern of the kernels that are adapted.
    """

    net: Any
    params: Any
    batch: Any
    loss: Callable[..., jax.Array]
    embedding: tuple[str, ...]
    inputs: tuple[Any, ...]
    kernels: Any = jlora.ALL_LINEAR


def next_token_loss(apply: Callable[..., Any], params: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of every token but the first."""
    logits = apply({"params": params}, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def sentence_loss(apply: Callable[..., Any], params: Any, batch: Any) -> jax.Array:
    """Squared distance of the sentences' vectors from given ones."""
    tokens, wanted = batch
    pooled = mean_pool(apply({"params": params}, tokens), jnp.ones(tokens.shape, bool))
    return jnp.mean((pooled - wanted) ** 2)


def problem(s: Settings) -> Problem:
    """The problem of some settings."""
    return minilm(s) if s.shape == "minilm" else llama(s)


def llama(s: Settings) -> Problem:
    """A Llama of random weights; shape "scanned" has one scanned and rematerialised stack of layers."""
    scan = s.shape == "scanned"
    dtype = jnp.dtype(s.dtype)
    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        intermediate_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        head_dim=s.width // s.heads,
        max_position_embeddings=s.length,
        rms_norm_eps=1e-5,
        scan_layers=scan,
        remat=scan,
        dtype=dtype,
        param_dtype=dtype,
    )
    net = Llama(config)
    tokens = jax.random.randint(jax.random.key(1), (s.batch, s.length), 0, s.vocab)
    params = jax.jit(net.init)(jax.random.key(0), tokens)["params"]
    return Problem(net, params, tokens, next_token_loss, ("embed_tokens", "embedding"), (tokens,))


def minilm(s: Settings) -> Problem:
    """The sentence encoder all-MiniLM-L6-v2, its real weights."""
    directory = DATA / "minilm_l6_v2"
    if not directory.is_dir():
        raise SystemExit(f"there is no {directory}; set JLORA_DATA to the folder that holds minilm_l6_v2")
    net, params = load_model(directory, scan_layers=False, param_dtype=jnp.dtype(s.dtype), dtype=jnp.dtype(s.dtype))
    tokens = jax.random.randint(jax.random.key(1), (s.batch, s.length), 1000, net.config.vocab_size)
    wanted = jax.random.normal(jax.random.key(2), (s.batch, net.config.hidden_size))
    embedding = ("embeddings", "word_embeddings", "embedding")
    return Problem(net, params, (tokens, wanted), sentence_loss, embedding, (tokens,), r"encoder/.*/kernel")


def as_text(s: Settings) -> str:
    """The settings that differ from the shape's defaults, for file names."""
    plain = asdict(settings_for(s.shape))
    return "".join(
        f"-{name}{value}" for name, value in asdict(s).items() if value != plain[name] and name not in ("repeats",)
    )
