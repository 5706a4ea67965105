"""Leaves with fields in common: which are a group, how they are run, cut, counted and encoded again, and when they can't be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import close, jit, normal, perturbed, weight
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import paths

LOW = jlora.JointLowRank(3)
PARAMS = {
    "layers": {
        "q": {"kernel": weight(0, 2, 8, 8)},
        "k": {"kernel": weight(1, 2, 8, 4)},
        "up": {"kernel": weight(2, 2, 8, 12)},
        "down": {"kernel": weight(3, 2, 12, 8)},
        "o": {"kernel": weight(4, 2, 8, 8)},
    },
    "head": weight(5, 8, 8),
}
SPEC = {
    ".*/(q|k)/kernel": LOW,
    ".*/(up|down)/kernel": jlora.TransposedPair(),
    ".*/o/kernel": jlora.JointLowRank(3, "layers"),
}


def model(params, x):
    """Layers under `scan` and `remat`, the stacked weights with fields of their own, of a layer's, and of all layers."""

    def layer(x, w):
        x = jnp.tanh(x @ w["q"]["kernel"]) + jnp.tile(x @ w["k"]["kernel"], 2) @ w["o"]["kernel"]
        return x + jnp.tanh(x @ w["up"]["kernel"]) @ w["down"]["kernel"], None

    return lax.scan(jax.checkpoint(layer), x, params["layers"])[0] @ params["head"]


SITES = jlora.sites(model, PARAMS, normal(9, 5, 8))
STACKS = {"a": weight(0, 2, 8, 8), "b": weight(0, 3, 8, 8)}
BASE = jlora.quantize(PARAMS, SPEC, SITES)


def leaf(tree, name):
    return tree["layers"][name]["kernel"]


@pytest.mark.once
def test_what_a_group_has_in_common_is_one_array_of_a_layer_or_of_all():
    assert leaf(BASE, "q").fields["left"] is leaf(BASE, "k").fields["left"]
    assert leaf(BASE, "up").fields["matrix"] is leaf(BASE, "down").fields["matrix"]
    assert leaf(BASE, "q").fields["left"].shape == (2, 8, 3) and not leaf(BASE, "q").common
    assert leaf(BASE, "o").common["left"].shape == (8, 3) and leaf(BASE, "o").fields["right"].shape == (2, 3, 8)
    assert leaf(BASE, "q").group == leaf(BASE, "k").group != leaf(BASE, "up").group == leaf(BASE, "down").group
    both = jnp.concatenate([leaf(PARAMS, "q"), leaf(PARAMS, "k")], -1)
    for n in range(2):
        u, s, v = np.linalg.svd(both[n], full_matrices=False)
        close(leaf(BASE, "q").decoded()[n], ((u[:, :3] * s[:3]) @ v[:3])[:, :8])
    whole = np.concatenate([*leaf(PARAMS, "o")], 1)
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    close(jnp.concatenate([*leaf(BASE, "o").decoded()], 1), (u[:, :3] * s[:3]) @ v[:3])


def test_values_and_gradients_are_those_of_the_decoded_base():
    x = normal(9, 5, 8)
    found = []
    for base in (BASE, jlora.dequantize(BASE)):
        adapted = perturbed(jlora.adapterize(base, {".*/(q|o|up)/kernel": jlora.LoRA(2)}, sites=SITES))
        loss = lambda p, a: jnp.sum(jnp.sin(jlora.lift(model)(a.replace(params=p), x)))
        found.append((jit(jax.value_and_grad(loss))(adapted.params, adapted), jlora.merge(adapted)))
    close(*found)


