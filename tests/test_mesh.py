"""On named meshes: adapters lie as their base does, and training gives the single-device result."""

import functools
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.core.tree import placement

KEY = jax.random.key(0)
# How each layout cuts (batch, up-projection [16, 32], down-projection [32, 16], attention kernel [16, 4, 8]).
LAYOUTS = {
    "data": ({"data": 8}, P("data"), P(), P(), P()),
    "fsdp": ({"fsdp": 8}, P("fsdp"), P("fsdp"), P("fsdp"), P("fsdp")),
    "tensor": ({"model": 4}, P(), P(None, "model"), P("model"), P(None, "model")),
    "mixed": ({"data": 2, "model": 4}, P("data"), P("data", "model"), P("model", "data"), P("data", "model")),
}


def model(p, x):
    heads = jnp.einsum("btd,dhk->bthk", x, p["qkv"]["kernel"])
    x = x + jnp.einsum("bthk,hkd->btd", jnp.tanh(heads), p["out"]["kernel"])
    return x + jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def base():
    quarter = lambda seed, *shape: jnp.asarray(np.asarray(normal(seed, *shape)) / 4)
    return {
        "qkv": {"kernel": quarter(0, 16, 4, 8)},
        "out": {"kernel": quarter(1, 4, 8, 16)},
        "up": {"kernel": quarter(2, 16, 32), "bias": jnp.zeros(32)},
        "down": {"kernel": quarter(3, 32, 16)},
    }


X, Y = (normal(seed, 8, 4, 16) for seed in (10, 11))
SPEC = {
    "up/bias": jlora.Full(),
    "down/kernel": jlora.DoRA(jlora.LoRA(2, init="random")),
    ".*": jlora.LoRA(2, init="random"),
}


def on_mesh(layout):
    sizes, batch, up, down, qkv = LAYOUTS[layout]
    count = int(np.prod(list(sizes.values())))
    types = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=jax.devices()[:count])
    specs = {
        "qkv": {"kernel": qkv},
        "out": {"kernel": P(*qkv[1:2])},
        "up": {"kernel": up, "bias": P(*up[1:2])},
        "down": {"kernel": down},
    }
    place = lambda tree, specs: jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)
    return place(base(), specs), place(X, batch), place(Y, batch)


class Course(NamedTuple):
    """The base, what is adapted at the start, after one step and after ten, the last loss, and the step's program."""

    params: Any
    start: jlora.Adapted
    one: jlora.Adapted
    ten: jlora.Adapted
    loss: jax.Array
    program: str


def train(params, x, y):
    start = jlora.adapterize(params, SPEC, key=KEY, sites=jlora.sites(model, params, x))
    tx = jlora.optimizer(start, optax.adamw, 1e-2, ratio=4)

    @jax.jit
    def step(adapted, state):
        loss_fn = lambda p: jnp.mean((jlora.lift(model)(adapted.replace(params=p), x) - y) ** 2)
        loss, grads = jax.value_and_grad(loss_fn)(adapted.params)
        updates, state = tx.update(grads, state, adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state, loss

    course, state = [start], jax.jit(tx.init)(start.params)
    program = step.lower(start, state).compile().as_text()
    for _ in range(10):
        adapted, state, loss = step(course[-1], state)
        course.append(adapted)
    return Course(params, start, course[1], course[10], loss, program)


@pytest.fixture(scope="module")
def trained():
    """The course of each layout, and of one device (None)."""
    return functools.cache(lambda layout: train(*(on_mesh(layout) if layout else (base(), X, Y))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_on_a_mesh_equal_ten_steps_on_one_device(layout, trained):
    found, wanted = trained(layout), trained(None)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found.ten.params, wanted.ten.params)


@pytest.mark.parametrize("layout", ["tensor", "mixed"])
def test_adapters_lie_as_their_base_does_before_and_after_training(layout, trained):
    for adapted in (trained(layout).start, trained(layout).one):
        up, down, qkv = adapted.params["up"], adapted.params["down"]["kernel"], adapted.params["qkv"]["kernel"]
        data = "data" if layout == "mixed" else None
        wanted = [
            (up["kernel"]["a"], P(data)),
            (up["kernel"]["b"], P(None, "model")),
            (up["bias"]["w"], P("model")),
            (down["a"], P("model")),
            (down["m"], P(data)),
            (qkv["b"], P(None, "model")),
        ]
        for array, spec in wanted:
            assert array.sharding.is_equivalent_to(NamedSharding(array.sharding.mesh, spec), array.ndim)


def test_a_tensor_parallel_step_gathers_no_base_weight(trained):
    gathered = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather", trained("tensor").program)
    assert all(np.prod([int(n) for n in shape.split(",") if n]) < 16 * 32 for shape in gathered), gathered


def test_inputs_that_a_mesh_cuts_give_the_same_and_are_summed_in_16_bits():
    params, x, _ = on_mesh("tensor")
    spec = {r"(out|down)/kernel": jlora.LoRA(2, init="random")}
    adapted = jlora.adapterize(params, spec, key=KEY, sites=jlora.sites(model, params, x))
    cuts = jlora.mesh.cuts(adapted, {"model"})
    assert cuts == {"out/kernel": 4, "down/kernel": 4}
    assert jlora.mesh.cuts(adapted, {"data"}) == {}
    half, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (adapted.base, x))

    def run(cuts):
        loss = lambda p: jnp.mean(jlora.lift(model, cuts=cuts)(adapted.replace(base=half, params=p), x) ** 2)
        step = jax.jit(jax.value_and_grad(loss))
        # Sums over the pieces of the input, in 16 bits, before the compiler cuts the program.
        sums = re.findall(r"reduce\(.* applies stablehlo.add across dimensions = \[0\] : \(tensor<4x\w+xbf16>",
                          step.lower(adapted.params).as_text())  # fmt: skip
        return *step(adapted.params), len(sums)

    loss, gradients, sums = run(cuts)
    wanted, wanted_gradients, none = run(None)
    assert (sums, none) == (2, 0)
    np.testing.assert_allclose(loss, wanted, rtol=0.01)
    for got, each in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients)):
        assert jnp.linalg.norm(got - each) < 0.02 * jnp.linalg.norm(each)


