"""Latent consistency distillation: whole steps and samples are those of diffusers and PEFT, and LCM + style is a sum."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import normal, perturbed

import jlora
from jlora.losses import DiffusionSchedule, consistency_distillation, lcm_sample
from jlora.losses.latent_consistency import both_ends, draws

pytestmark = pytest.mark.once

GOLDEN = np.load(Path(__file__).parent / "golden" / "lcm.npz")
SOLVER, RATE, STEPS, DECAY = 10, 3e-3, 5, 0.8
GUIDANCE, HUBER = (1.0, 4.0), 1e-2
CASES = {
    "epsilon": ("epsilon", HUBER, False, GUIDANCE),
    "sample": ("sample", None, False, GUIDANCE),
    "v_prediction": ("v_prediction", HUBER, True, GUIDANCE),
    "unguided": ("epsilon", HUBER, False, None),
}
BASE = {name: jnp.asarray(GOLDEN[name]) for name in ("up", "down")}
X0, CONDITION, NOISE = (jnp.asarray(GOLDEN[name]) for name in ("x0", "condition", "noise"))
LORA = jlora.LoRA(2, alpha=8)  # PEFT's alpha by default, as in the authors' script


def model(params, z, t, condition):
    return jnp.tanh(jnp.concatenate([z, t[:, None] / 100, condition], axis=1) @ params["up"]) @ params["down"]


fn = jlora.lift(model)


def schedule_of(prediction="epsilon"):
    return DiffusionSchedule(GOLDEN["alphas"], prediction, SOLVER)


def factors(case, state=""):
    return {name: {side: jnp.asarray(GOLDEN[f"{case}_{state}{name}_{side}"]) for side in "ab"} for name in BASE}


@pytest.mark.parametrize("case", CASES)
def test_whole_steps_and_samples_are_those_of_diffusers_and_peft(case):
    prediction, huber, averaged, guidance = CASES[case]
    schedule, none = schedule_of(prediction), None if guidance is None else jnp.zeros_like(CONDITION)
    adapted = jlora.adapterize(BASE, dict.fromkeys(BASE, LORA)).replace(params=factors(case, "start_"))
    tx = optax.adam(RATE)

    @jax.jit
    def step(params, average, state, key):
        def loss(p):
            target = adapted.replace(params=average) if averaged else None
            whole, options = adapted.replace(params=p), {"guidance": guidance, "huber": huber, "target": target}
            return consistency_distillation(fn, whole, X0, CONDITION, none, key, schedule, **options)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, 1 - DECAY), state, value

    params, average, state, losses = adapted.params, adapted.params, tx.init(adapted.params), []
    for number in range(STEPS):
        params, average, state, value = step(params, average, state, jax.random.key(number))
        losses.append(value)
    np.testing.assert_allclose(losses, GOLDEN[f"{case}_losses"], rtol=2e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), params, factors(case))

    trained = adapted.replace(params=factors(case))
    for steps in (1, 4):
        found = lcm_sample(fn, trained, NOISE, CONDITION, jax.random.key(9), schedule, steps=steps)
        wanted = GOLDEN[f"{case}_sampled_{steps}"]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_model_that_knows_the_truth_is_consistent_from_any_timestep(prediction):
    """In float64 by hand: at timestep 0 the function is the identity, elsewhere the scalings of the true image."""
    schedule, t = schedule_of(prediction), np.array([0, 9, 39, 99, 0, 1, 50, 98])
    x0, noise, alphas = (np.asarray(each, np.float64) for each in (X0, NOISE, GOLDEN["alphas"]))
    alpha, sigma = np.sqrt(alphas[t])[:, None], np.sqrt(1 - alphas[t])[:, None]
    z = alpha * x0 + sigma * noise
    output = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[prediction]
    jz, joutput = jnp.asarray(z, jnp.float32), jnp.asarray(output, jnp.float32)
    for found, wanted in zip(schedule.predicted(joutput, jz, t), (x0, noise)):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    np.testing.assert_allclose(schedule.add_noise(X0, NOISE, t), z, atol=1e-6)
    scaled = 10.0 * t[:, None]
    wanted = 0.25 / (scaled**2 + 0.25) * z + scaled / np.sqrt(scaled**2 + 0.25) * x0
    found = schedule.consistency(joutput, jz, t)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert jnp.all(found[t == 0] == jz[t == 0])


def test_at_the_start_both_ends_are_the_bases_and_only_the_student_has_a_gradient():
    schedule, key = schedule_of(), jax.random.key(3)
    adapted = jlora.adapterize(BASE, dict.fromkeys(BASE, LORA))
    drawn, none = draws(key, X0, schedule, GUIDANCE), jnp.zeros_like(CONDITION)
    ends = both_ends(fn, adapted, BASE, adapted, X0, CONDITION, none, drawn, schedule)
    plain = both_ends(model, BASE, BASE, BASE, X0, CONDITION, none, drawn, schedule)
    for found, wanted in zip(ends, plain):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

    def loss(student, target, teacher):
        moved = perturbed(adapted, 1).replace(params=student)
        held = adapted.replace(params=target)
        return consistency_distillation(
            fn, moved, X0, CONDITION, none, key, schedule, target=held, teacher=teacher, guidance=GUIDANCE
        )

    start = perturbed(adapted, 1).params
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(start, start, BASE)
    sizes = [max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(each)) for each in gradients]
    assert sizes[0] > 1e-4 and sizes[1:] == [0, 0]


def test_timesteps_are_those_of_diffusers():
    for solver, steps in ((50, 4), (50, 7), (40, 40), (30, 1)):
        schedule = DiffusionSchedule(np.linspace(0.99, 0.01, 1000), solver_steps=solver)
        assert schedule.sampling_timesteps(steps).tolist() == GOLDEN[f"times_{solver}_{steps}"].tolist()
    with pytest.raises(ValueError, match="steps must be from 1 to the solver's 30, got 31"):
        schedule.sampling_timesteps(31)


class Denoiser(nn.Module):
    """A convolution, a time embedding and a dense layer: all that LCM-LoRA adapts."""

    @nn.compact
    def __call__(self, z, t):
        time = jnp.stack([jnp.sin(t / 10), jnp.cos(t / 10)], axis=1)
        hidden = nn.Conv(4, (3, 3), name="conv")(z) + nn.Dense(4, name="time")(time)[:, None, None]
        return nn.Dense(z.shape[-1], name="out")(nn.silu(hidden))


def test_style_and_lcm_are_the_sum_of_their_changes_and_each_is_there_alone():
    network, z, t = Denoiser(), normal(1, 2, 4, 4, 2), jnp.array([9, 59])
    params = network.init(jax.random.key(0), z, t)["params"]
    sites = jlora.sites(lambda params: network.apply({"params": params}, z, t), params)
    spec = {".*/kernel": jlora.LoRA(2, alpha=8)}
    start = jlora.adapterize(params, spec, jax.random.key(1), sites)
    style, lcm = perturbed(start, 2), perturbed(start, 3)
    assert sorted(site.path for site in style.plan.sites) == ["conv/kernel", "out/kernel", "time/kernel"]
    change = lambda one: jax.tree.map(lambda new, old: new - old, jlora.merge(one), params)
    both = change(jlora.combine([style, lcm], [0.8, 1.0]))
    wanted = jax.tree.map(lambda a, b: 0.8 * a + b, change(style), change(lcm))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), both, wanted)
    alone = change(jlora.combine([style, lcm], [1.0, 0.0]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), alone, change(style))

    schedule = schedule_of()
    apply = lambda params, z, t, _: jlora.lift(network.apply)({"params": params}, z, t)
    sampled = lambda one: lcm_sample(apply, one, z, None, jax.random.key(0), schedule, steps=2)
    plain = lcm_sample(
        lambda params, z, t, _: network.apply({"params": params}, z, t),
        jax.tree.map(lambda old, new: old + new, params, wanted),
        z,
        None,
        jax.random.key(0),
        schedule,
        steps=2,
    )
    np.testing.assert_allclose(sampled(jlora.combine([style, lcm], [0.8, 1.0])), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "noise"}, "prediction must be one of .* got 'noise'"),
        ({"alphas_cumprod": np.linspace(1e-4, 0.02, 100)}, r"must fall .* it is Π \(1 - β\), not β"),
        ({"alphas_cumprod": np.ones((2, 2))}, r"alphas_cumprod must be \[timesteps\], got shape \(2, 2\)"),
        ({"alphas_cumprod": np.linspace(1, 0, 100)}, 'ends at 0, where "epsilon" tells nothing'),
        ({"alphas_cumprod": np.ones(100), "prediction": "sample"}, 'where "sample" tells nothing of the noise'),
        ({"alphas_cumprod": np.full(100, np.nan)}, "must fall from at most 1"),
        ({"solver_steps": 101}, "solver_steps must be from 1 to the 100 timesteps, got 101"),
        ({"timestep_scaling": 0.0}, "must be above 0, got 0.5 and 0.0"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSchedule(**{"alphas_cumprod": GOLDEN["alphas"], "solver_steps": SOLVER, **arguments})


def test_a_loss_without_meaning_is_refused():
    adapted = jlora.adapterize(BASE, dict.fromkeys(BASE, LORA))

    def loss(fn=fn, none=CONDITION, **options):
        return consistency_distillation(fn, adapted, X0, CONDITION, none, jax.random.key(0), schedule_of(), **options)

    with pytest.raises(ValueError, match="guidance needs what stands for no condition"):
        loss(none=None)
    with pytest.raises(ValueError, match=r"must be the least and the largest w, got \(3, 1\)"):
        loss(guidance=(3, 1))
    with pytest.raises(ValueError, match="huber must be above 0, or None for the squared error, got 0"):
        loss(huber=0)
    with pytest.raises(ValueError, match=r"the model gave shape \(8, 5\) for inputs of shape \(8, 6\)"):
        loss(fn=lambda *arguments: fn(*arguments)[:, :5])
