"""Fields: leaves that are kept as products of arrays are trained in that form, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import close, jit, normal, perturbed, weight
from jax import lax

import jlora

pytestmark = pytest.mark.once

PARAMS = {
    "deep": weight(0, 8, 8),
    "spectral": weight(1, 8, 8),
    "train": weight(2, 2, 8, 8),
    "up": weight(3, 8, 4),
    "down": weight(4, 4, 8),
    "stack": {"q": weight(5, 2, 8, 8), "k": weight(6, 2, 8, 8)},
}
SPEC = {
    "deep": jlora.LowRank(3, inner=2),
    "spectral": jlora.SpectralTrain(3, "svd"),
    "train": jlora.TensorTrain(3, 2, 1, share=True),
    "up|down": jlora.TransposedPair(),
    "stack/.*": jlora.JointLowRank(3),
}


def model(params, x):
    x = jnp.tanh(x @ params["deep"]) + x @ params["spectral"]
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["train"])[0]
    x = x + jnp.tanh(x @ params["up"]) @ params["down"]
    layer = lambda x, w: (jnp.tanh(x @ w["q"]) + x @ w["k"], None)
    return lax.scan(layer, x, params["stack"])[0]


X = normal(9, 5, 8)
SITES = jlora.sites(model, PARAMS, X)
BASE = jlora.quantize(PARAMS, SPEC, SITES)
NF4 = jlora.quantize({"w": weight(0, 64, 8)}, {"w": jlora.NF4()})
FIELDS = jlora.Fields(multiples={"left": 2.0, "right": 3.0})
METHODS = {
    "deep": FIELDS,
    "stack/.*": jlora.Fields(),
    "train": jlora.Fields(multiples={"central": 5.0}),
    ".*": jlora.Fields(),
}


def start():
    return jlora.adapterize(BASE, METHODS, sites=SITES)


def test_all_own_and_common_fields_start_as_they_are_and_are_counted():
    adapted = start()
    for name in ("deep", "spectral"):
        close(adapted.params[name], BASE[name].fields)
    shapes = jax.tree.map(jnp.shape, adapted.params)
    assert shapes["train"] == {"t0": (2, 1, 2, 2, 3), "t1": (2, 3, 2, 2, 1)}
    assert shapes["stack"] == {"q": {"right": (2, 3, 8)}, "k": {"right": (2, 3, 8)}}
    assert shapes["up"] == shapes["down"] == {}
    assert sorted(map(str, shapes["~shared"].values())) == [
        "{'central': (3, 2, 2, 3)}",
        "{'left': (2, 8, 3)}",
        "{'matrix': (4, 8)}",
    ]
    text = jlora.summary(adapted)
    assert "Fields(multiples={'left': 2.0, 'right': 3.0})" in text and "Fields()" in text
    assert jlora.explain(adapted).count("Trains the fields of a leaf") == 5


def test_values_gradients_and_steps_are_those_of_the_decoded_function():
    adapted = perturbed(start(), size=0.1)
    lifted = lambda p: jnp.sum(jnp.sin(jlora.lift(model)(adapted.replace(params=p), X)))
    plain = lambda p: jnp.sum(jnp.sin(model(jlora.merge(adapted.replace(params=p)), X)))
    (value, gradient), wanted = (jit(jax.value_and_grad(f))(adapted.params) for f in (lifted, plain))
    close((value, gradient), wanted)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradient))
    tx = jlora.optimizer(adapted, optax.sgd, learning_rate=0.1)
    updates, _ = jit(lambda g: tx.update(g, tx.init(adapted.params), adapted.params))(gradient)
    ratios = jax.tree.map(lambda u, g: float(-jnp.sum(u * g) / jnp.sum(g * g) / 0.1), updates, gradient)
    assert ratios["deep"] == pytest.approx({"left": 2, "inner": 1, "right": 3}, rel=1e-4)
    assert ratios["train"] == pytest.approx({"t0": 1, "t1": 1}, rel=1e-4)
    shared = {name: rate for drawer in ratios["~shared"].values() for name, rate in drawer.items()}
    assert shared == pytest.approx({"central": 5, "matrix": 1, "left": 1}, rel=1e-4)


def test_the_gradient_of_a_pair_is_the_sum_over_its_uses():
    base = {name: BASE[name] for name in ("up", "down")}
    adapted = jlora.adapterize(base, {".*": jlora.Fields()})
    run = lambda p, x: jnp.sum(jnp.sin(jnp.tanh(x @ p["up"]) @ p["down"]))
    found = jax.grad(lambda p: jlora.lift(run)(adapted.replace(params=p), X))(adapted.params)
    untied = jax.grad(run)(jlora.dequantize(base), X)
    close(found["~shared"]["Fields"]["matrix"], untied["down"] + untied["up"].T)


def test_trained_fields_come_back_in_their_form_and_from_files(tmp_path):
    adapted = perturbed(start(), size=0.1)
    again = jlora.requantize(adapted)
    close(jlora.dequantize(again), jlora.merge(adapted))
    close(again["deep"].fields, adapted.params["deep"])
    assert again["train"].code == BASE["train"].code and again["stack"]["q"].fields.keys() == {"left", "right"}
    left = [again["stack"][name].fields["left"] for name in "qk"]
    assert float(jnp.abs(left[0] - BASE["stack"]["q"].fields["left"]).max()) > 0.01
    close(*left)
    jlora.save(tmp_path / "trained", adapted)
    close(jlora.load(tmp_path / "trained", BASE).params, adapted.params)
    half = jlora.quantize({"w": weight(0, 8, 8)}, {"w": jlora.LowRank(3, dtype="bfloat16")})
    trained = jlora.adapterize(half, {"w": jlora.Fields()})
    assert trained.params["w"]["left"].dtype == jnp.float32
    assert jlora.requantize(trained)["w"].fields["left"].dtype == jnp.bfloat16


def test_some_fields_are_trained_where_they_are_named():
    adapted = jlora.adapterize(
        BASE, {"deep": jlora.Fields(("inner",)), "train": jlora.Fields(("t0", "t1"))}, sites=SITES
    )
    assert {name: sorted(fields) for name, fields in adapted.params.items()} == {
        "deep": ["inner"],
        "train": ["t0", "t1"],
    }
    moved = perturbed(adapted)
    equal = np.testing.assert_array_equal
    equal(jlora.requantize(moved)["deep"].fields["left"], BASE["deep"].fields["left"])
    assert float(jnp.abs(jlora.merge(moved)["deep"] - jlora.merge(adapted)["deep"]).max()) > 0.01


@pytest.mark.parametrize(
    ("base", "spec", "words"),
    [
        (PARAMS, {"deep": jlora.Fields()}, r"deep, shape \(8, 8\): Fields trains a leaf that is kept in the form of a code"),
        (NF4, {"w": jlora.Fields()}, r"w, .*kept as NF4\(\), whose fields are not trained"),
        (BASE, {"deep": jlora.Fields(("a",))}, r"can't train 'a' of LowRank.*; there are \['left', 'inner', 'right'\]$"),
        (BASE, {"deep": jlora.Fields(multiples={"b": 2.0})}, r"multiples name 'b', but of .* trained \['left', .*\]$"),
        (BASE, {"stack/q": jlora.Fields(("left",))}, r"stack/q has left in common with stack/k, which Fields\(learn=.*\) must"),
        (BASE, {"up": jlora.Fields()}, r"up has matrix in common with down, which Fields\(\) must train too"),
        (BASE, {"up": jlora.Fields(), "down": jlora.Fields(("matrix",), {"matrix": 2.0})}, "has matrix in common with"),
        (BASE, {"deep": jlora.Full()}, r"decode it first .*, or train its fields by jlora.Fields\(\)"),
    ],
)  # fmt: skip
def test_fields_refuses(base, spec, words):
    with pytest.raises(ValueError, match=words):
        jlora.adapterize(base, spec, sites=SITES if base is not None and "deep" in base else None)


def test_multiples_are_positive_numbers():
    with pytest.raises(ValueError, match="Fields' multiples must be positive and finite, got 0.0 for left"):
        jlora.Fields(multiples={"left": 0})
    assert jlora.Fields(multiples={"b": 2, "a": 1}) == jlora.Fields(multiples=(("a", 1.0), ("b", 2.0)))