def test_only_the_axes_that_cut_activations_count_as_cuts():
    mesh = jax.make_mesh((2, 4), ("fsdp", "model"), (AxisType.Auto,) * 2)
    cut = {"w": P("fsdp"), "v": P("model"), "u": P(None, "model"), "both": P(("fsdp", "model"))}
    place = lambda spec: jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
    params = {name: place(spec) for name, spec in cut.items()}
    adapted = jlora.adapterize(params, {".*": jlora.LoRA(2)})
    assert jlora.mesh.cuts(adapted, {"model"}) == {"v": 4}
    assert jlora.mesh.cuts(adapted, {"model", "fsdp"}) == {"w": 2, "v": 4, "both": 8}


def test_merge_save_and_load_keep_the_shardings(tmp_path, trained):
    params, fresh, adapted, *_ = trained("mixed")
    merged = jlora.merge(adapted)
    assert jax.tree.map(lambda leaf: leaf.sharding, merged) == jax.tree.map(lambda leaf: leaf.sharding, params)
    jlora.save(tmp_path / "adapters", adapted)
    loaded = jlora.load(tmp_path / "adapters", params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, adapted.params)
    same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert jax.tree.all(jax.tree.map(same, loaded.params, fresh.params))
    np.testing.assert_array_equal(
        jlora.load(tmp_path / "adapters", base()).params["up"]["kernel"]["a"], adapted.params["up"]["kernel"]["a"]
    )


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def same_places(shapes, arrays):
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, b.ndim)
    return jax.tree.all(jax.tree.map(same, shapes, arrays))


SHARING = {"up/kernel": jlora.VeRA(2), "out/kernel": jlora.EVA(2), **SPEC}


@pytest.mark.parametrize("layout", ["mixed", None])
def test_shapes_of_a_base_give_shapes_of_adapters_that_lie_as_the_arrays_would(layout):
    params, x = on_mesh(layout)[:2] if layout else (base(), X)
    sites = jlora.sites(model, params, x)
    batch = lambda p, x: jnp.mean(model(p, x) ** 2)
    arrays = jlora.adapterize(
        params, SHARING, sites=sites, prepared=jlora.prepare(params, SHARING, batch, [x], sites=sites)
    )
    planned = jlora.adapterize(shapes_of(params), SHARING, sites=sites)
    assert same_places(planned, arrays)


def test_under_jit_the_shardings_of_shapes_say_where_adapters_lie_and_without_them_a_warning_does():
    params, x, _ = on_mesh("mixed")
    sites = jlora.sites(model, params, x)
    make = lambda params: jlora.adapterize(params, SPEC, sites=sites)
    planned = make(shapes_of(params))
    with pytest.warns(
        UserWarning, match="down/kernel lies on a mesh, but under jax.jit nothing shows how.*out_shardings="
    ):
        made = jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, planned))(params)
    assert same_places(planned, made)


