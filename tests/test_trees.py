"""What a params tree may hold and how its leaves are named: boxes, fields, numbers, numpy arrays, shapes, adapters."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import discovery
from flax import linen, nnx

import jlora
from jlora import paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attention:
    query: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alone:
    value: jax.Array


def paths_of(params):
    return ["/".join(keys) for keys, _ in paths.flatten_with_keys(params)[0]]


def test_a_field_named_value_keeps_its_name_and_a_box_has_none():
    w = jnp.ones((2, 2))
    assert paths_of({"attention": Attention(w, w), "alone": Alone(w)}) == [
        "alone/value",
        "attention/query",
        "attention/value",
    ]
    boxes = {"linen": linen.LogicallyPartitioned(w, ("a", None)), "nnx": nnx.Param(w), "value": nnx.Param(w)}
    assert paths_of(boxes) == ["linen", "nnx", "value"]
    inside = {"nnx": nnx.Param(Attention(w, w)), "linen": linen.Partitioned({"value": w}, ("a", None))}
    assert paths_of(inside) == ["linen/value/value", "nnx/value/query", "nnx/value/value"]


def test_modules_of_nnx_may_call_a_part_value():
    class Cell(nnx.Module):
        def __init__(self):
            self.value = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    wanted = ["value/bias", "value/kernel"]
    assert paths_of(nnx.state(Cell(), nnx.Param)) == wanted and paths_of(Cell()) == wanted


def test_a_second_adapter_goes_on_an_adapted_and_lift_and_merge_see_through():
    w, x = jax.random.normal(jax.random.key(0), (4, 4)), jnp.ones((1, 4))
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    first = jlora.adapterize({"w": w}, {"w": jlora.LoRA(rank=1, init="random")})
    second = jlora.adapterize(first, {"base/w": jlora.LoRA(rank=2, init="random")}, jax.random.key(1))
    update = lambda adapters: 8 / adapters["a"].shape[1] * adapters["a"] @ adapters["b"]
    wanted = w + update(first.params["w"]) + update(second.params["base"]["w"])
    chex.assert_trees_all_close(jlora.merge(second), {"w": wanted}, atol=1e-5)
    for lifted in (jlora.lift(fn), jlora.lift(jlora.lift(fn))):
        chex.assert_trees_all_close(lifted(second, x), fn({"w": wanted}, x), atol=1e-5)


def test_a_pattern_that_hits_a_number_is_refused_with_the_number():
    with pytest.raises(
        TypeError, match="eps is 1e-05 and no array; only arrays can be adapted, so leave it out of the"
    ):
        jlora.adapterize({"eps": 1e-5, "w": jnp.ones((4, 4))}, {".*": jlora.Full()})


def test_shapes_alone_give_adapters_that_are_shapes():
    shapes = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32), "v": jax.ShapeDtypeStruct((6, 4), jnp.float32)}
    spec = {"w": jlora.LoRA(rank=2), "v": jlora.EVA(rank=2)}
    planned = jlora.adapterize(shapes, spec)
    assert planned.base["w"] is shapes["w"] and planned.plan.sites[1].path == "w"
    assert planned.params["w"] == {
        "a": jax.ShapeDtypeStruct((4, 2), jnp.float32),
        "b": jax.ShapeDtypeStruct((2, 6), jnp.float32),
    }
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((planned.params, planned.frozen)))


@pytest.mark.parametrize(
    "params, message",
    [
        (jnp.ones((4, 4)), r'params is one leaf, which has no path; wrap it in a dict, as in \{"w": params\}'),
        ({"~shared": {"w": jnp.ones((4, 4))}}, "the params tree has the key '~shared', which jlora keeps for itself"),
        ({}, "matches no leaf: the params tree has none"),
    ],
)
def test_trees_without_paths_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        jlora.adapterize(params, {".*": jlora.Full()})


def test_numbers_and_texts_are_left_alone_from_trace_to_file(tmp_path):
    w, x = jax.random.normal(jax.random.key(0), (4, 4)), jnp.ones((1, 4))
    params = {"eps": 0.5, "flag": True, "n": 2, "none": None, "numpy": np.float32(3), "w": w}
    fn = lambda p, x: x @ p["w"] * p["n"] + p["eps"] * p["numpy"] * p["flag"]
    spec = {"w": jlora.LoRA(rank=2, init="random")}
    adapted = jlora.adapterize(params, spec, sites=jlora.sites(fn, params, x))
    merged = jlora.merge(adapted)
    assert {name: merged[name] for name in params if name != "w"} == {
        name: params[name] for name in params if name != "w"
    }
    assert "trained 16 of 17 values" in jlora.summary(adapted)
    chex.assert_trees_all_close(jlora.lift(fn)(adapted, x), fn(merged, x), atol=1e-5)
    after_a_step = jax.jit(lambda adapted: adapted)(adapted)
    jlora.save(tmp_path / "adapters", after_a_step)
    loaded = jlora.load(tmp_path / "adapters", params)
    assert loaded.base is params
    chex.assert_trees_all_close(loaded.params, adapted.params, atol=0)
    with pytest.raises(ValueError, match="was made for another base"):
        jlora.load(tmp_path / "adapters", {**params, "eps": 0.25})


def test_a_start_from_gradients_sees_numbers_as_numbers():
    params = {"times": 2, "w": jnp.ones((4, 4))}
    loss = lambda p, x: sum(jnp.sum(jnp.sin(x @ p["w"])) for _ in range(p["times"]))
    spec = {"w": jlora.SHiRA("gradient", entries=3)}
    prepared = jlora.prepare(params, spec, loss, [jnp.ones((1, 4))])
    assert jlora.adapterize(params, spec, prepared=prepared).params["w"]["values"].shape == (3,)


def test_the_shardings_of_a_tree_with_numbers():
    adapted = jlora.adapterize({"eps": 0.5, "w": jnp.ones((4, 4))}, {"w": jlora.LoRA(rank=2)})
    placed = jlora.mesh.shardings(adapted, jax.make_mesh((1,), ("model",)))
    assert jax.tree.structure(placed) == jax.tree.structure(adapted)


@pytest.mark.parametrize("method", [case for case in discovery.cases() if not case.needs], ids=str)
def test_every_method_starts_and_merges_on_numpys_arrays(method):
    base = np.asarray(np.random.default_rng(0).standard_normal((16, 12)), np.float32)
    base.flags.writeable = False
    held = []

    def used():
        adapted = jlora.adapterize({"w_0": base}, {"w_0": method})
        held.extend(jax.tree.leaves(adapted.params))
        product = jlora.lift(lambda params, x: x @ params["w_0"])
        return jlora.merge(adapted)["w_0"] if method.mergeable else product(adapted, np.ones((16, 16), np.float32))

    assert jax.eval_shape(used).shape == (16, 12)
    assert held and all(isinstance(field, jax.Array) for field in held)


def test_shira_merges_on_a_file_that_may_only_be_read(tmp_path):
    np.save(tmp_path / "w.npy", np.arange(24, dtype=np.float32).reshape(4, 6))
    params = {"w": np.load(tmp_path / "w.npy", mmap_mode="r")}
    adapted = jlora.adapterize(params, {"w": jlora.SHiRA("struct", entries=4)})
    adapted = adapted.replace(params={"w": {"values": jnp.ones(4)}})
    np.testing.assert_array_equal(jlora.merge(adapted)["w"], params["w"] + np.eye(4, 6))


def test_files_from_before_fields_named_value_had_a_name_load(tmp_path):
    params = {"first": Alone(jnp.ones((4, 4))), "second": jnp.ones((4, 4)), "box": nnx.Param(jnp.ones(3))}
    former = {"first": params["first"].value, "second": params["second"], "box": params["box"]}
    spec = {"first|second": jlora.DoRA(jlora.LoRA(rank=2, init="pissa"))}
    jlora.save(tmp_path / "adapters", jlora.adapterize(former, spec))
    loaded = jlora.load(tmp_path / "adapters", params)
    assert [site.path for site in loaded.plan.sites] == ["first/value", "second"] and loaded.base is params
    wanted = jlora.adapterize(params, {"first/value|second": spec["first|second"]})
    assert jax.tree.structure(loaded) == jax.tree.structure(wanted)
    with pytest.raises(ValueError, match="made for another base"):
        jlora.load(tmp_path / "adapters", {**params, "second": jnp.zeros((4, 4))})
    with pytest.raises(ValueError, match="adapts first, which the base lacks"):
        jlora.load(tmp_path / "adapters", {**params, "first": Attention(jnp.ones((4, 4)), jnp.ones((4, 4)))})


def test_keys_that_one_name_in_a_checkpoint_would_stand_for_are_refused(tmp_path):
    params = {"a.b": {"w": jnp.ones((4, 4))}, "a": {"b.w": jnp.ones((4, 4))}}
    adapted = jlora.adapterize(params, {".*": jlora.Full()})
    with pytest.raises(ValueError, match=r"a/b.w/w and a.b/w/w have one name in a checkpoint, a.b.w.w; rename"):
        jlora.save(tmp_path / "adapters", adapted)
    assert not (tmp_path / "adapters").exists()
    one = {"a.b": params["a.b"]}
    jlora.save(tmp_path / "one", jlora.adapterize(one, {".*": jlora.Full()}))
    assert jlora.load(tmp_path / "one", one).plan.sites[0].keys == ("a.b", "w")
