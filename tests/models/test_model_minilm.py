"""MiniLM's sentence embeddings are those of its reference, from sharded float16 files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_data import shared_data

import jlora.models as models

pytestmark = pytest.mark.once

FOLDER = shared_data("minilm_l6_v2")
REFERENCE = json.loads((FOLDER / "reference.json").read_text())


def test_tokens_and_embeddings_agree_with_the_reference():
    encodings = models.load_tokenizer(FOLDER).encode_batch(REFERENCE["sentences"])
    assert [encoding.ids for encoding in encodings] == REFERENCE["token_ids"]
    length = max(map(len, REFERENCE["token_ids"]))
    tokens = np.array([ids + [0] * (length - len(ids)) for ids in REFERENCE["token_ids"]])
    model, params = models.load(FOLDER)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float16"}

    @jax.jit
    def embed(params, tokens):
        mask = tokens != 0
        pooled = models.mean_pool(model.apply({"params": params}, tokens, attention_mask=mask), mask)
        return pooled / jnp.sqrt((pooled**2).sum(-1, keepdims=True))

    embeddings = np.asarray(embed(params, tokens))
    cosines = (embeddings * np.array(REFERENCE["embeddings"])).sum(-1)
    assert cosines.min() > 0.99999
    np.testing.assert_allclose(embeddings @ embeddings.T, REFERENCE["cosine"], atol=1e-3)