def test_base_and_adapters_are_read_straight_to_their_places_on_a_mesh(tmp_path, trained, monkeypatch):
    params, start, _, adapted, *_ = trained("mixed")
    jlora.save(tmp_path / "adapters", adapted)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", params)
        checkpointer.save(tmp_path / "whole", adapted)
    planned, put, pieces = jlora.load(tmp_path / "adapters", shapes_of(params)), jax.device_put, []
    assert same_places(planned, start)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(planned))

    def counted(x, *args, **kwargs):
        pieces.extend(leaf.nbytes for leaf in jax.tree.leaves(x) if isinstance(leaf, np.ndarray))
        return put(x, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", counted)
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(tmp_path / "base", planned.base)
        whole = checkpointer.restore(tmp_path / "whole", planned)
    loaded = jlora.load(tmp_path / "adapters", read)
    shards = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(adapted)]
    assert len(pieces) >= 8 * len(jax.tree.leaves(params)) and max(pieces) <= max(shards), pieces
    for found in (loaded, whole):
        assert same_places(found, start)
        jax.tree.map(np.testing.assert_array_equal, found, adapted)


@pytest.mark.parametrize(
    "method", [jlora.LoRA(2, init="random"), jlora.DoRA(jlora.LoRA(2, init="random")), jlora.Full()]
)
def test_a_mesh_with_explicit_axes_gives_the_same(method):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Explicit,) * 2)

    def f(p, x):
        h = jnp.tanh(x @ p["up"])
        return (
            jnp.dot(h, p["down"], out_sharding=P("data"))
            if x.ndim == 3 and jax.typeof(x).sharding.spec[0]
            else h @ p["down"]
        )

    params = {"up": base()["up"]["kernel"], "down": base()["down"]["kernel"]}
    plain = jlora.adapterize(params, {".*": method})
    value_and_grad = lambda a, x: jax.value_and_grad(lambda p: jnp.sum(jlora.lift(f)(a.replace(params=p), x) ** 2))(
        a.params
    )
    wanted = jax.jit(value_and_grad)(plain, X)
    with jax.set_mesh(mesh):
        specs = {"up": P(None, "model"), "down": P("model", None)}
        cut = {name: jax.device_put(w, NamedSharding(mesh, specs[name])) for name, w in params.items()}
        got = jax.jit(value_and_grad)(
            jlora.adapterize(cut, {".*": method}), jax.device_put(X, NamedSharding(mesh, P("data")))
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), jax.device_get(got), jax.device_get(wanted)
    )


def test_a_cut_that_does_not_divide_names_the_leaf_and_the_numbers():
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    site = jlora.adapterize({"up": jnp.zeros((16, 30))}, {"up": jlora.LoRA(2)}).plan.sites[0]
    with pytest.raises(ValueError, match=r"up: the mesh axis model=4 does not divide the 30 of axis 1 of \(16, 30\)"):
        placement.check_cut(site.path, site.shape, P(None, "model"), mesh.shape)
    with pytest.raises(ValueError, match="up: axis 0 is cut by 'expert', but the mesh has only data=2, model=4"):
        placement.check_cut(site.path, site.shape, P("expert"), mesh.shape)


def test_a_base_on_another_mesh_than_the_one_in_use_is_refused():
    params, *_ = on_mesh("tensor")
    with (
        jax.set_mesh(jax.make_mesh((8,), ("data",), (AxisType.Auto,))),
        pytest.raises(ValueError, match="up/kernel: the base is cut by model=4, but the mesh in use has only data=8"),
    ):
        jlora.adapterize({"up": params["up"]}, {"up/kernel": jlora.LoRA(2)})


