"""EVA, CorDA and LoRA-GA: starts from inputs and gradients are PEFT's, and end after training where PEFT ends."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "data_inits.npz"))
X = jnp.asarray(GOLDEN["x"])
HALVES = list(X.reshape(2, 20, 14))
INITS = ["eva", "corda", "lora_ga"]
LONG = ["corda_kpm", "lora_ga_ArBr_unit", "lora_ga_A2rBr_gd_scale", "lora_ga_weight_svd", "lora_ga_stable_64"]
INITS += [pytest.param(name, marks=pytest.mark.long) for name in LONG]
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def base_of(name):
    stem = "lora_ga_base" if name.startswith("lora_ga") else "base"
    return {str(n): {part: GOLDEN[f"{stem}/{n}/{part}"] for part in ("weight", "bias")} for n in range(3)}


def model(params, x):
    for n in range(3):
        x = jnp.tanh(x @ params[str(n)]["weight"] + params[str(n)]["bias"])
    return x


def loss_fn(params, x):
    return jnp.sum(jnp.sin(model(params, x))) / 10


def method_of(name):
    return jlora.EVA(rank=3, alpha=4) if name == "eva_rho" else jlora.LoRA(rank=3, alpha=4, init=name)


def start_of(name):
    params, spec = base_of(name), {".*/weight": method_of(name)}
    prepared = jlora.prepare(params, spec, loss_fn, [X] if name.startswith("eva") else HALVES)
    return jlora.adapterize(params, spec, prepared=prepared)


def signed(adapted, name):
    """The start with the sign of each rank as PEFT has it, which a singular value decomposition leaves free."""
    params, frozen = jax.device_get((adapted.params, adapted.frozen))
    for n in "012":
        for field, axis in (("a", 0), ("b", 1)):
            ours, theirs = params[n]["weight"][field], GOLDEN[f"{name}/{n}/{field}"]
            sign = np.where((ours * theirs).sum(axis, keepdims=True) < 0, -1, 1).astype(np.float32)
            params[n]["weight"][field] = ours * sign
            if f"{field}0" in frozen.get(n, {}).get("weight", {}):
                frozen[n]["weight"][f"{field}0"] = frozen[n]["weight"][f"{field}0"] * sign
    return adapted.replace(params=params, frozen=frozen)


def plain(adapted, name):
    """PEFT's numbers beside jlora's, without the ranks that are out of use."""
    for n in "012":
        gate = adapted.frozen.get(n, {}).get("weight", {}).get("gate", np.ones(3)) != 0
        yield n, {field: adapted.params[n]["weight"][field].compress(gate, axis=f) for f, field in ((1, "a"), (0, "b"))}


@jax.jit
def gradient_of(adapted):
    return jax.grad(lambda p: jlora.lift(loss_fn)(adapted.replace(params=p), X))(adapted.params)


@jax.jit
def trained(adapted):
    tx = jlora.optimizer(adapted, optax.adamw, learning_rate=0.02, weight_decay=0.0)

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(gradient_of(adapted.replace(params=p)), state, p)
        return (optax.apply_updates(p, updates), state), None

    p = jax.lax.scan(step, (adapted.params, tx.init(adapted.params)), length=6)[0][0]
    return adapted.replace(params=p)


@pytest.mark.parametrize("name", INITS)
def test_starts_gradients_and_six_steps_are_those_of_peft(name):
    adapted = signed(start_of(name), name)
    gradient = jax.device_get(gradient_of(adapted))
    after = trained(adapted)
    close(jlora.lift(model)(adapted, X), model(base_of(name), X))
    for n in "012":
        for field in "ab":
            for what, ours in (("", adapted.params), ("gradient/", gradient)):
                theirs = GOLDEN[f"{name}/{n}/{what}{field}"]
                bound = 1e-3 * np.abs(theirs).max()
                close(ours[n]["weight"][field], theirs, rtol=1e-3, atol=bound, err_msg=f"{n} {what}{field}")
        close(jlora.merge(after)[n]["weight"], GOLDEN[f"{name}/{n}/merged"], atol=1e-4)
    close(jlora.lift(model)(after, X), GOLDEN[f"{name}/y"], atol=1e-4)


def test_eva_gives_ranks_to_the_matrices_that_peft_gives_them():
    adapted = start_of("eva_rho")
    theirs = {n: GOLDEN[f"eva_rho/{n}/a"] for n in "012"}
    assert jlora.ranks(adapted) == {f"{n}/weight": a.shape[1] for n, a in theirs.items()}
    assert sorted(jlora.ranks(adapted).values()) != [3, 3, 3]
    after = trained(adapted)
    for n in "012":
        fields, r = adapted.params[n]["weight"], theirs[n].shape[1]
        ours = fields["a"][:, :r]
        close(ours * np.sign((ours * theirs[n]).sum(0)), theirs[n], atol=1e-4)
        assert not fields["a"][:, r:].any() and not after.params[n]["weight"]["b"][r:].any()
        close(jlora.merge(after)[n]["weight"], GOLDEN[f"eva_rho/{n}/merged"], atol=1e-4)
    close(jlora.lift(model)(jlora.compact(after), X), GOLDEN["eva_rho/y"], atol=1e-4)


def factors(method, w, statistics):
    start = method.start(jax.random.key(0), jnp.asarray(w), None, **jax.tree.map(jnp.asarray, statistics))
    return jax.device_get({**start.frozen, **start.params})


def test_of_isotropic_inputs_corda_is_pissa_up_to_the_balance_of_its_factors():
    w = np.random.default_rng(0).standard_normal((9, 7)).astype(np.float32)
    for name, least in (("corda", False), ("corda_kpm", True)):
        statistics = {"normalised_covariance": 5 * np.eye(9, dtype=np.float32)}
        found = factors(jlora.LoRA(2, alpha=3, init=name), w, statistics)
        u, sigma, vt = np.linalg.svd(w, full_matrices=False)
        u, sigma, vt = (u[:, -2:], sigma[-2:], vt[-2:]) if least else (u[:, :2], sigma[:2], vt[:2])
        close(1.5 * found["a"] @ found["b"], (u * sigma) @ vt)
        close(found["b"] @ found["b"].T, np.diag(sigma * 5.05 / 1.5))


def test_corda_doubles_the_damping_until_the_inverse_is_one():
    rng = np.random.default_rng(1)
    q, w = np.linalg.qr(rng.standard_normal((3, 3)))[0], rng.standard_normal((3, 4))
    mean = 3 / 3.01
    covariance = (q * [2, 1, -0.01 * mean]) @ q.T  # with 0.01 of its mean diagonal it has no inverse
    found = factors(
        jlora.LoRA(2, alpha=2, init="corda"), np.float32(w), {"normalised_covariance": np.float32(covariance)}
    )
    damped = covariance + 0.02 * mean * np.eye(3)
    u, sigma, vt = np.linalg.svd(damped @ w, full_matrices=False)
    close(found["a"] @ found["b"], np.linalg.inv(damped) @ (u[:, :2] * sigma[:2]) @ vt[:2], rtol=1e-3, atol=1e-3)


def test_lora_ga_at_random_takes_the_same_triplets_for_both_factors():
    gradient = np.random.default_rng(3).standard_normal((9, 7)).astype(np.float32)
    found = factors(jlora.LoRA(3, init="lora_ga_random_unit"), gradient, {"gradient": gradient})
    u, sigma, vt = np.linalg.svd(gradient, full_matrices=False)
    chosen = np.abs(u.T @ found["a"]).argmax(0)
    assert len(set(chosen.tolist())) == 3 and max(chosen) < 6
    close(found["a"] @ found["b"], (u * sigma)[:, chosen] @ vt[chosen], atol=1e-4)


def test_directions_whose_signs_a_decomposition_leaves_free_have_their_largest_entry_positive():
    rng = np.random.default_rng(3)
    gradient, q = rng.standard_normal((9, 7)).astype(np.float32), np.linalg.qr(rng.standard_normal((9, 9)))[0]
    positive = lambda u: np.sign(u[np.abs(u).argmax(0), range(u.shape[1])])
    u, sigma, vt = np.linalg.svd(gradient, full_matrices=False)
    found = factors(jlora.LoRA(3, init="lora_ga_unit"), gradient, {"gradient": gradient})
    close(found["a"], (u * positive(u))[:, :3])
    close(found["b"], ((sigma * positive(u))[:, None] * vt)[3:6])
    inputs = {"covariance": np.float32(q * np.arange(9, 0, -1) @ q.T), "mean": np.zeros(9, np.float32)}
    close(factors(jlora.LoRA(3, init="eva"), gradient, inputs)["a"], (q * positive(q))[:, :3])


def test_lora_ga_takes_two_triplets_a_rank_and_refuses_matrices_that_have_fewer():
    with pytest.raises(ValueError, match=r"w, shape \(9, 7\): LoRA-GA takes 8 singular vectors .* use rank 3 or less"):
        jlora.adapterize({"w": jnp.zeros((9, 7))}, {"w": jlora.LoRA(4, init="lora_ga")})


def test_what_is_looked_up_has_no_input_to_start_from():
    params, spec = {"w": jnp.ones((9, 4))}, {"w": jlora.Axes("in out", jlora.EVA(2), kind="gather")}
    with pytest.raises(
        ValueError, match='w, shape .*the init "eva" is of inputs, and a lookup has none; use "default"'
    ):
        jlora.adapterize(params, spec)


def test_names_and_numbers_out_of_range_are_refused():
    with pytest.raises(
        ValueError, match="init must be one of .*'lora_ga_<direction>_<scale>'.*'stable_<gamma>'.*got 'lora_ga_unit_"
    ):
        jlora.LoRA(init="lora_ga_unit_64")
    with pytest.raises(ValueError, match="EVA's rho must be finite and at least 1, got 0.5"):
        jlora.EVA(rho=0.5)
    with pytest.raises(TypeError, match="can't begin LoRA.* anew: it starts from data"):
        jlora.Chain(jlora.LoRA(init="corda"), links=2)


def test_dora_around_a_start_from_data_starts_at_the_base():
    params = base_of("eva")
    spec = {"0/weight": jlora.DoRA(jlora.LoRA(2, init="corda")), "1/weight": jlora.DoRA(jlora.EVA(2))}
    adapted = jlora.adapterize(params, spec, prepared=jlora.prepare(params, spec, loss_fn, HALVES))
    close(jlora.lift(model)(adapted, X), model(params, X))
    assert {"a0", "b0"} <= set(adapted.frozen["0"]["weight"]) and sum(jlora.ranks(adapted).values()) == 2


def test_adapters_that_start_from_data_go_to_peft_and_come_back(tmp_path):
    params = base_of("eva")
    spec = {
        "0/weight": jlora.LoRA(2, init="corda"),
        "1/weight": jlora.LoRA(2, init="lora_ga"),
        "2/weight": jlora.EVA(2),
    }
    adapted = trained(jlora.adapterize(params, spec, prepared=jlora.prepare(params, spec, loss_fn, HALVES)))
    names = {r"(?P<n>\d)/weight": "layers.{n}"}
    jlora.save_peft(tmp_path / "peft", adapted, names)
    again = jlora.load_peft(tmp_path / "peft", params, names)
    assert [str(site.method) for site in again.plan.sites][:2] == [str(spec[f"{n}/weight"]) for n in range(2)]
    (tmp_path / "peft" / "jlora_manifest.json").unlink()
    plain = jlora.load_peft(tmp_path / "peft", params, names)
    assert [site.method.rank for site in plain.plan.sites][:2] == [4, 4]
    for loaded in (again, plain):
        jax.tree.map(partial(close, atol=1e-4), jlora.merge(loaded), jlora.merge(adapted))
