"""OLoRA and PiSSA: factors that start as a part of the weight, on a base that stays what it is."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "inits.npz"))
METHODS = {
    "olora": jlora.LoRA(rank=3, alpha=4, init="olora"),
    "pissa": jlora.LoRA(rank=3, alpha=4, init="pissa"),
    "pissa_rslora": jlora.LoRA(rank=3, alpha=4, init="pissa", scaling="rslora"),
}
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def of(name):
    return {key.removeprefix(f"{name}/"): value for key, value in GOLDEN.items() if key.startswith(f"{name}/")}


def scale_of(name):
    return 4 / (np.sqrt(3) if "rslora" in name else 3)


def trained(adapted, lifted):
    tx = jlora.optimizer(adapted, optax.adamw, learning_rate=0.02, weight_decay=0.0)

    def step(carry, _):
        p, state = carry
        gradient = jax.grad(lambda p: jnp.sum(jnp.sin(lifted(adapted.replace(params=p)))))(p)
        updates, state = tx.update(gradient, state, p)
        return (optax.apply_updates(p, updates), state), None

    p = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=6)[0][0])(adapted.params)
    return adapted.replace(params=p)


@pytest.mark.parametrize("name", METHODS)
def test_the_start_and_its_gradients_are_those_of_peft(name):
    case = of(name)
    adapted = jlora.adapterize({"w": case["w"]}, {"w": METHODS[name]})
    a, b = adapted.params["w"]["a"], adapted.params["w"]["b"]
    close(a @ b, case["a"] @ case["b"])
    close(case["w"] - scale_of(name) * (a @ b), case["residual"])
    lifted = jlora.lift(lambda params: case["x"] @ params["w"] + case["bias"])
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(lifted(adapted.replace(params=p)))))(adapted.params)["w"]
    # The factorisations leave the sign of each rank free.
    for field in "ab":
        close(np.abs(gradient[field]), np.abs(case[f"gradient/{field}"]))


@pytest.mark.parametrize("name", METHODS)
def test_six_steps_of_adamw_end_where_peft_ends(name):
    case = of(name)
    adapted = jlora.adapterize({"w": case["w"]}, {"w": METHODS[name]})
    lifted = jlora.lift(lambda params: case["x"] @ params["w"] + case["bias"])
    after = trained(adapted, lifted)
    assert not np.allclose(case["merged"], case["w"], atol=1e-2)
    close(jlora.merge(after)["w"], case["merged"], atol=2e-5)
    close(lifted(after), case["y"], atol=5e-5)


def test_dora_around_olora_ends_where_peft_ends():
    case = of("olora_dora")
    adapted = jlora.adapterize({"w": case["w"]}, {"w": jlora.DoRA(METHODS["olora"])})
    after = trained(adapted, jlora.lift(lambda params: case["x"] @ params["w"] + case["bias"]))
    close(jlora.merge(after)["w"], case["merged"], atol=5e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_4"])
def test_the_start_is_the_base_bit_for_bit_and_the_base_is_not_touched(init, dtype):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((40, 24)), dtype)
    adapted = jlora.adapterize({"w": w}, {"w": jlora.LoRA(rank=4, alpha=6, init=init)})
    x = jnp.ones((3, 40), dtype)
    assert adapted.base["w"] is w
    np.testing.assert_array_equal(jlora.lift(lambda p: x @ p["w"])(adapted), x @ w)
    np.testing.assert_array_equal(jlora.merge(adapted)["w"], w)


def test_oloras_factors_are_the_first_columns_of_the_qr_factorisation():
    w = np.random.default_rng(1).standard_normal((9, 6)).astype(np.float32)
    fields = jlora.adapterize({"w": w}, {"w": jlora.LoRA(rank=3, alpha=3, init="olora")}).params["w"]
    q, r = np.linalg.qr(w.T)
    close(fields["b"] @ fields["b"].T, np.eye(3))
    close(fields["a"] @ fields["b"], (q[:, :3] @ r[:3]).T)
    close(w[:3] - (fields["a"] @ fields["b"])[:3], np.zeros((3, 6)))  # an unpivoted QR takes whole input features


def test_pissas_factors_are_balanced_and_take_the_largest_singular_values_whatever_alpha():
    w = np.random.default_rng(2).standard_normal((9, 6)).astype(np.float32)
    sigma = np.linalg.svd(w, compute_uv=False)
    for alpha in (1.5, 6.0):
        method = jlora.LoRA(rank=3, alpha=alpha, init="pissa")
        fields = jlora.adapterize({"w": w}, {"w": method}).params["w"]
        close(fields["a"].T @ fields["a"], np.diag(sigma[:3]) / method.scale)
        close(fields["b"] @ fields["b"].T, np.diag(sigma[:3]) / method.scale)
        rest = w - method.scale * fields["a"] @ fields["b"]
        close(np.linalg.svd(rest, compute_uv=False)[:3], sigma[3:], atol=1e-4)


def test_the_randomised_svd_comes_as_close_as_its_iterations_let_it():
    rng = np.random.default_rng(3)
    u, v = np.linalg.qr(rng.standard_normal((60, 40)))[0], np.linalg.qr(rng.standard_normal((40, 40)))[0]
    w = (u * 0.8 ** np.arange(40)) @ v.T
    w = w.astype(np.float32)
    exact = jlora.adapterize({"w": w}, {"w": jlora.LoRA(rank=5, init="pissa")}).params["w"]
    errors = []
    for iterations in (0, 4):
        fast = jlora.adapterize({"w": w}, {"w": jlora.LoRA(rank=5, init=f"pissa_niter_{iterations}")}).params["w"]
        errors.append(np.linalg.norm(exact["a"] @ exact["b"] - fast["a"] @ fast["b"]))
    assert errors[1] < 1e-3 < errors[0]


def test_the_update_is_a_plain_lora_of_twice_the_rank():
    w = np.random.default_rng(4).standard_normal((12, 10)).astype(np.float32)
    adapted = jlora.adapterize({"w": w}, {"w": jlora.LoRA(rank=2, init="pissa")})
    p = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), adapted.params)
    singular = np.linalg.svd(jlora.merge(adapted.replace(params=p))["w"] - w, compute_uv=False)
    assert np.all(singular[:4] > 1e-3) and np.all(singular[4:] < 1e-5)


def test_small_updates_of_large_factors_survive_sixteen_bits():
    w = jnp.asarray(np.random.default_rng(5).standard_normal((64, 48)), jnp.bfloat16)
    adapted = jlora.adapterize({"w": w}, {"w": jlora.LoRA(rank=4, init="pissa")})
    p = jax.tree.map(lambda leaf: leaf + 1e-5 * jnp.ones_like(leaf), adapted.params)
    x = jnp.eye(64, dtype=jnp.bfloat16)

    def difference(params, x):
        """The adapter's part alone, before it is rounded into the sum."""
        return jnp.matmul(x, params["w"], preferred_element_type=jnp.float32)

    moved = jlora.lift(difference)(adapted.replace(params=p), x) - difference({"w": w}, x)
    wanted = jnp.asarray(p["w"]["a"] @ p["w"]["b"] - adapted.params["w"]["a"] @ adapted.params["w"]["b"]) * 1.0
    scale = jlora.LoRA(rank=4).scale
    np.testing.assert_allclose(moved, scale * wanted, atol=0.02 * float(jnp.abs(wanted).max()))


def test_orthogonal_factors_are_drawn_as_peft_draws_them_and_cancel():
    deviation_a, deviation_b, product = GOLDEN["orthogonal"]
    fields = jlora.adapterize({"w": jnp.zeros((256, 128))}, {"w": jlora.LoRA(rank=8, init="orthogonal")}).params["w"]
    np.testing.assert_allclose([fields["a"].std(), fields["b"].std()], [deviation_a, deviation_b], rtol=0.1)
    assert product < 1e-6 and np.abs(fields["a"] @ fields["b"]).max() < 1e-6


def test_an_odd_rank_and_an_unknown_name_are_refused():
    with pytest.raises(ValueError, match='"orthogonal" needs an even rank, got 3'):
        jlora.LoRA(rank=3, init="orthogonal")
    with pytest.raises(ValueError, match="init must be one of .*'pissa_niter_<k>'.*got 'pissa_niter_'"):
        jlora.LoRA(init="pissa_niter_")
