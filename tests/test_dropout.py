"""Dropout: only where a key is given, of its own at every site, layer, step and call, and right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import jit
from jax import lax

import jlora

LORA = jlora.LoRA(rank=2, init="random", dropout=0.5)
X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), jnp.float32)
W = jnp.eye(8)


def with_key(adapted, number):
    return adapted.replace(context={"dropout": jax.random.key(number)})


def product(params):
    return X @ params["w"]


@pytest.fixture(scope="module", params=[LORA, jlora.DoRA(LORA)], ids=str)
def adapted(request):
    return jlora.adapterize({"w": W}, {"w": request.param})


@pytest.mark.once
def test_without_a_key_nothing_is_dropped(adapted):
    np.testing.assert_allclose(jlora.lift(product)(adapted), product(jlora.merge(adapted)), rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_a_key_drops_and_the_same_key_drops_the_same(adapted):
    lifted = jax.jit(jlora.lift(product))
    one, again, two, none = (
        lifted(with_key(adapted, 1)),
        lifted(with_key(adapted, 1)),
        lifted(with_key(adapted, 2)),
        lifted(adapted),
    )
    assert np.array_equal(one, again)
    assert not np.allclose(one, two, atol=1e-3)
    assert not np.allclose(one, none, atol=1e-3)


@pytest.mark.once
def test_an_old_style_key_does_as_well(adapted):
    old = adapted.replace(context={"dropout": jax.random.PRNGKey(1)})
    assert np.array_equal(jlora.lift(product)(old), jlora.lift(product)(with_key(adapted, 1)))


@pytest.mark.once
def test_without_dropout_a_key_changes_nothing():
    adapted = jlora.adapterize({"w": W}, {"w": jlora.LoRA(rank=2, init="random")})
    assert np.array_equal(jlora.lift(product)(with_key(adapted, 1)), jlora.lift(product)(adapted))


@pytest.mark.once
def test_the_mean_over_keys_is_the_output_without_dropout(adapted):
    lifted = jlora.lift(product)
    keys = jax.random.split(jax.random.key(0), 4000)
    outputs = jax.jit(jax.vmap(lambda key: lifted(adapted.replace(context={"dropout": key}))))(keys)
    error = jnp.abs(outputs.mean(0) - lifted(adapted)) / (outputs.std(0) / np.sqrt(4000) + 1e-6)
    assert float(error.max()) < 5
    assert float(outputs.std(0).min()) > 1e-3


@pytest.mark.once
def test_about_the_stated_share_of_inputs_is_dropped_and_the_base_is_untouched():
    lora = jlora.LoRA(rank=1, alpha=1, dropout=0.25)
    adapted = jlora.adapterize({"w": jnp.zeros((4096, 1))}, {"w": lora})
    ones = {"w": {"a": jnp.ones((4096, 1)), "b": jnp.ones((1, 1))}}
    kept = jlora.lift(lambda p: jnp.eye(4096) @ p["w"])(with_key(adapted.replace(params=ones), 0)) * 0.75
    assert set(np.unique(np.round(kept, 5))) == {0.0, 1.0}
    assert abs(float(kept.mean()) - 0.75) < 0.03


def dropped_inputs(fn, params, spec, number=0):
    """What an adapter with ones as factors lets through of an input of ones, for every use of a weight."""
    adapted = jlora.adapterize(params, spec)
    ones = jax.tree.map(jnp.ones_like, adapted.params)
    return np.asarray(jax.jit(jlora.lift(fn))(with_key(adapted.replace(params=ones), number)))


EYE = jnp.eye(64)
SEEN = jlora.LoRA(rank=1, alpha=1, dropout=0.5)


def all_differ(masks):
    masks = [mask.tobytes() for mask in masks]
    return len(set(masks)) == len(masks)


@pytest.mark.once
def test_two_sites_and_two_uses_of_one_site_drop_differently():
    params = {name: jnp.zeros((64, 1)) for name in "uv"}
    masks = dropped_inputs(lambda p: jnp.stack([EYE @ p["u"], EYE @ p["v"], EYE @ p["u"]]), params, {".": SEEN})
    assert all_differ(masks)


@pytest.mark.once
def test_every_layer_of_a_scanned_stack_drops_differently():
    spec = {"w": jlora.Axes("batch in out", SEEN)}
    masks = dropped_inputs(
        lambda p: lax.scan(lambda c, w: (c, EYE @ w), 0, p["w"])[1], {"w": jnp.zeros((3, 64, 1))}, spec
    )
    assert all_differ(masks)


@pytest.mark.once
def test_every_layer_of_an_unrolled_stack_drops_differently():
    spec = {"w": jlora.Axes("batch in out", SEEN)}
    masks = dropped_inputs(lambda p: jnp.stack([EYE @ p["w"][n] for n in range(3)]), {"w": jnp.zeros((3, 64, 1))}, spec)
    assert all_differ(masks)


@pytest.mark.once
def test_every_step_of_a_loop_over_one_weight_drops_differently():
    scanned = dropped_inputs(
        lambda p: lax.scan(lambda c, _: (c, EYE @ p["w"]), 0, length=3)[1], {"w": jnp.zeros((64, 1))}, {"w": SEEN}
    )
    assert all_differ(scanned)

    def looped(p):
        return lax.fori_loop(0, 3, lambda n, out: out.at[n].set(EYE @ p["w"]), jnp.zeros((3, 64, 1)))

    assert all_differ(dropped_inputs(looped, {"w": jnp.zeros((64, 1))}, {"w": SEEN}))


@pytest.mark.once
def test_every_step_of_a_while_loop_over_one_weight_drops_differently():
    def looped(p):
        step = lambda s: (s[0] + 1, s[1].at[s[0]].set(EYE @ p["w"]))
        return lax.while_loop(lambda s: s[0] < 3, step, (0, jnp.zeros((3, 64, 1))))[1]

    assert all_differ(dropped_inputs(looped, {"w": jnp.zeros((64, 1))}, {"w": SEEN}))


@pytest.mark.once
def test_matrices_that_a_mapped_index_takes_out_of_a_stack_drop_differently():
    spec = {"w": jlora.Axes("batch in out", SEEN)}
    adapted = with_key(jlora.adapterize({"w": jnp.zeros((3, 64, 1))}, spec), 0)
    ones = adapted.replace(params=jax.tree.map(jnp.ones_like, adapted.params))
    for take in (lambda w, n: w[n], lambda w, n: jnp.take(w, n, axis=0)):
        lifted = jlora.lift(lambda p, n, take=take: EYE @ take(p["w"], n))
        assert all_differ(np.asarray(jit(jax.vmap(lifted, in_axes=(None, 0)))(ones, jnp.arange(3))))


@pytest.mark.once
def test_a_transposed_use_drops_entries_of_its_own_input():
    masks = dropped_inputs(
        lambda p: jnp.stack([EYE @ p["w"].T, EYE @ p["w"].T]), {"w": jnp.zeros((1, 64))}, {"w": SEEN}
    )
    assert set(np.unique(masks)) == {0.0, 2.0} and all_differ(masks)


@pytest.mark.once
def test_experts_of_a_batched_product_drop_differently():
    spec = {"w": jlora.Axes("batch in out", SEEN)}
    masks = dropped_inputs(lambda p: jnp.einsum("xi,eio->exo", EYE, p["w"]), {"w": jnp.zeros((3, 64, 1))}, spec)
    assert all_differ(masks)


def test_the_next_call_drops_differently_with_the_next_key():
    masks = [
        dropped_inputs(lambda p: EYE @ p["w"], {"w": jnp.zeros((64, 1))}, {"w": SEEN}, number) for number in range(3)
    ]
    assert all_differ(masks)


def test_the_recomputed_forward_of_a_checkpoint_drops_the_same():
    adapted = jlora.adapterize({"w": W}, {"w": LORA})

    def loss(p, wrap):
        fn = wrap(lambda params, x: jnp.sum(jnp.sin(jnp.tanh(x @ params["w"]))))
        return jlora.lift(lambda params: fn(params, X))(with_key(adapted.replace(params=p), 3))

    plain = jax.grad(loss)(adapted.params, lambda f: f)
    checkpointed = jax.grad(loss)(adapted.params, jax.checkpoint)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), checkpointed, plain)


@pytest.mark.once
@pytest.mark.parametrize("method", [LORA, jlora.DoRA(LORA)])
def test_a_number_times_the_weight_multiplies_all_of_a_dropped_product(method):
    adapted = with_key(jlora.adapterize({"w": W}, {"w": method}), 0)
    adapted = adapted.replace(params=jax.tree.map(lambda x: x + 0.1, adapted.params))
    once = jlora.lift(lambda p: X @ p["w"])(adapted)
    np.testing.assert_allclose(jlora.lift(lambda p: X @ (3 * p["w"]))(adapted), 3 * once, rtol=1e-5, atol=1e-5)


@pytest.mark.once
def test_dropout_where_the_weight_has_to_be_formed_is_refused_with_path_and_line():
    adapted = jlora.adapterize({"layer": {"w": W}}, {"layer/w": LORA})
    lifted = jlora.lift(lambda p: X @ jnp.tanh(p["layer"]["w"]))
    with pytest.raises(
        ValueError,
        match=r"layer/w: the effective weight has to be formed for `tanh` at .*test_dropout.py:\d+ .*Set dropout=0",
    ):
        lifted(with_key(adapted, 0))
    assert lifted(adapted).shape == X.shape


@pytest.mark.once
def test_changing_keys_do_not_retrace():
    traces = []

    def fn(params):
        traces.append(1)
        return product(params)

    lifted = jax.jit(jlora.lift(fn))
    adapted = jlora.adapterize({"w": W}, {"w": LORA})
    for number in range(4):
        lifted(with_key(adapted, number))
    assert len(traces) == 1