@pytest.mark.once
def test_leaves_of_numbered_layers_have_one_field_in_common_too():
    params = {f"layer_{n}": {"q": weight(n, 8, 8), "k": weight(n + 5, 8, 4)} for n in range(2)}
    over = jlora.quantize(params, {".*/(q|k)": jlora.JointLowRank(3, "layers")})
    assert over["layer_0"]["q"].common["left"] is over["layer_1"]["q"].common["left"]
    assert over["layer_0"]["q"].common["left"] is not over["layer_0"]["k"].common["left"]
    each = jlora.quantize(params, {".*/(q|k)": LOW})
    assert each["layer_1"]["q"].common["left"] is each["layer_1"]["k"].common["left"]
    # One code in two entries of a spec makes two groups.
    apart = jlora.quantize(params, {".*/q": LOW, ".*/k": LOW})
    assert len({leaf.group for leaf in paths.leaves(apart)}) == 4


@pytest.mark.once
def test_common_fields_count_once_in_reports():
    errors = jlora.coding_errors(PARAMS, BASE)
    kept = {each.path: each for each in errors.leaves}
    assert kept["layers/q/kernel"].bits == pytest.approx(32 * 2 * (8 * 3 / 2 + 3 * 8) / (2 * 64))
    assert kept["layers/up/kernel"].bits == pytest.approx((32 * 96 / 2 + 8) / 96)
    assert kept["layers/o/kernel"].bits == pytest.approx(32 * (8 * 3 + 2 * 3 * 8) / (2 * 64))
    size = sum(each.size for each in errors.leaves)
    assert errors.total.bits == pytest.approx(sum(each.bits * each.size for each in errors.leaves) / size)
    assert errors.total.size == size == 2 * (64 + 32 + 96 + 96 + 64)
    text = jlora.summary(jlora.adapterize(BASE, {"head": jlora.LoRA(2)}))
    assert "2 leaves kept as JointLowRank(rank=3): 192 values of 20.000 bits" in text


@pytest.mark.once
def test_errors_are_those_of_numpy_in_a_table_with_the_worst_first():
    errors, decoded = jlora.coding_errors(PARAMS, BASE), jlora.dequantize(BASE)
    lost = whole = 0.0
    for each in errors.leaves:
        name = each.path.split("/")[1]
        w, got = np.float64(leaf(PARAMS, name)), np.float64(leaf(decoded, name))
        assert each.relative == pytest.approx(np.linalg.norm(w - got) / np.linalg.norm(w), rel=1e-5)
        assert each.largest == pytest.approx(np.abs(w - got).max(), rel=1e-5)
        lost, whole = lost + np.sum((w - got) ** 2), whole + np.sum(w**2)
    assert errors.total.relative == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert errors.total.largest == max(each.largest for each in errors.leaves)
    lines = str(errors).splitlines()
    assert lines[0].split() == ["leaf", "code", "weights", "bits", "relative", "largest"]
    assert [float(line.split()[-2]) for line in lines[1:-1]] == sorted(
        (round(each.relative, 4) for each in errors.leaves), reverse=True
    )
    assert lines[-1].startswith("together  ") and f"{errors.total.size:,}" in lines[-1]
    zeros = {"w": jnp.zeros((8, 8))}
    assert jlora.coding_errors(zeros, jlora.quantize(zeros, {"w": jlora.Int8()})).total.relative == 0


@pytest.mark.once
def test_errors_need_originals():
    with pytest.raises(ValueError, match="no leaf is kept in the form of a code: give the original params first"):
        jlora.coding_errors(BASE, PARAMS)
    for params, got in (({}, "nothing"), (BASE, "Stored"), ({"layers": {"down": {"kernel": jnp.ones(3)}}}, r"\(3,\)")):
        with pytest.raises(
            ValueError, match=rf"layers/down/kernel is kept as TransposedPair\(\) .* there is {got}.* for it"
        ):
            jlora.coding_errors(params, BASE)


