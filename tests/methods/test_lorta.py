"""LoRTA: the numbers of its reference code, which row is whose, and heads cut along columns."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import by_hand, normal, perturbed, weight
from descent import descend
from kernels import USUAL

import jlora

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "lorta.npz"))
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
KINDS = "koqv"  # in the order of the leaves; the reference's is that of the products below
BASE = {f"layers_{n}": {kind: jnp.asarray(GOLDEN[f"w/{n}/{kind}"]) for kind in KINDS} for n in range(2)}
METHOD = jlora.LoRTA(rank=4, heads=3, alpha=5)


def forward(params, x):
    for layer in ("layers_0", "layers_1"):
        for kind in "qkvo":
            x = jnp.tanh(x @ params[layer][kind])
    return x


def stacked(params, x):
    def layer(x, w):
        for kind in "qkvo":
            x = jnp.tanh(x @ w[kind])
        return x, None

    return jax.lax.scan(jax.checkpoint(layer), x, params)[0]


def factors(prefix):
    found = {name: GOLDEN[f"{prefix}/lora_{theirs}"] for name, theirs in zip(FACTORS, ("A", "B", "C_h", "C_m", "C_l"))}
    return {**found, "c_m": found["c_m"][["qkvo".index(kind) for kind in KINDS]]}


FACTORS = ("a", "b", "c_h", "c_m", "c_l")


def adapted_as(layout):
    if layout == "stacked":
        base = {kind: jnp.stack([BASE[f"layers_{n}"][kind] for n in range(2)]) for kind in KINDS}
        adapted = jlora.adapterize(base, {".*": jlora.Axes("batch in out", METHOD)})
    else:
        adapted = jlora.adapterize(BASE, {".*": METHOD})
    drawer = jax.tree.map(jnp.asarray, factors("before"))
    assert jax.tree.map(jnp.shape, drawer) == jax.tree.map(jnp.shape, adapted.params["~shared"]["LoRTA"])
    return adapted.replace(params={**adapted.params, "~shared": {"LoRTA": drawer}})


@pytest.mark.parametrize("layout", ["apart", "stacked"])
def test_outputs_gradients_and_steps_are_those_of_the_reference(layout):
    adapted, fn = adapted_as(layout), stacked if layout == "stacked" else forward

    def outputs(p):
        return jlora.lift(fn, strict=True)(adapted.replace(params=p), GOLDEN["x"])

    tx = jlora.optimizer(adapted, optax.adam, learning_rate=0.02)
    y, _, gradients, after = descend(outputs, adapted.params, tx, steps=5, compiler_options=USUAL)
    close(y[0], GOLDEN["y"])
    for name in FACTORS:
        close(gradients["~shared"]["LoRTA"][name][0], factors("gradient")[name])
        close(after["~shared"]["LoRTA"][name], factors("after")[name], atol=1e-4)


def test_merged_weights_are_those_of_the_reference():
    merged = jlora.merge(adapted_as("apart"))
    for n in range(2):
        for kind in KINDS:
            wanted = GOLDEN[f"w/{n}/{kind}"] + GOLDEN[f"update/{n}/{kind}"]
            close(merged[f"layers_{n}"][kind], wanted)


def test_heads_of_columns_are_cut_where_the_pattern_does_not_match_and_small_leaves_take_the_first():
    method = jlora.LoRTA(rank=2, heads=4, scaling="rslora", by_rows=".*/o_proj")
    shapes = {"q_proj": (6, 8), "k_proj": (6, 4), "o_proj": (8, 6)}
    params = {f"layers_{n}": {name: weight(n, *shape) for name, shape in shapes.items()} for n in range(10, 12)}
    adapted = perturbed(jlora.adapterize(params, {".*": method}))
    drawer = jax.device_get(adapted.params["~shared"]["LoRTA"])
    assert {name: array.shape for name, array in drawer.items()} == {
        "a": (6, 2), "b": (2, 2), "c_h": (4, 2), "c_m": (3, 2), "c_l": (2, 2),
    }  # fmt: skip
    assert jlora.summary(adapted).splitlines()[-2].split() == ["~shared/LoRTA", "-", "-", *str(method).split(), "34"]
    merged = jlora.merge(adapted)
    for layer in range(2):
        for kind, name in enumerate(("k_proj", "o_proj", "q_proj")):
            rows, columns = shapes[name]
            wanted = np.zeros((rows, columns))
            for i in range(rows):
                for o in range(columns):
                    cut, whole = (i, o) if name == "o_proj" else (o, i)
                    head, column = divmod(cut, 2)
                    cs = drawer["c_h"][head] * drawer["c_m"][kind] * drawer["c_l"][layer]
                    wanted[i, o] = sum(drawer["a"][whole, r] * cs[r] * drawer["b"][r, column] for r in range(2))
            close(merged[f"layers_{layer + 10}"][name] - params[f"layers_{layer + 10}"][name], 8 / 2**0.5 * wanted)


def test_the_starts_are_drawn_within_the_reference_s_bounds():
    method = jlora.LoRTA(rank=6, heads=32)
    adapted = jlora.adapterize({"w": jnp.zeros((512, 512))}, {"w": method})
    drawer = jax.device_get(adapted.params["~shared"]["LoRTA"])
    assert np.abs(drawer["a"]).max() == pytest.approx(6**-0.5, rel=1e-2) and not drawer["b"].any()
    assert np.abs(drawer["c_h"]).max() == pytest.approx(1, rel=2e-2)
    wider = jlora.adapterize({"w": jnp.zeros((512, 512))}, {"w": jlora.LoRTA(rank=6, heads=32, init_scale=1)})
    assert np.abs(wider.params["~shared"]["LoRTA"]["c_h"]).max() == pytest.approx(6**-0.5, rel=2e-2)


def test_experts_of_one_layer_share_its_row_and_equal_names_of_stacks_stay_apart():
    params = {
        "layers_0": {"q": weight(0, 8, 8), "experts": weight(1, 3, 8, 8)},
        "w1": weight(2, 2, 8, 8),
        "w2": weight(3, 2, 8, 8),
    }
    spec = {"layers_0/q": METHOD, ".*": jlora.Axes("batch in out", METHOD)}
    adapted = jlora.adapterize(params, spec)
    fields = {site.path: jlora.paths.lookup(adapted.frozen, site.keys) for site in adapted.plan.sites}
    assert {path: (each["layer"].tolist(), each["kind"].tolist()) for path, each in fields.items()} == {
        "layers_0/experts": ([0] * 3, [0] * 3),
        "layers_0/q": (0, 1),
        "w1": ([0, 1], [2, 2]),
        "w2": ([0, 1], [3, 3]),
    }


def test_its_factors_go_out_as_plain_lora(tmp_path):
    adapted = perturbed(
        jlora.adapterize({"u": weight(0, 8, 6), "v": weight(1, 8, 8)}, {".*": jlora.LoRTA(rank=2, heads=2)})
    )
    names = {"(?P<m>u|v)": "{m}"}
    jlora.save_peft(tmp_path / "peft", adapted, names)
    loaded = jlora.load_peft(tmp_path / "peft", adapted.base, names)
    assert loaded.plan.sites[0].method == jlora.LoRA(2, 2)
    jax.tree.map(partial(close, rtol=1e-4), jlora.merge(loaded), by_hand(adapted))


def test_a_regex_that_is_none_and_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"LoRTA's by_rows must be a regex that matches paths, got '\(': "):
        jlora.LoRTA(by_rows="(")
    with pytest.raises(ValueError, match="LoRTA's heads must be an integer of at least 1, got 0"):
        jlora.LoRTA(heads=0)
    x = normal(0, 3, 8)
    adapted = jlora.adapterize({"w": weight(0, 8, 8)}, {"w": jlora.LoRTA(heads=5)})
    close(jlora.lift(lambda p, x: x @ p["w"])(perturbed(adapted), x), x @ by_hand(perturbed(adapted))["w"])
