"""Intrinsic dimensions: TwoNN on sets of known dimension, hidden states as a reader would collect them, ranks of a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import normal, weight

import jlora


def flat(dimension, count=1500, coordinates=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(count, dimension)) @ rng.standard_normal((dimension, coordinates))


def test_twonn_finds_the_dimension_of_flat_sets():
    for dimension in (1, 2, 3, 5):
        assert abs(jlora.intrinsic_dimension(flat(dimension)) / dimension - 1) < 0.15


def test_twonn_is_that_of_a_plain_loop_and_blind_to_scale_turns_and_repetition():
    points = flat(3, 60)
    ratios = []
    for n, point in enumerate(points):
        distances = sorted(np.linalg.norm(point - other) for m, other in enumerate(points) if m != n)
        ratios.append(np.log(distances[1] / distances[0]))
    ratios = sorted(ratios)[:54]
    heights = [-np.log(1 - n / 60) for n in range(1, 55)]
    wanted = sum(x * y for x, y in zip(ratios, heights)) / sum(x * x for x in ratios)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))[0]
    for same in (points, 1e3 * points @ turn + 1e4, np.concatenate([points, points[:9]])):
        assert jlora.intrinsic_dimension(same) == pytest.approx(wanted, rel=1e-6)
    assert jlora.intrinsic_dimension(np.ones((50, 3))) == 0.0


def test_ranks_are_the_paper_s_or_spread_to_an_exact_budget():
    assert jlora.gelora_ranks([3.0, 5.2, 4.0, 7.1, 7.1]) == (3, 1, 4, 1)
    assert jlora.gelora_ranks([4.0] * 5) == (1, 1, 1, 1)
    assert jlora.gelora_ranks([4.0] * 5, budget=3) == (3, 3, 3, 3)
    assert jlora.gelora_ranks([0.0, 9.0, 9.0, 9.0], budget=3, most=5) == (5, 2, 2)
    assert jlora.gelora_ranks([0.0, 9.0, 9.0], most=5) == (5, 1)
    rng = np.random.default_rng(0)
    for _ in range(200):
        dimensions, budget = rng.uniform(0, 40, 1 + rng.integers(1, 9)), int(rng.integers(1, 9))
        own, ranks = (np.array(jlora.gelora_ranks(dimensions, b)) for b in (None, budget))
        assert ranks.sum() == budget * len(own) and ranks.min() >= 1
        share = budget * len(own) * own / own.sum()
        if share.min() >= 1:
            assert np.all(np.abs(ranks - share) < 1), "not by the largest remainder"
        order = np.lexsort((ranks, own))
        assert np.all(np.diff(ranks[order]) >= 0), "a layer with more of the paper's ranks got fewer"


PARAMS = {
    "embed": weight(0, 40, 8),
    "layers": {"q": weight(1, 3, 8, 8), "v": weight(2, 3, 8, 8)},
    "head": weight(3, 8, 4),
}
TOKENS = np.random.default_rng(4).integers(0, 40, (2, 60, 5))


def hidden(params, tokens):
    x = params["embed"][tokens]
    states = [x]
    for q, v in zip(params["layers"]["q"], params["layers"]["v"]):
        x = x + jnp.tanh(x @ q + x.mean(1, keepdims=True) @ v)
        states.append(x)
    return states


def loss(params, tokens):
    x = params["embed"][tokens]

    def layer(x, w):
        return x + jnp.tanh(x @ w["q"] + x.mean(1, keepdims=True) @ w["v"]), None

    x = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])[0]
    return jnp.mean((x @ params["head"]) ** 2)


def tied(params, tokens):
    x = hidden(params, tokens)[-1]
    return x @ params["embed"].T


def dimensions_by_hand(pool):
    states = [hidden(PARAMS, tokens) for tokens in TOKENS]
    return [jlora.intrinsic_dimension(np.concatenate([pool(s[n]) for s in states])) for n in range(4)]


def test_points_are_the_inputs_of_the_layers_and_of_the_head():
    spec = {"layers/.*": jlora.GeLoRA(), "head": jlora.Full()}
    found = jlora.intrinsic_dimensions(loss, PARAMS, spec, TOKENS)
    np.testing.assert_allclose(found, dimensions_by_hand(lambda x: np.asarray(x).mean(1)), rtol=1e-3)
    assert len(jlora.gelora_ranks(found)) == 3
    tokens = jlora.intrinsic_dimensions(loss, PARAMS, "layers/q", TOKENS, pooling="tokens", count=10_000)
    np.testing.assert_allclose(tokens, dimensions_by_hand(lambda x: np.asarray(x).reshape(-1, 8)), rtol=1e-3)


def test_a_head_tied_to_the_embedding_and_a_function_that_returns_states_serve_as_well():
    last = lambda x, batch: x[:, -1] * (batch[:, -1:] >= 0)
    wanted = dimensions_by_hand(lambda x: np.asarray(x)[:, -1])
    for fn in (tied, lambda params, tokens: hidden(params, tokens)[-1]):
        params = PARAMS if fn is tied else {name: PARAMS[name] for name in ("embed", "layers")}
        found = jlora.intrinsic_dimensions(fn, params, "layers/q", TOKENS, pooling=last)
        np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_what_can_t_be_measured_is_an_error():
    with pytest.raises(ValueError, match="what comes after the last layer is not to be seen"):
        jlora.intrinsic_dimensions(lambda p, t: jnp.sum(hidden(p, t)[-1]), PARAMS, "layers/q", TOKENS)
    towers = lambda p, t: loss(p, t) + loss(p, t[:, ::-1])
    with pytest.raises(ValueError, match="layers/q is used 2 times in one pass, and what goes into the uses can't be"):
        jlora.intrinsic_dimensions(towers, PARAMS, "layers/q", TOKENS)
    with pytest.raises(ValueError, match="pooling must be one of .* or a function"):
        jlora.intrinsic_dimensions(loss, PARAMS, "layers/q", TOKENS, pooling="max")
    with pytest.raises(ValueError, match="got no batch"):
        jlora.intrinsic_dimensions(loss, PARAMS, "layers/q", [])
    with pytest.raises(ValueError, match=r"needs finite points \[count, coordinates\], got shape \(3,\)"):
        jlora.intrinsic_dimension(np.ones(3))
    with pytest.raises(ValueError, match="trim must be at least 0"):
        jlora.intrinsic_dimension(normal(0, 5, 2), trim=1.0)
    with pytest.raises(ValueError, match="before and after every layer"):
        jlora.gelora_ranks([3.0])
    for budget, most in ((0, None), (5, 4)):
        with pytest.raises(ValueError, match="mean rank of a layer, must be a whole number from 1 to (any|4), got"):
            jlora.gelora_ranks([3.0, 4.0], budget, most)