@pytest.mark.once
def test_a_group_is_encoded_again_together_where_one_of_it_was_adapted():
    adapted = perturbed(jlora.adapterize(BASE, {".*/q/kernel": jlora.LoRA(1)}, sites=SITES))
    again, merged = jlora.requantize(adapted), jlora.merge(adapted)
    want = jlora.quantize(
        {"layers": {name: {"kernel": leaf(merged, name)} for name in "qk"}}, {".*": jlora.Axes("batch in out", LOW)}
    )
    for name in "qk":
        close(leaf(again, name).decoded(), leaf(want, name).decoded())
    assert leaf(again, "q").fields["left"] is leaf(again, "k").fields["left"]
    assert leaf(again, "o") is leaf(BASE, "o")


def test_on_a_mesh_common_fields_lie_whole_on_every_device():
    mesh = jax.make_mesh((2,), ("columns",))
    adapted = jlora.adapterize(BASE, {".*/o/kernel": jlora.LoRA(2)}, sites=SITES)
    names = jax.tree.map(lambda _: P(), adapted.base, is_leaf=lambda node: isinstance(node, jlora.Stored))
    names["layers"]["o"]["kernel"] = P(None, None, "columns")
    placed = jax.device_put(adapted, jlora.mesh.shardings(adapted, mesh, names=names))
    assert leaf(placed.base, "o").common["left"].sharding.is_fully_replicated
    assert leaf(placed.base, "o").fields["right"].sharding.spec == P(None, None, "columns")
    x = normal(9, 5, 8)
    close(jax.jit(jlora.lift(model))(placed, x), jax.jit(jlora.lift(model))(adapted, x))
    cut = {"w": jax.device_put(weight(0, 8, 8), NamedSharding(mesh, P("columns")))}
    with pytest.raises(
        ValueError, match=r"w lies on a mesh, and JointLowRank\(rank=3\) is found from several matrices"
    ):
        jlora.quantize(cut, {"w": LOW})


@pytest.mark.once
def test_shapes_can_be_quantized_and_saved_adapters_know_common_fields(tmp_path):
    shapes = jax.eval_shape(lambda params: jlora.quantize(params, SPEC, SITES), PARAMS)
    assert leaf(shapes, "o").common["left"].shape == (8, 3)
    adapted = jlora.adapterize(BASE, {"head": jlora.LoRA(2)})
    jlora.save(tmp_path / "one", adapted)
    close(jlora.load(tmp_path / "one", BASE).params, adapted.params)
    other = jax.tree.map(lambda x: x, BASE)
    leaf(other, "o").common["left"] = leaf(BASE, "o").common["left"] + 1
    with pytest.raises(ValueError, match="was made for another base: fingerprint"):
        jlora.load(tmp_path / "one", other)


@pytest.mark.parametrize(
    ("params", "spec", "words"),
    [
        (PARAMS, {".*/(q|up|down)/kernel": LOW}, r"layers/down/kernel, layers/q/kernel, .*: JointLow.*inputs, got \[8, 12\]"),
        (PARAMS, {".*/(q|k)/kernel": jlora.TransposedPair()}, r"a pair is two matrices .*, got \[8, 4\], \[8, 8\]"),
        (STACKS, {".*": jlora.Axes("batch in out", LOW)}, r"a, b: .* their stacks are \[\(2,\), \(3,\)\]"),
        ({"w": weight(0, 8, 8).at[2, 3].set(jnp.nan)}, {"w": LOW}, r"w: some hold values that are not finite"),
    ],
)  # fmt: skip
@pytest.mark.once
def test_quantize_refuses_what_is_no_group(params, spec, words):
    with pytest.raises(ValueError, match=words):
        jlora.quantize(params, spec, SITES if params is PARAMS else None)


@pytest.mark.once
def test_where_leaves_are_encoded_one_after_the_other_groups_are_refused():
    spec = {"w": jlora.LoRA(2, init="residual")}
    with pytest.raises(
        ValueError, match=r"w: JointLowRank\(rank=3\) takes several leaves together, where here each is"
    ):
        jlora.loftq({"w": weight(0, 8, 8)}, spec, LOW)
