"""GLoRA: the authors' layer in all 432 configurations and ten steps, its merge, its numbers, and the search."""

import functools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import close as near
from contract.problems import jit, normal, perturbed, weight
from safetensors.numpy import load_file, save_file

import jlora
from jlora import GLoRA
from jlora.methods.glora.method import CHOICES, KINDS

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "glora.npz"))
BASE = {"kernel": jnp.asarray(GOLDEN["w"]), "bias": jnp.asarray(GOLDEN["bias"])}
X, TARGET = jnp.asarray(GOLDEN["x"]), jnp.asarray(GOLDEN["target"])
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def fn(params, x):
    return x @ params["kernel"] + params["bias"]


def supernet():
    return jlora.adapterize(BASE, {"kernel": GLoRA(3, entangled=True)})


def of(drawer):
    """The authors' arrays, in the structure of `Adapted.params`."""
    start = f"{drawer}/"
    return {"kernel": {name[len(start) :]: jnp.asarray(a) for name, a in GOLDEN.items() if name.startswith(start)}}


def test_all_432_configurations_do_what_the_authors_layer_does_and_start_and_merge_exactly():
    start, choices = supernet(), jnp.asarray(GOLDEN["choices"])
    assert choices.shape == (432, 5) and len(np.unique(choices, axis=0)) == 432
    assert jax.tree.map(jnp.shape, start.params) == jax.tree.map(jnp.shape, of("start"))
    traces = []

    def outputs(choice):
        traces.append(1)
        given = start.replace(frozen={"kernel": {"choice": choice}})
        moved = given.replace(params=of("start"))
        return [jlora.lift(fn)(given, X), jlora.lift(fn)(moved, X), fn(jlora.merge(moved), X)]

    first, lifted, merged = jit(jax.vmap(outputs))(choices)
    assert len(traces) == 1
    close(lifted, GOLDEN["outputs"])
    close(merged, GOLDEN["outputs"])
    np.testing.assert_allclose(first, np.broadcast_to(fn(BASE, X), first.shape), rtol=0, atol=1e-6)


def test_ten_steps_over_configurations_are_those_of_the_authors_layer():
    adapted, tx = supernet(), optax.sgd(0.02)

    def step(carry, choice):
        p, state = carry
        now = adapted.replace(frozen={"kernel": {"choice": choice}})
        value, gradient = jax.value_and_grad(
            lambda p: jnp.sum((jlora.lift(fn)(now.replace(params=p), X) - TARGET) ** 2)
        )(p)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(p, updates), state), value

    run = jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jnp.asarray(GOLDEN["choices"][GOLDEN["picked"]])))
    (after, _), losses = run(of("start"))
    close(losses, GOLDEN["losses"])
    jax.tree.map(close, after, of("after"))


FIXED = {"a": "vector", "b": "low-rank", "c": "vector", "d": "constant", "e": "vector"}


@pytest.mark.parametrize("kinds", [{}, FIXED, {**FIXED, "b": "constant", "c": "low-rank", "d": "vector", "e": "none"}])
def test_a_fixed_configuration_keeps_its_own_arrays_alone_and_is_the_weight_and_bias_of_numpy(kinds):
    method = GLoRA(2, **kinds)
    adapted = perturbed(jlora.adapterize(BASE, {"kernel": method}))
    p = {name: np.asarray(leaf, np.float64) for name, leaf in adapted.params["kernel"].items()}
    low = {name: p.get(name) for name in CHOICES}
    low |= {name: p[f"{name}u"] @ p[f"{name}d"] for name in "ab" if f"{name}u" in p}
    low |= {"c": p["cd"] @ p["cu"]} if "cu" in p else {}
    a, b, c, d, e = (0 if part is None else part for part in low.values())
    w, bias = np.asarray(GOLDEN["w"], np.float64), np.asarray(GOLDEN["bias"], np.float64)
    close(jlora.lift(fn)(adapted, X), X @ (w + w * a + b) + bias + bias * d + e + (c @ w if np.size(c) > 1 else 0))
    assert sum(leaf.size for leaf in p.values()) == method.number(5, 4, bias=True)
    assert set(p) <= set(method.axes)


def test_special_configurations_are_lora_bias_tuning_and_a_shift_of_the_input():
    none = dict.fromkeys(CHOICES, "none")
    lora = perturbed(jlora.adapterize(BASE, {"kernel": GLoRA(2, **{**none, "b": "low-rank"})}))
    plain = jlora.adapterize(BASE, {"kernel": jlora.LoRA(2, alpha=2)})
    factors = {"a": lora.params["kernel"]["bu"], "b": lora.params["kernel"]["bd"]}
    close(jlora.lift(fn)(lora, X), jlora.lift(fn)(plain.replace(params={"kernel": factors}), X))
    tuned = jlora.adapterize(BASE, {"kernel": GLoRA(**{**none, "e": "vector"})})
    close(jlora.lift(fn)(tuned.replace(params={"kernel": {"e": jnp.arange(4.0)}}), X), fn(BASE, X) + jnp.arange(4))
    shifted = jlora.adapterize(BASE, {"kernel": GLoRA(**{**none, "c": "vector"})})
    close(jlora.lift(fn)(shifted.replace(params={"kernel": {"c": jnp.arange(5.0)}}), X), fn(BASE, X + jnp.arange(5)))


