"""`Layers`: in the layers in use the inner method, in all others exactly the base."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.acting import Gain, Network
from contract.problems import close, jit, normal, perturbed, weight
from safetensors.numpy import load_file

import jlora
import jlora.models
from jlora import Layers, LoRA
from jlora.core.protocol.layers import stated_layers

GOLDEN = Path(__file__).parent / "models" / "golden"

STACK, USED, OFF = (4, 8, 8), (0, 3), (1, 2)
PARAMS = {"w": weight(0, *STACK), "bias": normal(1, 4, 8)}
X = normal(2, 5, 8)


def scanned(params, x):
    return jax.lax.scan(jax.checkpoint(lambda x, layer: (jnp.tanh(x @ layer["w"] + layer["bias"]), None)), x, params)[0]


def unrolled(params, x):
    for n in range(4):
        layer = params[f"layers_{n}"]
        x = jnp.tanh(x @ layer["w"] + layer["bias"])
    return x


def outputs_of_each(params, x):
    """What each layer makes of one input, none after another."""
    return jax.vmap(lambda w, bias: x @ w + bias)(params["w"], params["bias"])


def apart(params):
    return {f"layers_{n}": {name: leaf[n] for name, leaf in params.items()} for n in range(4)}


def adapted_by(method, params=PARAMS):
    return perturbed(jlora.adapterize(params, {"w": jlora.Axes("batch in out", method)}))


def _named_anew(tree, confined=None):
    """The arrays of the inner method alone as those of `Layers` around it, whose drawer of shared ones has its own name."""
    shared = {"~shared": {"Layers": next(iter(tree["~shared"].values()))}} if "~shared" in tree else {}
    return {"w": {**tree.get("w", {}), **(confined or {"w": {}})["w"]}, **shared}


METHODS = {
    "factors": LoRA(rank=2, alpha=3),
    "factors and a scale": jlora.DoRA(LoRA(rank=2)),
    "factors from the weight": LoRA(rank=2, init="pissa"),
    "sparse": jlora.SHiRA(density=0.3),
    "formed": jlora.HiRA(rank=2),
    "formed, with a scale": jlora.DoRA(jlora.HiRA(rank=2)),
    "acts, has a weight": jlora.IA3(),
    "acts with the bias": Gain(),
    "acts alone": Network(2),
    "constants in common": jlora.VeRA(rank=3),
    "trained in common": jlora.VBLoRA.CASES[0],
}


@pytest.mark.once
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_other_layers_are_the_base_bit_for_bit_and_have_no_gradient(name, dtype):
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS), X.astype(dtype)
    inner, adapted = (adapted_by(method, params) for method in (METHODS[name], Layers(METHODS[name], USED)))
    adapted = adapted.replace(params=_named_anew(inner.params), frozen=_named_anew(inner.frozen, adapted.frozen))
    plain = jit(outputs_of_each)(params, x)

    def run(adapted):
        fn = lambda p: jlora.lift(outputs_of_each)(adapted.replace(params=p), x)
        y, pull = jax.vjp(fn, adapted.params)
        return y, pull(normal(3, *y.shape).astype(y.dtype))[0]

    (y, gradient), (wanted, their_gradient) = jit(run)(adapted), jit(run)(inner)
    for n in OFF:
        np.testing.assert_array_equal(y[n], plain[n])
        for own in jax.tree.leaves(gradient["w"]):
            assert not np.any(own[n])
    for n in USED:
        assert not np.allclose(y[n], plain[n], atol=1e-2)
        close(y[n], wanted[n])
        close(*(jax.tree.map(lambda leaf, n=n: leaf[n], tree["w"]) for tree in (gradient, their_gradient)))
    if adapted.plan.sites[0].method.mergeable:
        merged, both = jlora.merge(adapted), jlora.merge(inner)
        for leaf in params:
            for n in range(4):
                np.testing.assert_array_equal(merged[leaf][n], (both if n in USED else params)[leaf][n])


@pytest.mark.parametrize("name", ["factors", "formed", "acts with the bias"])
def test_scanned_unrolled_and_mapped_models_mean_the_same(name):
    method = Layers(METHODS[name], USED)
    adapted = adapted_by(method)
    bare = jlora.adapterize(apart(PARAMS), {".*/w": method})
    params = {f"layers_{n}": {"w": jax.tree.map(lambda leaf, n=n: leaf[n], adapted.params["w"])} for n in range(4)}
    other = bare.replace(params=params)
    y, wanted = (
        jit(jax.value_and_grad(lambda p, a=a, fn=fn: jnp.sum(jlora.lift(fn)(a.replace(params=p), X) ** 2)))(a.params)
        for a, fn in ((adapted, scanned), (other, unrolled))
    )
    close(y[0], wanted[0])
    for n in range(4):
        close(jax.tree.map(lambda leaf, n=n: leaf[n], y[1]["w"]), wanted[1][f"layers_{n}"]["w"])
        assert any(np.any(leaf) for leaf in jax.tree.leaves(wanted[1][f"layers_{n}"])) == (n in USED)
    merged = jlora.merge(adapted)
    for n in range(4):
        close(jax.tree.map(lambda leaf, n=n: leaf[n], merged), jlora.merge(other)[f"layers_{n}"])


def test_decay_moves_arrays_that_nothing_sees_and_files_keep_which_layers_are_in_use(tmp_path):
    adapted = adapted_by(Layers(LoRA(rank=2), (1,)))
    tx = jlora.optimizer(adapted, optax.adamw, learning_rate=0.1, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, adapted.params)
    updates, _ = tx.update(zero, tx.init(adapted.params), adapted.params)
    moved = adapted.replace(params=optax.apply_updates(adapted.params, updates))
    np.testing.assert_array_equal(jlora.merge(moved)["w"][0], PARAMS["w"][0])
    assert np.any(moved.params["w"]["b"][0] != adapted.params["w"]["b"][0])
    jlora.save(tmp_path / "adapters", adapted)
    loaded = jlora.load(tmp_path / "adapters", PARAMS)
    assert loaded.plan == adapted.plan and loaded.frozen["w"]["active"].tolist() == [False, True, False, False]
    np.testing.assert_array_equal(jlora.merge(loaded)["w"], jlora.merge(adapted)["w"])
    assert "4 of 8 x 8" in jlora.summary(adapted) and " 128\n" in jlora.summary(adapted)


def test_a_restart_keeps_the_layers():
    adapted = adapted_by(Layers(LoRA(rank=2), USED))
    before, tx = jlora.merge(adapted)["w"], optax.adam(1e-3)
    adapted, _ = jlora.restart(adapted, tx.init(adapted.params), tx, jax.random.key(1), donate=False)
    close(adapted.base["w"], before)
    np.testing.assert_array_equal(adapted.base["w"][jnp.array(OFF)], PARAMS["w"][jnp.array(OFF)])
    assert adapted.frozen["w"]["active"].tolist() == [True, False, False, True]


@pytest.mark.once
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_a_folder_of_peft_holds_the_layers_in_use_and_no_others(scan, tmp_path):
    model, params = jlora.models.load(GOLDEN / "llama_yarn", scan_layers=scan)
    tokens = jnp.arange(8).reshape(1, 8)
    fn = lambda params, tokens: model.apply({"params": params}, tokens)
    names, sites = jlora.models.peft_names(model), jlora.sites(fn, params, tokens)
    spec = {r".*/q_proj/kernel": Layers(jlora.DoRA(LoRA(2)), (0, 2))}
    adapted = perturbed(jlora.adapterize(params, spec, sites=sites))
    jlora.save_peft(tmp_path / "out", adapted, names)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 2)]
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(keys) == 6 and not any(".layers.1." in key for key in keys)
    close(jlora.lift(fn)(jlora.load_peft(tmp_path / "out", params, names), tokens), jlora.lift(fn)(adapted, tokens))


@pytest.mark.once
def test_layers_are_numbered_as_stacks_and_paths_say():
    def numbers(**shapes):
        roles = {name: " ".join([*["batch"] * (len(shape) - 2), "in", "out"]) for name, shape in shapes.items()}
        spec = {name: jlora.Axes(words, LoRA(2)) for name, words in roles.items()}
        adapted = jlora.adapterize({name: jnp.zeros(shape) for name, shape in shapes.items()}, spec)
        return [each.tolist() for each in stated_layers(adapted.plan.sites)]

    assert numbers(h_10=(4, 4), h_2=(4, 4)) == [10, 2]
    assert numbers(stack=(3, 2, 4, 4)) == [[[0, 0], [1, 1], [2, 2]]]
    assert numbers(block_7=(3, 4, 4)) == [[0, 1, 2]]
    params = {"h_5": {"q": jnp.zeros((4, 4)), "experts": jnp.zeros((2, 4, 4))}}
    spec = {".*/q": LoRA(2), ".*/experts": jlora.Axes("batch in out", LoRA(2))}
    experts, q = stated_layers(jlora.adapterize(params, spec).plan.sites)
    assert experts.tolist() == [5, 5] and q == 5


@pytest.mark.once
def test_what_can_not_be_confined_is_refused_by_name():
    for layers in ((), (1, 1), (-1,), (True,), [0]):
        with pytest.raises(ValueError, match="Layers' layers must be different whole numbers from 0 on, got"):
            Layers(LoRA(2), layers)
    for inner, reason in (
        (jlora.Full(), "adapts no matrix"),
        (Layers(LoRA(2), (0,)), "confined to some layers already"),
        (jlora.Chain(LoRA(2)), "keeps links"),
        (jlora.AdaLoRA(2, 1, steps=9), "follows a rule"),
        (jlora.EVA(2), "makes something for all its leaves together"),
        (jlora.XGBLoRA(2), "makes something for all its leaves together"),
        (jlora.DoRA(jlora.GeLoRA((2, 2))), "makes something for all its leaves together"),
        (LoRA(2, init="residual"), "mended in some layers only"),
        (jlora.Dropout(jlora.HiRA(2)), "form Dropped, which can't be switched off"),
    ):
        with pytest.raises(TypeError, match=rf"Layers can't go around {type(inner).__name__}.*: .*{reason}"):
            Layers(inner, (0,))


@pytest.mark.once
def test_leaves_without_such_a_layer_are_refused_with_their_path():
    method, w = Layers(LoRA(2), (0, 4)), jnp.zeros((4, 8, 8))
    for params, spec, problem in (
        ({"w": w}, {"w": jlora.Axes("batch in out", method)}, r"w: Layers.* names layer 4, .* they are in 0, 1, 2, 3$"),
        ({"h_0": w[0], "h_2": w[0]}, {".*": method}, r"h_0: Layers.* names layer 4, .* they are in 0, 2$"),
        ({"head": w[0]}, {"head": method}, r"head, shape \(8, 8\): it is in no layer"),
        (
            {"h_0": w[0]},
            {"h_0": jlora.DoRA(Layers(LoRA(2), (0,)))},
            r"h_0, shape .*: Layers goes around all other methods",
        ),
        (
            {"h_0": {"experts": w}, "h_4": {"experts": w}},
            {".*": jlora.Axes("batch in out", method)},
            "h_0/experts and h_4/experts are stacked, and nothing tells whether",
        ),
        ({"w": w}, {"w": jlora.Axes("batch in out", Layers(LoRA(9), (0,)))}, "w, shape .*: rank 9 is above"),
    ):
        with pytest.raises(ValueError, match=problem):
            jlora.adapterize(params, spec)
