"""LoraHub: the search is that of the authors' optimizer, what is searched is the product of summed factors."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import normal, perturbed, weight

import jlora
from jlora.compose import lorahub
from jlora.compose.lorahub import search

pytestmark = pytest.mark.once

GOLDEN = np.load(Path(__file__).parent / "golden" / "lorahub.npz")
PARAMS = {"stack": weight(1, 2, 6, 8), "plain": weight(2, 6, 4)}
LORA = jlora.LoRA(2, alpha=3)


def adapter(seed, stack=LORA, plain=LORA):
    spec = {"stack": stack and jlora.Axes("batch in out", stack), "plain": plain}
    return perturbed(jlora.adapterize(PARAMS, spec, jax.random.key(0)), seed)


def change(adapted):
    return {name: np.asarray(leaf - PARAMS[name]) for name, leaf in jlora.merge(adapted).items()}


def test_the_points_tried_are_those_of_the_authors_optimizer():
    def objective(point):
        return float(np.sum((point - GOLDEN["least"]) ** 2) + 0.05 * np.mean(np.abs(point)))

    tried, objectives = search(objective, 6, 40, 1.5)
    assert tried.shape == GOLDEN["tried"].shape
    # Further on, another release of scipy may choose others.
    np.testing.assert_allclose(tried[:8], GOLDEN["tried"][:8], atol=1e-9)
    np.testing.assert_allclose(min(objectives), objective(GOLDEN["best"]), rtol=0.05)


@pytest.mark.parametrize("size, steps", [(1, 40), (3, 50), (30, 12)])
def test_a_search_makes_all_its_steps_within_its_bounds(size, steps):
    tried, objectives = search(lambda point: float(np.sum((point - 9) ** 2)), size, steps, 1.5)
    assert tried.shape == (steps, size) and np.max(np.abs(tried)) <= 1.5 and not np.any(tried[0])
    assert size == 30 or np.max(np.abs(tried[np.argmin(objectives)] - 1.5)) < 0.05


def test_weights_are_found_that_make_known_factors():
    one, two, wanted = adapter(1), adapter(2), np.array([0.8, -0.4])
    sides = [{name: 0.8 * x - 0.4 * y for name, x, y in zip("ab", *(each.params[leaf].values() for each in (one, two)))}
             for leaf in ("stack", "plain")]  # fmt: skip
    target = one.replace(params=dict(zip(("stack", "plain"), sides)))
    lines = []

    def loss(adapted):
        return sum(
            jnp.sum((x - y) ** 2) for x, y in zip(*(map(jlora.merge(each).get, PARAMS) for each in (adapted, target)))
        )

    hub = jlora.lorahub([one, two], loss, steps=60, penalty=0.0, say=lines.append)
    # Both signs of all weights make the same product.
    np.testing.assert_allclose(hub.weights * np.sign(hub.weights[0]), wanted, atol=5e-3)
    np.testing.assert_allclose(
        hub.objectives[0], float(loss(one.replace(params=jax.tree.map(jnp.zeros_like, one.params)))), rtol=1e-5
    )
    assert [site.method for site in hub.adapted.plan.sites] == [LORA, LORA]
    assert lines[0].startswith("LoraHub  1/60") and len(lines) < 60
    penalized = jlora.lorahub([one, two], loss, steps=5, penalty=0.5)
    np.testing.assert_allclose(
        penalized.objectives,
        [hub.objectives[n] + 0.5 * np.mean(np.abs(hub.tried[n])) for n in range(3)] + list(penalized.objectives[3:]),
        rtol=1e-5,
    )


def test_the_update_is_quadratic_in_the_weights():
    one, two = adapter(1), adapter(2)
    at = lambda *weights: change(lorahub._summed(PARAMS, *lorahub._stacked([one, two]), jnp.array(weights)))
    for leaf in PARAMS:
        assert not np.any(at(0.0, 0.0)[leaf])
        np.testing.assert_allclose(at(0.0, 1.0)[leaf], change(two)[leaf], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(at(1.0, -0.6)[leaf], 4 * at(0.5, -0.3)[leaf], rtol=1e-4, atol=1e-6)


def test_what_has_no_sum_is_refused():
    loss = lambda adapted: jnp.sum(jlora.merge(adapted)["plain"])
    refusals = {
        "stack: of adapters 0 and 1 only one changes it": adapter(2, stack=None),
        "plain: factors and scales must be equal .* got .* 1.5.* and .* 2.0": adapter(2, plain=jlora.LoRA(2, alpha=4)),
        "plain: factors and scales must be equal": adapter(2, plain=jlora.LoRA(3, alpha=4.5)),
        "plain: SineLoRA.* has no factors": adapter(2, plain=jlora.SineLoRA(2)),
        "plain: adapters 0 and 1 stand on different bases": adapter(2).replace(
            base=PARAMS | {"plain": normal(3, 6, 4)}
        ),
    }
    for message, other in refusals.items():
        with pytest.raises((ValueError, TypeError), match=message):
            jlora.lorahub([adapter(1), other], loss)
    with pytest.raises(ValueError, match="wanted adapters, steps and a bound above 0, got 0, 40 and 1.5"):
        jlora.lorahub([], loss)
    with pytest.raises(ValueError, match="the loss of the base, where all weights are 0, is nan"):
        jlora.lorahub([adapter(1)], lambda adapted: jnp.sum(jlora.merge(adapted)["plain"]) * jnp.nan)