def test_without_a_bias_only_the_weight_is_changed_and_nothing_to_train_is_refused():
    base = {"kernel": BASE["kernel"]}
    assert set(jlora.adapterize(base, {"kernel": GLoRA(2)}).params["kernel"]) == {"au", "ad", "bu", "bd"}
    none = dict.fromkeys("ab", "none")
    with pytest.raises(
        ValueError, match=r"kernel, shape \(5, 4\): GLoRA.* nothing to train here: a and b are none, and c, d"
    ):
        jlora.adapterize(base, {"kernel": GLoRA(2, **none)})
    assert set(jlora.adapterize(BASE, {"kernel": GLoRA(2, **none)}).params["kernel"]) == {"cu", "cd", "d", "e"}
    with pytest.raises(ValueError, match="GLoRA's c must be one of .* got 'constant'"):
        GLoRA(c="constant")


def layers(params, x):
    def layer(x, one):
        return jnp.tanh(x @ one["kernel"] + one["bias"]), None

    return jax.lax.scan(jax.checkpoint(layer), x, params)[0]


STACK = {"kernel": weight(0, 3, 6, 6), "bias": normal(1, 3, 6)}
INPUTS = normal(2, 5, 6)


@functools.cache
def stacked(method):
    return perturbed(jlora.adapterize(STACK, {"kernel": method}, sites=jlora.sites(layers, STACK, INPUTS)))


def test_with_a_key_every_layer_draws_another_configuration_in_every_pass():
    adapted = stacked(GLoRA(2, entangled=True))
    run = jit(lambda key: jlora.lift(layers)(adapted.replace(context={"dropout": key}), INPUTS))
    first, again, other = (np.asarray(run(jax.random.key(n))) for n in (1, 1, 2))
    assert np.array_equal(first, again) and not np.allclose(first, other)
    kept = jit(lambda a: (jlora.lift(layers)(a, INPUTS), layers(jlora.merge(a), INPUTS)))
    near(*kept(adapted))
    near(*kept(jlora.glora_configured(adapted, np.array([[0, 1, 2, 0, 1], [3, 0, 3, 2, 0], [1, 2, 0, 1, 2]]))))


def test_the_draws_are_uniform_over_the_kinds_of_every_support():
    """With every entry of a support different, what a pass adds tells which kind was drawn."""
    adapted, base = supernet(), {"kernel": jnp.zeros((5, 4)), "bias": jnp.zeros(4)}
    p = jax.tree.map(jnp.zeros_like, adapted.params)
    p["kernel"]["e"] = jnp.array([1.0, 2.0, 3.0, 4.0])
    adapted = adapted.replace(base=base, params=p)
    run = lambda key: jlora.lift(fn)(adapted.replace(context={"dropout": key}), X)[0]
    drawn = np.asarray(jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 600)))
    kinds, counts = np.unique(drawn, axis=0, return_counts=True)
    assert kinds.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 2, 3, 4]]
    assert np.all(np.abs(counts - 200) < 50)


def test_the_size_of_a_configuration_counts_what_it_reads():
    adapted = stacked(GLoRA(2, entangled=True))
    everything = np.array([[3, 3, 3, 2, 2]] * 3)
    assert np.array_equal(jlora.glora_configuration(adapted), everything)
    # 2 * 12 for A and B, 2 * (6 + 1) for c, 6 for D and E
    assert jlora.glora_size(adapted) == 3 * (2 * 2 * 12 + 2 * 7 + 2 * 6)
    assert jlora.glora_size(adapted, [[2, 1, 2, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 2]]) == (6 + 1 + 6 + 1) + 6
    for choice in GOLDEN["choices"][::17]:
        kinds = {name: KINDS[code] for name, code in zip(CHOICES, choice)}
        fixed = GLoRA(3, **kinds)
        assert jlora.glora_size(supernet(), choice[None]) == fixed.number(5, 4, bias=True)


def wanted_count(adapted):
    """A score without a model: how many kinds are those of a configuration that is to be found."""
    choice = adapted.frozen["kernel"]["choice"]
    return jnp.sum(choice == jnp.array([[3, 0, 2, 1, 0], [1, 2, 0, 2, 2], [0, 3, 3, 0, 1]]))


