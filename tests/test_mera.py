"""MerA: neurons that are permuted are found again, and merged are networks and not their numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import normal, perturbed, weight

import jlora
from jlora.compose.mera import _sinkhorn

pytestmark = pytest.mark.once

PARAMS = {"stack": weight(1, 2, 6, 8), "plain": weight(2, 6, 4)}
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def adapter(seed, method=None, **others):
    method = method or jlora.Bottleneck(5, init="normal", side="output", learned_scale=True)
    spec = {"stack": jlora.Axes("batch in out", method), "plain": method} | others
    return perturbed(jlora.adapterize(PARAMS, spec, jax.random.key(0)), seed)


def permuted(adapted, seed):
    """The same function, its neurons in another order in every matrix."""

    def one(fields):
        orders = np.argsort(normal(seed, *fields["u"].shape[:-1]), axis=-1)
        d = np.take_along_axis(np.asarray(fields["d"]), orders[..., None, :], -1)
        return fields | {
            "d": jnp.asarray(d),
            "u": jnp.asarray(np.take_along_axis(np.asarray(fields["u"]), orders[..., None], -2)),
        }

    return adapted.replace(params={name: one(fields) for name, fields in adapted.params.items()})


@jax.jit
def output(adapted):
    x = normal(3, 7, 6)
    return jlora.lift(lambda params: (x @ params["plain"], x @ params["stack"][1]))(adapted)


@pytest.mark.parametrize("options", [{}, {"matching": "sinkhorn", "entropy": 0.005}])
def test_permuted_networks_merge_to_the_function_that_they_all_are(options):
    one = adapter(1)
    others = [permuted(one, seed) for seed in (2, 3)]
    assert not np.array_equal(others[0].params["plain"]["u"], others[1].params["plain"]["u"])
    merged = jlora.mera([one, *others], **options)
    jax.tree.map(close, output(merged), output(one))
    assert np.all(merged.params["stack"]["scale"] == 1)
    # Without the matching it is another function.
    mean = one.replace(
        params=jax.tree.map(lambda *each: sum(each) / 3, one.params, *(other.params for other in others))
    )
    assert np.max(np.abs(output(mean)[0] - output(one)[0])) > 0.05
    jax.tree.map(close, output(jlora.mera([one])), output(one))


def test_unlike_networks_are_averaged_after_the_cheapest_matching():
    method = jlora.Bottleneck(3, activation="gelu")
    one, two = adapter(1, method), adapter(2, method)
    merged = jlora.mera([one, two]).params["plain"]
    a, b = (each.params["plain"] for each in (one, two))

    def moved(order):
        return {"d": np.asarray(b["d"])[:, order], "u": np.asarray(b["u"])[list(order)]}

    cost = lambda order: sum(np.sum((np.asarray(a[n]) - moved(order)[n]) ** 2) for n in "du")
    best = moved(min(map(list, itertools.permutations(range(3))), key=cost))
    for name in "du":
        close(merged[name], (np.asarray(a[name]) + best[name]) / 2)


def test_a_smoothed_plan_has_rows_and_columns_that_sum_to_one():
    plan = np.asarray(_sinkhorn(jnp.abs(normal(1, 2, 6, 6)), 0.3, 200))
    close(plan.sum(-1), np.ones((2, 6)))
    close(plan.sum(-2), np.ones((2, 6)))
    assert np.all(plan > 0) and np.max(plan) < 0.99


def test_what_mera_cannot_merge_is_refused():
    one = adapter(1)
    refusals = {
        "plain: LoRA.* is no Bottleneck; MerA merges nothing else": adapter(2, plain=jlora.LoRA(2)),
        "plain: of adapters 0 and 1 only one adapts it": adapter(2, plain=None),
        "plain: adapters 0 and 1 differ there: .*rank=5.* and .*rank=4": adapter(2, plain=jlora.Bottleneck(4)),
        "stack: adapters 0 and 1 stand on different bases": one.replace(base=PARAMS | {"stack": PARAMS["stack"] + 1}),
    }
    for message, other in refusals.items():
        with pytest.raises(ValueError, match=message):
            jlora.mera([one, other])
    with pytest.raises(ValueError, match="wanted adapters, entropy and iterations above 0, got 0, 0.05 and 200"):
        jlora.mera([])
    with pytest.raises(ValueError, match="matching must be one of"):
        jlora.mera([one], matching="soft")
