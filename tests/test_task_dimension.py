"""`intrinsic_dimension_90`: the search, and a task whose dimension is known."""

import math

import jax
import jax.numpy as jnp
import pytest

import jlora


def test_it_finds_where_a_rising_score_reaches_nine_tenths_and_tries_nothing_twice():
    for wanted in (3, 10, 11, 137, 5000):
        tried = []

        def score(dimension, wanted=wanted, tried=tried):
            tried.append(dimension)
            return 80.0 if dimension >= wanted else 10.0

        found = jlora.intrinsic_dimension_90(score, 80.0, precision=0.05)
        assert found.scores[found.dimension] == 80.0 and len(set(tried)) == len(tried)
        assert max(wanted, 10) <= found.dimension <= max(1.06 * wanted + 1, 10)
        assert found.wanted == pytest.approx(72.0) and set(found.scores) == set(tried)


def test_a_score_that_is_never_reached_or_no_number_ends_with_what_was_found():
    with pytest.raises(ValueError, match=r"no dimension up to 35 reaches 0.9: the best is 0.5, at 20"):
        jlora.intrinsic_dimension_90(lambda d: 0.5 if d == 20 else 0.1, 1.0, most=35)
    with pytest.raises(ValueError, match="the score of dimension 10 is nan"):
        jlora.intrinsic_dimension_90(lambda d: math.nan, 1.0)
    with pytest.raises(ValueError, match="wanted whole > 0"):
        jlora.intrinsic_dimension_90(lambda d: 1.0, -1.0)


@pytest.mark.long
def test_a_least_squares_task_needs_about_as_many_directions_as_it_has_targets():
    """Of n targets that are random in the weights, a random subspace of dimension d meets about d of them."""
    rows = jax.random.normal(jax.random.key(1), (12, 64)) / 8
    targets = jax.random.normal(jax.random.key(2), (12,))
    params = {"w": jnp.zeros((8, 8))}

    def score(dimension):
        adapted = jlora.adapterize(params, {"w": jlora.SAID(dimension, structure_aware=False)})
        shared = adapted.params
        flat, unflatten = jax.flatten_util.ravel_pytree(shared)
        predict = lambda v: rows @ jlora.merge(adapted.replace(params=unflatten(v)))["w"].reshape(-1)
        matrix = jax.jacobian(predict)(flat)
        best = jnp.linalg.lstsq(matrix, targets)[0]
        return float(1 - jnp.sum((matrix @ best - targets) ** 2) / jnp.sum(targets**2))

    found = jlora.intrinsic_dimension_90(score, 1.0, least=2)
    assert 6 <= found.dimension <= 12
