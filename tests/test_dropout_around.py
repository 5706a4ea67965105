"""`Dropout` around a method: the base sees the whole input, the update a part of it."""

import jax
import jax.numpy as jnp
import pytest
from contract.acting import Network
from contract.problems import adapt, close, jit, normal, perturbed, weight

import jlora
from jlora import Dropout, HiRA
from jlora.core.products.contraction import drop

pytestmark = pytest.mark.once

PRODUCT = lambda params, x: x @ params["w"]
RATE = 0.25


@pytest.mark.parametrize("inner", [HiRA(rank=2), Network(2)], ids=str)
def test_what_is_dropped_is_the_updates_input_alone(inner):
    x, w = normal(1, 64, 8), weight(0, 8, 6)
    adapted = perturbed(adapt({"w": w}, {"w": Dropout(inner, RATE)}))
    plain = perturbed(adapt({"w": w}, {"w": inner}))
    lifted = jit(lambda key: jlora.lift(PRODUCT)(adapted.replace(context={"dropout": key}), x))
    without = jit(lambda x: jlora.lift(PRODUCT)(plain, x))
    close(jlora.lift(PRODUCT)(adapted, x), without(x))
    y = lifted(jax.random.key(0))
    # Which entries were dropped is known by the inner update of each possible row: the mean over keys is what is left.
    outputs = jnp.stack([lifted(jax.random.key(n)) for n in range(3)])
    assert not jnp.allclose(outputs[0], outputs[1]) and jnp.array_equal(outputs[0], y)
    site, number = adapted.plan.sites[0], jlora.paths.number("w")
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), number), 1)
    few = drop(x, RATE, key)
    assert site.method.rate == RATE and jnp.mean(few == 0) == pytest.approx(RATE, abs=0.08)
    close(y, x @ w + without(few) - few @ w)


def test_the_tied_use_drops_too_and_a_use_of_the_formed_weight_is_refused_with_a_key():
    x, w = normal(1, 16, 6), weight(0, 8, 6)
    adapted = perturbed(adapt({"w": w}, {"w": Dropout(HiRA(rank=2), RATE)}))
    keyed = adapted.replace(context={"dropout": jax.random.key(0)})
    head = lambda params, x: x @ params["w"].T
    assert not jnp.allclose(jlora.lift(head)(keyed, x), jlora.lift(head)(adapted, x))
    close(jlora.lift(head)(adapted, x), x @ jlora.merge(adapted)["w"].T)
    with pytest.raises(ValueError, match="w: the effective weight has to be formed for `sin`"):
        jlora.lift(lambda params, x: jnp.sin(params["w"]))(keyed, x)


def test_methods_with_a_dropout_or_factors_of_their_own_are_refused():
    with pytest.raises(TypeError, match=r"LoRA\(rank=4\).* has some: give it its own dropout"):
        Dropout(jlora.LoRA(4))
    with pytest.raises(TypeError, match="has no dropout of its own; got LoRA"):
        Dropout(jlora.LoRA(4, dropout=0.1))
    with pytest.raises(TypeError, match="has no dropout of its own; got Full"):
        Dropout(jlora.Full())
    with pytest.raises(ValueError, match="Dropout's rate must be at least 0 and below 1, got 1"):
        Dropout(HiRA(2), rate=1.0)