def test_the_search_finds_what_scores_best_within_its_limit_and_compiles_once():
    adapted, traces, seen = stacked(GLoRA(2, entangled=True)), [], []

    @jax.jit
    def score(adapted):
        traces.append(1)
        return wanted_count(adapted)

    best, search = jlora.glora_evolve(adapted, score, jax.random.key(0), limit=110, progress=seen.append)
    assert len(traces) == 1 and len(seen) == 21 and search is seen[-1]
    assert float(wanted_count(best)) == search.scores.max() == 15
    assert len(np.unique(search.configurations.reshape(-1, 15), axis=0)) == len(search.scores)
    assert search.sizes.max() <= 110 and search.sizes[search.best] == jlora.glora_size(best)
    assert all(len(s.scores) <= 50 * (s.generation + 1) for s in seen)
    assert np.array_equal(search.configurations[search.best], jlora.glora_configuration(best))


def test_the_search_is_the_same_with_the_same_key_and_goes_on_from_where_it_was():
    adapted, seen = stacked(GLoRA(2, entangled=True)), []
    numbers = {"generations": 3, "population": 8, "keep": 3, "mutations": 3, "crossovers": 3}
    search = partial(jlora.glora_evolve, adapted, wanted_count, **numbers)
    whole = search(jax.random.key(3), progress=seen.append)[1]
    resumed = search(jax.random.key(3), resume=seen[1])[1]
    other = search(jax.random.key(4))[1]
    assert np.array_equal(whole.configurations, resumed.configurations) and np.array_equal(whole.scores, resumed.scores)
    assert not np.array_equal(whole.configurations[:8], other.configurations[:8])


def test_a_search_that_can_not_be_is_refused():
    adapted, key = stacked(GLoRA(2, entangled=True)), jax.random.key(0)
    with pytest.raises(
        ValueError, match="no random configuration reads at most 0 trained values; the smallest of a hundred"
    ):
        jlora.glora_evolve(adapted, wanted_count, key, limit=0, population=5)
    with pytest.raises(ValueError, match="population must be an integer of at least 1, got 0"):
        jlora.glora_evolve(adapted, wanted_count, key, population=0)
    with pytest.raises(ValueError, match="score must return one number for each configuration, got nan"):
        jlora.glora_evolve(adapted, lambda a: jnp.nan, key)
    with pytest.raises(ValueError, match=r"no leaf is adapted by GLoRA\(entangled=True\)"):
        jlora.glora_evolve(jlora.adapterize(BASE, {"kernel": GLoRA()}), wanted_count, key)
    with pytest.raises(ValueError, match=r"must have the shape \(3, 5\), got \(1, 5\)"):
        jlora.glora_configured(adapted, [[0, 0, 0, 0, 0]])
    with pytest.raises(
        ValueError, match=r"kernel: the kind of c must be one of \[0, 2, 3\] \(none, vector, low-rank\), got 1"
    ):
        jlora.glora_configured(adapted, [[0, 0, 1, 0, 0]] * 3)


@pytest.mark.parametrize("kinds", [{}, {"a": "none", "b": "none", "d": "constant", "e": "constant"}])
def test_fixed_configurations_go_to_peft_and_back_and_its_zeros_must_be_zeros(tmp_path, kinds):
    adapted = perturbed(jlora.adapterize(BASE, {"kernel": GLoRA(2, **kinds)}))
    jlora.save_peft(tmp_path / "out", adapted, {"kernel": "up.weight", "bias": "up.bias"})
    (tmp_path / "out" / "jlora_manifest.json").unlink()
    loaded = jlora.load_peft(tmp_path / "out", BASE, {"kernel": "up.weight", "bias": "up.bias"})
    assert loaded.plan == adapted.plan
    near(loaded.params, adapted.params, 0)
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    zeros = [name for name in tensors if name.endswith(".zeros")]
    assert len(zeros) == (2 if kinds else 0)
    for name in zeros:
        save_file({**tensors, name: tensors[name] + 1}, file)
        with pytest.raises(
            ValueError, match=r"zeros' must hold zeros, since GLoRA\(.*\) leaves that away at 'up.weight'"
        ):
            jlora.load_peft(tmp_path / "out", BASE, {"kernel": "up.weight", "bias": "up.bias"})


def test_saved_configurations_come_back(tmp_path):
    adapted = jlora.glora_configured(
        stacked(GLoRA(2, entangled=True)), [[0, 1, 2, 0, 1], [3, 0, 3, 2, 0], [1, 2, 0, 1, 2]]
    )
    jlora.save(tmp_path / "adapters", adapted)
    loaded = jlora.load(tmp_path / "adapters", STACK)
    assert loaded.plan == adapted.plan and jlora.glora_configuration(loaded)[1].tolist() == [3, 0, 3, 2, 0]
    near(loaded.params, adapted.params, 0)