def test_rules_for_paths_say_where_a_base_lies_and_a_wrong_one_is_refused():
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    params = {**base(), "down": jlora.quantize(base()["down"], {"kernel": jlora.Int8()})}
    rules = {"up/kernel": P(None, ("data", "model")), "(up|down)/kernel": P("data", None), "up/bias": P("model")}
    placed = jax.device_put(params, jlora.mesh.by_path(params, mesh, rules))
    assert placed["up"]["kernel"].sharding.spec == rules["up/kernel"]
    assert placed["down"]["kernel"].sharding.spec == P("data", None)
    assert placed["up"]["bias"].sharding.spec == P("model")
    assert placed["qkv"]["kernel"].sharding.is_fully_replicated
    for rule, message in [
        ({"kernel": P()}, "'kernel' matches the whole path of no weight; nearest:"),
        (
            {"up/.*": P(None), "up/bias": P(None)},
            "all that 'up/bias' matches is taken by a pattern before it, such as 'up/",
        ),
        ({"up/.*": P(None, "model")}, r"up/bias: P.*\(None, 'model'\) has 2 entries, but the leaf \(32,\) has 1 axes"),
        ({"up/bias": P("tensor")}, "up/bias: axis 0 is cut by 'tensor', but the mesh has only data=2, model=4"),
        (
            {"out/kernel": P(("model", "data"), None, None)},
            "out/kernel: the mesh axis model=4 x data=2 does not divide the 4",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            jlora.mesh.by_path(params, mesh, rule)


RULES = (("embed", "data"), ("mlp", "model"), ("layers", None))


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        cut = lambda *names: nn.with_logical_partitioning(nn.initializers.normal(), names)
        x = x + nn.Dense(32, kernel_init=cut("embed", "mlp"), bias_init=cut("mlp"), name="up")(x)[..., :16]
        return nn.Dense(16, kernel_init=cut("mlp", "embed"), use_bias=False, name="down")(jnp.tile(x, 2))


def boxed_params():
    return jax.jit(Named().init)(KEY, X)["params"]


def test_logical_axis_names_of_a_flax_base_give_the_adapters_theirs():
    boxed = boxed_params()
    spec = {"up/kernel": jlora.DoRA(jlora.LoRA(2)), "down/kernel": jlora.LoRA(2), "up/bias": jlora.Full()}
    adapted = jlora.adapterize(boxed, spec)
    named = jlora.mesh.logical_axes(adapted)
    assert named.params["up"]["kernel"] == {"a": P("embed", None), "b": P(None, "mlp"), "m": P("mlp")}
    assert named.params["down"]["kernel"] == {"a": P("mlp", None), "b": P(None, "embed")}
    assert named.params["up"]["bias"] == {"w": P("mlp")}
    plain = jlora.adapterize(nn.unbox(boxed), spec)
    assert jlora.mesh.logical_axes(plain, nn.get_partition_spec(boxed)).params == named.params
    with pytest.raises(ValueError, match="names has nothing for down/kernel"):
        jlora.mesh.logical_axes(plain, {"up": nn.get_partition_spec(boxed)["up"]})

    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    placed = jax.device_put(adapted, jlora.mesh.shardings(adapted, mesh, RULES))
    assert placed.params["up"]["kernel"]["b"].sharding.spec == P(None, "model")
    assert placed.params["down"]["kernel"]["b"].sharding.spec == P(None, "data")
    apply = jax.jit(jlora.lift(Named().apply))
    np.testing.assert_allclose(apply({"params": placed}, X), apply({"params": adapted}, X), rtol=1e-5, atol=1e-5)
    made = jax.jit(
        lambda key: jlora.adapterize(boxed, spec, key), out_shardings=jlora.mesh.shardings(adapted, mesh, RULES)
    )
    assert made(KEY).params["up"]["kernel"]["a"].sharding.spec == P("data")


def test_rules_that_do_not_fit_the_mesh_are_refused():
    adapted = jlora.adapterize(boxed_params(), {".*/kernel": jlora.LoRA(2)})
    mesh = jax.make_mesh((1, 8), ("data", "model"), (AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="the rule 'mlp' -> 'tensor': the mesh has only data=1, model=8"):
        jlora.mesh.shardings(adapted, mesh, (("mlp", "tensor"),))
    six = jax.make_mesh((6,), ("model",), (AxisType.Auto,), devices=jax.devices()[:6])
    with pytest.raises(ValueError, match="base/down/kernel: the mesh axis model=6 does not divide the 32 of axis 0"):
        jlora.mesh.shardings(adapted, six, (("mlp", "model"),))


def test_sharding_metadata_of_nnx_variables_gives_the_adapters_theirs():
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        cut = nnx.with_partitioning(nnx.initializers.normal(), ("data", "model"))
        _, params = nnx.split(nnx.Linear(16, 32, kernel_init=cut, rngs=nnx.Rngs(0)))
    adapted = jlora.adapterize(params, {"kernel": jlora.LoRA(2)})
    assert jlora.mesh.logical_axes(adapted).params["kernel"] == {"a": P("data", None), "b": P(None, "model")}
    assert adapted.params["kernel"]["b"].sharding.spec == P(None, "model")
    placed = jax.device_put(adapted, jlora.mesh.shardings(adapted, mesh))
    assert placed.params["kernel"]["a"].sharding.spec == P("data")
