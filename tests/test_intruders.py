"""Intruder dimensions: found as loops in float64 find them, counted, scaled away, drawn; and as PEFT does it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

RNG = np.random.default_rng(0)


def decaying(*shape, scale=10.0):
    """Matrices with singular values that fall, so that single vectors mean something."""
    u, v = (np.linalg.qr(RNG.standard_normal((*shape[:-2], n, n)))[0] for n in shape[-2:])
    least = min(shape[-2:])
    return (u[..., :least] * (scale * np.exp(-np.arange(least) / 6))) @ np.swapaxes(v, -1, -2)[..., :least, :]


def planted(w, strength):
    """The weight with a random direction added to it."""
    u, v = (x / np.linalg.norm(x) for x in (RNG.standard_normal(n) for n in w.shape[-2:]))
    return w + strength * np.outer(u, v)


TREE = {"stack": decaying(2, 24, 16), "wide": decaying(12, 20), "norm": np.ones(16)}
TUNED = {
    "stack": planted(TREE["stack"], 15.0) * np.array([1.0, 1.0])[:, None, None],
    "wide": planted(TREE["wide"], 0.2),
    "norm": np.full(16, 2.0),
}
SPEC = {"stack": jlora.Axes("batch in out", jlora.LoRA(2)), "wide": jlora.LoRA(2)}


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def by_loops(w0, w1, top, threshold, side):
    """One matrix in float64: the largest cosines, singular values, and the weight with intruders at 3 / 4."""
    if side == "in":
        w0, w1 = w0.T, w1.T
    v0, (u, s, vt) = np.linalg.svd(w0)[2][: min(w0.shape)], np.linalg.svd(w1, full_matrices=False)
    cosines, scaled = [], w1.copy()
    for j in range(min(top, len(s))):
        cosines.append(max(abs(vt[j] @ v) for v in v0))
        if cosines[-1] < threshold:
            scaled -= 0.25 * s[j] * np.outer(u[:, j], vt[j])
    return np.array(cosines), s[: len(cosines)], scaled.T if side == "in" else scaled


@pytest.mark.once
@pytest.mark.parametrize("side", ["out", "in"])
def test_intruders_are_those_of_loops_over_all_pairs_in_float64(side):
    before, after = as_float32(TREE), as_float32(TUNED)
    found = jlora.intruder_dimensions(before, after, SPEC, top=4, threshold=0.7, side=side)
    tuned = jlora.without_intruders(before, found, after, SPEC, keep=0.75)
    total = 0
    for path, index in (("stack", 0), ("stack", 1), ("wide", ...)):
        cosines, values, scaled = by_loops(TREE[path][index], TUNED[path][index], 4, 0.7, side)
        np.testing.assert_allclose(found.leaves[path].cosines[index], cosines, atol=1e-4)
        np.testing.assert_allclose(found.leaves[path].values[index], values, rtol=1e-5)
        np.testing.assert_allclose(tuned[path][index], scaled, atol=1e-4)
        total += int(np.sum(cosines < 0.7))
    assert found.count == total == sum(found.counts.values()) == found.count_below(0.7) >= 2
    assert found.counts["wide"] == 0 and tuned["wide"] is after["wide"] and tuned["norm"] is after["norm"]
    assert f"{total} intruder dimensions among the first 4 of each matrix (12 in all)" == str(found)


@pytest.mark.once
def test_no_change_and_a_larger_weight_have_none_and_a_planted_direction_is_one_once_it_is_strong():
    w = {"w": jnp.asarray(decaying(80, 64), jnp.float32)}
    for after, count in ((w["w"], 0), (3 * w["w"], 0), (planted(w["w"], 0.1), 0), (planted(w["w"], 20.0), 1)):
        assert jlora.intruder_dimensions(w, {"w": jnp.asarray(after)}, "w").count == count
    found = jlora.intruder_dimensions(w, {"w": planted(w["w"], 20.0)}, "w")
    assert np.flatnonzero(found.leaves["w"].intruders).tolist() == [0], "the strongest direction is the planted one"


def adapted_with_an_intruder():
    adapted = jlora.adapterize(as_float32(TREE), SPEC)
    shapes = jax.tree.map(lambda x: x.shape, adapted.params)
    params = jax.tree.map(lambda x: jnp.asarray(RNG.standard_normal(x.shape) * 1.2, jnp.float32), adapted.params)
    assert jax.tree.map(lambda x: x.shape, params) == shapes
    return adapted.replace(params=params)


def test_an_adapted_is_its_base_and_its_merged_weights_and_what_is_known_is_used_again():
    adapted = adapted_with_an_intruder()
    found = jlora.intruder_dimensions(adapted, top=6, threshold=0.8)
    merged = jlora.merge(adapted)
    trees = jlora.intruder_dimensions(adapted.base, merged, SPEC, top=6, threshold=0.8)
    assert found.count == trees.count > 0
    again = jlora.intruder_dimensions(adapted, top=6, threshold=0.8, known=trees)
    for path, leaf in found.leaves.items():
        np.testing.assert_array_equal(leaf.cosines, trees.leaves[path].cosines)
        np.testing.assert_array_equal(again.leaves[path].cosines, leaf.cosines)
        assert again.leaves[path].pretrained is not leaf.pretrained
    untouched = jlora.without_intruders(adapted, found, keep=1.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), untouched, merged)
    gone = jlora.without_intruders(adapted, found, keep=0.0)
    assert jlora.intruder_dimensions(adapted.base, gone, SPEC, top=6, threshold=0.8).count < found.count


def test_a_base_in_four_bits_is_compared_as_it_is_decoded():
    params = {"w": jnp.asarray(decaying(64, 64), jnp.float32)}
    base = jlora.quantize(params, {"w": jlora.NF4()})
    adapted = jlora.adapterize(base, {"w": jlora.LoRA(2)})
    assert jlora.intruder_dimensions(adapted).count == 0
    assert np.min(jlora.intruder_dimensions(adapted).leaves["w"].cosines) > 0.99


def test_what_has_no_two_weights_is_refused():
    before = as_float32(TREE)
    adapted = jlora.adapterize(before, SPEC)
    with pytest.raises(TypeError, match="leave the second tree away"):
        jlora.intruder_dimensions(adapted, before)
    with pytest.raises(TypeError, match="pass an Adapted, or pretrained params and tuned ones"):
        jlora.intruder_dimensions(before)
    with pytest.raises(ValueError, match=r"wide: the pretrained weight has shape \(12, 20\), the tuned one \(12, 19\)"):
        jlora.intruder_dimensions(before, {**before, "wide": before["wide"][:, :19]}, SPEC)
    with pytest.raises(ValueError, match="wide: the pretrained weight has shape .*, the tuned one None"):
        jlora.intruder_dimensions(before, {"stack": before["stack"], "norm": before["norm"]}, SPEC)
    with pytest.raises(ValueError, match="wide: a weight has values that are not finite"):
        jlora.intruder_dimensions(before, {**before, "wide": before["wide"] * jnp.nan}, {"wide": jlora.LoRA(2)})
    with pytest.raises(ValueError, match="side must be one of"):
        jlora.intruder_dimensions(adapted, side="left")
    with pytest.raises(ValueError, match="top must be a positive whole number"):
        jlora.intruder_dimensions(adapted, top=0)
    found = jlora.intruder_dimensions(adapted)
    with pytest.raises(ValueError, match="keep must be a finite number, such as 0.75, got nan"):
        jlora.without_intruders(adapted, found, keep=float("nan"))
    with pytest.raises(ValueError, match="known is of the out side, and 'in' is asked for"):
        jlora.intruder_dimensions(adapted, side="in", known=found)
    with pytest.raises(ValueError, match="stack: the weight is another than the one"):
        jlora.without_intruders(adapted_with_an_intruder(), found)


@pytest.mark.once
def test_pictures_are_drawn_of_one_finding_and_of_a_training():
    found = jlora.intruder_dimensions(adapted_with_an_intruder(), threshold=0.8)
    for picture in (
        jlora.intruder_plot(found),
        jlora.intruder_plot(found, "stack"),
        jlora.intruder_plot({3: found, 9: found}),
    ):
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    with pytest.raises(ValueError, match="nowhere: no leaf of this path was looked at; there are stack, wide"):
        jlora.intruder_plot(found, "nowhere")
    with pytest.raises(ValueError, match="got no findings"):
        jlora.intruder_plot({})


@pytest.mark.parity
def test_peft_finds_and_scales_the_same_intruders():
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    w = decaying(24, 16).astype(np.float32)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False))
    peft_model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["0"]))
    layer = peft_model.base_model.model[0]
    adapted = jlora.adapterize({"w": jnp.asarray(w)}, {"w": jlora.LoRA(8, alpha=8)})
    # Two strong directions in eight ranks: what is scaled away of them stays within the rank, to which PEFT cuts.
    rng = np.random.default_rng(4)
    a, b = np.zeros((24, 8), np.float32), np.zeros((8, 16), np.float32)
    a[:, :2], b[:2] = rng.standard_normal((24, 2)), 3 * rng.standard_normal((2, 16))
    adapted = adapted.replace(params={"w": {"a": jnp.asarray(a), "b": jnp.asarray(b)}})
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(w.T))
        layer.lora_A["default"].weight.copy_(torch.tensor(a.T))
        layer.lora_B["default"].weight.copy_(torch.tensor(b.T))
    reduce_intruder_dimension(peft_model, top_k=10, threshold_epsilon=0.6, mitigation_lambda=0.5)
    name = peft_model.active_adapter
    found = jlora.intruder_dimensions(adapted, threshold=0.6)
    assert found.count > 0
    wanted = w + layer.get_delta_weight(name).detach().numpy().T
    np.testing.assert_allclose(jlora.without_intruders(adapted, found, keep=0.5)["w"], wanted, atol=1e-3)
