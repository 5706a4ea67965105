"""The models know nothing of adapters, and the core adapts every linear layer of theirs without being told its axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models_data import GOLDEN, golden, quick_jit

import jlora
import jlora.models as models

LLAMA = {f"self_attn/{name}_proj" for name in "qkvo"} | {f"mlp/{name}_proj" for name in ("gate", "up", "down")}
BERT = {
    "attention/self/query",
    "attention/self/key",
    "attention/self/value",
    "attention/output/dense",
    "intermediate/dense",
    "output/dense",
}


def adapt(name: str, **options):
    model, params = models.load(GOLDEN / name, **options)
    sites = jlora.sites(lambda p: model.apply({"params": p}, jnp.ones((1, 4), int)), params)
    spec = {jlora.ALL_LINEAR: jlora.LoRA(rank=2, alpha=8)}
    return model, jlora.adapterize(params, spec, key=jax.random.key(0), sites=sites)


@pytest.mark.parametrize(
    "name, scan_layers, wanted",
    [
        ("qwen3", True, {f"layers/{layer}/kernel" for layer in LLAMA}),
        ("llama_linear_tied", False, {f"layers_{i}/{layer}/kernel" for i in range(3) for layer in LLAMA}),
        ("bert", True, {f"encoder/layer/{layer}/kernel" for layer in BERT}),
    ],
)
def test_all_linear_is_every_projection_but_no_head_and_no_embedding(name, scan_layers, wanted):
    _, adapted = adapt(name, scan_layers=scan_layers)
    assert {"/".join(path[:-1]) for path in flatten_dict(adapted.params)} == wanted


@pytest.mark.once
@pytest.mark.parametrize("name", ["qwen2_window_tied", "mixtral", "bert"])
def test_the_lifted_model_equals_the_merged_model_under_remat(name):
    model, adapted = adapt(name, remat=True)
    adapted = adapted.replace(params=jax.tree.map(lambda leaf: leaf + 0.1, adapted.params))
    tokens = golden(name)["tokens"]
    lifted = quick_jit(jlora.lift(model.apply, strict=True))({"params": adapted}, tokens)
    merged = quick_jit(model.apply)({"params": jlora.merge(adapted)}, tokens)
    plain = quick_jit(model.apply)({"params": adapted.base}, tokens)
    np.testing.assert_allclose(lifted, merged, atol=1e-4)
    assert np.abs(lifted - plain).max() > 0.1
