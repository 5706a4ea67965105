"""The cross-entropy in chunks is the plain one, with its gradients, and never has all logits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import jlora
from jlora import models
from jlora.losses import chunked_cross_entropy

ROWS, LENGTH, VOCABULARY = 2, 7, 512


@pytest.fixture(scope="module")
def shipped():
    """The shipped model, its head tied to its embedding, with adapters off their start everywhere; and a batch."""
    model, params = models.load(models.STORIES260K, scan_layers=True)
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, VOCABULARY)
    sites = jlora.sites(lambda p, tokens: model.apply({"params": p}, tokens), params, tokens)
    spec = {"layers/mlp/.*|embed_tokens/.*": jlora.LoRA(rank=2)}
    adapted = jlora.adapterize(params, spec, sites=sites, key=jax.random.key(0))
    moved = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(2), x.shape), adapted.params)
    weights = jnp.array([[1, 1, 0, 0.5, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0]], jnp.float32)
    return model, adapted.replace(params=moved), tokens, jnp.roll(tokens, -1, 1), weights


def halves(model):
    hidden = jlora.lift(lambda p, tokens: model.apply(p, tokens, return_hidden=True), unread="allow")
    return hidden, jlora.lift(lambda p, hidden: model.apply(p, from_hidden=hidden), unread="allow")


def plain(model):
    lifted = jlora.lift(model.apply)

    def loss(params, adapted, tokens, targets, weights):
        logits = lifted({"params": adapted.replace(params=params)}, tokens)
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    return loss


def in_chunks(model, chunk):
    hidden, head = halves(model)

    def loss(params, adapted, tokens, targets, weights):
        whole = {"params": adapted.replace(params=params)}
        return chunked_cross_entropy(head, whole, hidden(whole, tokens), targets, weights, chunk=chunk).loss

    return loss


@pytest.mark.once
@pytest.mark.parametrize("chunk", [3, 7])
def test_the_loss_and_the_gradients_of_adapters_and_weights_are_those_of_the_plain_one(shipped, chunk):
    model, adapted, *batch = shipped
    found, wanted = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 4)))(adapted.params, adapted, *batch)
        for loss in (in_chunks(model, chunk), plain(model))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, wanted)
    gradient = wanted[1][0]["embed_tokens"]["embedding"]["a"]
    assert np.abs(gradient).max() > 1e-3, "the head's adapter has no gradient, so nothing was compared"


def test_the_sums_are_those_of_numpy_for_a_plain_head_with_a_chunk_that_does_not_divide():
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 4))
    targets = jnp.array([[0, 1, 2, 3, 0], [3, 2, 1, 0, 3]])
    weights = jnp.array([[1, 0, 2, 1, 1], [0, 0, 1, 3, 1]], jnp.float32)
    found = chunked_cross_entropy(lambda p, h: h @ p, kernel, hidden, targets, weights, chunk=2)
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    right = logits.argmax(-1) == np.asarray(targets)
    np.testing.assert_allclose(found.loss, -(chosen * weights).sum(), rtol=1e-6)
    assert (found.weight, found.correct) == (weights.sum(), (right * weights).sum())

    def loss(kernel, hidden, weights):
        return 0.3 * chunked_cross_entropy(lambda p, h: h @ p, kernel, hidden, targets, weights, chunk=2).loss

    check_grads(loss, (kernel, hidden, weights), 1, modes="rev")


def test_no_array_of_the_program_holds_all_logits(shipped):
    model, adapted, *batch = shipped
    whole = rf"tensor<{ROWS}x{LENGTH}x{VOCABULARY}x"
    texts = [
        jax.jit(jax.grad(loss)).lower(adapted.params, adapted, *batch).as_text()
        for loss in (in_chunks(model, 3), plain(model))
    ]
    assert [bool(re.search(whole, text)) for text in texts] == [False, True]


def test_every_chunk_has_dropout_of_its_own():
    """The head alone, on equal positions: with one mask for all chunks, all would have the same logits."""
    kernel, hidden = {"kernel": jnp.ones((8, 4))}, jnp.ones((1, 6, 8))
    adapted = jlora.adapterize(kernel, {"kernel": jlora.LoRA(rank=2, dropout=0.5)}, key=jax.random.key(0))
    adapted = adapted.replace(
        params=jax.tree.map(jnp.ones_like, adapted.params), context={"dropout": jax.random.key(1)}
    )
    seen = []

    @jlora.lift
    def head(params, hidden):
        logits = hidden @ params["kernel"]
        jax.debug.callback(lambda logits: seen.append(np.array(logits)), logits)
        return logits

    jax.block_until_ready(chunked_cross_entropy(head, adapted, hidden, jnp.zeros((1, 6), int), chunk=2))
    jax.effects_barrier()
    chunks = [logits[..., 0].round(3).tolist() for logits in seen]
    assert len(chunks) == 3 and not chunks[0] == chunks[1] == chunks[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": jnp.zeros((2, 3))}, r"hidden must be \[rows, positions, width\], got shape \(2, 3\)"),
        ({"targets": jnp.zeros((2, 4), int)}, r"targets must be \[rows, positions\] = \(2, 3\), got shape \(2, 4\)"),
        ({"weights": jnp.zeros((2,))}, r"weights must be \[rows, positions\] = \(2, 3\), got shape \(2,\)"),
        ({"targets": jnp.zeros((2, 3))}, "targets must be integers, got float32"),
        ({"chunk": 0}, "chunk must be at least 1 position, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"hidden": jnp.zeros((2, 3, 4)), "targets": jnp.zeros((2, 3), int), "weights": None, "chunk": None} | change
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(lambda p, h: h @ p, jnp.zeros((4, 5)), **given)


def test_a_head_that_closes_over_what_is_differentiated_is_an_error():
    hidden, targets = jnp.ones((1, 4, 3)), jnp.zeros((1, 4), int)

    def loss(kernel):
        return chunked_cross_entropy(lambda _, h: h @ kernel, {}, hidden, targets, chunk=2).loss

    with pytest.raises(ValueError, match="the head closes over an array that is differentiated"):
        jax.grad(loss)(jnp.ones((3, 5)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "reads tokens, or hidden states by from_hidden; got neither"),
        ({"tokens": jnp.zeros((1, 2), int), "from_hidden": jnp.zeros((1, 2, 64))}, "got both"),
    ],
)
def test_a_llama_reads_tokens_or_hidden_states(shipped, given, message):
    model, adapted, *_ = shipped
    with pytest.raises(ValueError, match=message):
        model.apply({"params": adapted.base}, **given)


def test_hidden_states_for_a_model_without_its_head_are_refused(shipped):
    model, adapted, *_ = shipped
    headless = model.clone(config=dataclasses.replace(model.config, language_head=False))
    with pytest.raises(ValueError, match="from_hidden wants a model with a head"):
        headless.apply({"params": adapted.base}, from_hidden=jnp.zeros((1, 2, 64)))


@pytest.mark.once
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_target_below_zero_counts_for_nothing_without_weight_and_is_no_word_with_one(chunk):
    head = lambda w, hidden: hidden @ w
    w, hidden = jnp.ones((3, 200)) * jnp.arange(200), jnp.ones((1, 2, 3))
    of = lambda targets, weights: chunked_cross_entropy(
        head, w, hidden, jnp.array([targets]), jnp.array([weights]), chunk=chunk
    )
    assert of([7, -100], [1.0, 0.0]).loss == of([7, 3], [1.0, 0.0]).loss
    assert jnp.isnan(of([7, -100], [1.0, 1.0]).loss) and not jnp.isnan(of([7, 100], [1.0, 1.0]).loss)
    few = chunked_cross_entropy(
        lambda w, hidden: hidden @ w, w[:, :5], hidden, jnp.array([[1, -100]]), jnp.array([[1, 0]])
    )
    assert jnp.isfinite(few.loss)


@pytest.mark.once
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("told", ["slots of tokens", "slots of rows", "weights of tokens", "weights of rows"])
def test_a_head_in_a_bank_takes_what_is_chosen_for_each_token(chunk, told):
    params = {"head": jax.random.normal(jax.random.key(0), (4, 7))}
    adapted = jlora.adapterize(params, {"head": jlora.LoRA(rank=2)})
    one, two = (adapted.replace(params=jax.tree.map(lambda x: x + n, adapted.params)) for n in (0.1, -0.2))
    bank = jlora.Bank.of(params, {"one": one, "two": two})
    head = jlora.lift(lambda params, hidden: hidden @ params["head"])
    hidden = jax.random.normal(
        jax.random.key(1), (2, 3, 4)
    )  # as many positions as slots, and no whole number of chunks
    targets, slots = jnp.array([[1, 2, 3], [4, 5, 6]]), np.array([[0, 1, 2], [2, 2, 1]])
    slots = slots if "tokens" in told else np.array([2, 1])
    given = {"slot": slots} if "slots" in told else {"weights": np.eye(3, dtype=np.float32)[slots]}

    def loss(hidden, chunk):
        return chunked_cross_entropy(head, bank.on(**given), hidden, targets, chunk=chunk).loss

    found, gradient = jax.value_and_grad(loss)(hidden, chunk)
    alone = jnp.stack([head(each, hidden) for each in (adapted, one, two)])
    chosen = np.broadcast_to(slots if slots.ndim == 2 else slots[:, None], (2, 3))
    logits = jnp.take_along_axis(alone, chosen[None, ..., None], axis=0)[0]
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, targets).sum()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(loss)(hidden, 3), rtol=1e-5, atol=1e-6)
