"""A small pretrained Llama as tunix has it, with its tokenizer, for the other scripts of this folder."""

from __future__ import annotations

import jax
from jax.sharding import AxisType
from tunix.models.llama3.model import ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors

from jlora.models import STORIES260K, load_tokenizer

CONFIG = ModelConfig(
    num_layers=5,
    vocab_size=512,
    embed_dim=64,
    hidden_dim=172,
    num_heads=8,
    head_dim=8,
    num_kv_heads=4,
    rope_theta=10000,
    norm_eps=1e-5,
    weight_tying=True,
)
PROMPTS = ["Once upon a time", "One day, a girl", "Tom saw a big dog", "The little cat was"]


class Tokenizer:
    """The model's tokenizer, as tunix asks for one."""

    def __init__(self):
        self.inner = load_tokenizer(STORIES260K)

    def encode(self, text, **_):
        return list(self.inner.encode(str(text)).ids)

    def decode(self, ids, **_):
        return self.inner.decode([int(i) for i in ids])

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


def mesh():
    """One device under the names of tunix's axes."""
    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])


def load():
    """Tunix's Llama 3 with the weights of stories260K."""
    with jax.set_mesh(mesh()):
        return create_model_from_safe_tensors(str(STORIES260K), CONFIG, mesh())
