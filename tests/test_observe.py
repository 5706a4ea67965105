"""`observe`: the statistics are those of inputs written down by hand, in every form of use; gradients stay as they are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import jit, normal, weight
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

SHAPES = {"heads": (8, 2, 4), "output": (2, 4, 8), "stack": (3, 8, 8), "loose": (2, 8, 8), "experts": (2, 8, 8)}
SHAPES |= {"chosen": (3, 8, 8), "convolution": (3, 8, 8), "tied": (8, 8), "q": (8, 8), "k": (8, 6), "down": (6, 5)}
PARAMS = {name: weight(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}
X = normal(20, 2, 5, 8)
CHOICE = np.array([[0, 2, 2, 1, 0], [2, 2, 0, 0, 2]])


def model(params, x, note=lambda name, x: None):
    """Uses every weight; `note` gets the inputs as a reader would write them down."""
    note("heads", x)
    x = jnp.einsum("btd,dhk->bthk", x, params["heads"])
    note("output", x.reshape(2, 5, 8))
    x = jnp.tanh(jnp.einsum("bthk,hkd->btd", x, params["output"]))
    for n in range(2):  # a stack that is taken apart by hand
        note("loose", (n, x))
        x = jnp.tanh(x @ params["loose"][n])
    for n in range(3):  # an expert a token, out of a stack
        note("chosen", (n, x[n == CHOICE]))
    x = jnp.tanh(jnp.einsum("btd,btdf->btf", x, params["chosen"][jnp.asarray(CHOICE)]))
    note("experts", (0, x))
    note("experts", (1, 2 * x))
    x = jnp.tanh(jnp.einsum("ebtd,edf->ebtf", jnp.stack([x, 2 * x]), params["experts"])).sum(0)
    edges = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    note("convolution", jnp.concatenate([edges[:, n : n + 5] for n in range(3)], axis=-1))
    x = lax.conv_general_dilated(x, params["convolution"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    def layer(x, w):
        y = jnp.tanh(x @ w)
        return y, x

    x, inputs = lax.scan(jax.checkpoint(layer), x, params["stack"], reverse=True)
    for n in range(3):
        note("stack", (n, inputs[n]))

    def again(x, _):
        return jnp.tanh(x @ params["tied"]), x

    x, inputs = lax.scan(again, x, length=3)
    note("tied", jnp.concatenate(list(inputs)))
    note("q", x)
    note("k", x)
    q, k = jax.jit(lambda x: (x @ params["q"], x @ params["k"]))(x)  # one activation, two weights
    note("down", k)
    return q.sum() + k @ params["down"]


def by_hand(params):
    """Square sums of the inputs, as `[matrices, in]`."""
    found = {name: np.zeros((3, 24)) for name in SHAPES}

    def note(name, x):
        number, x = x if isinstance(x, tuple) else (0, x)
        rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        found[name][number, : rows.shape[1]] += (rows**2).sum(0)

    model(params, X, note)
    return found


SITES = jlora.sites(model, PARAMS, X)


def start():
    adapted = jlora.adapterize(PARAMS, {".*": jlora.LoRA(2)}, sites=SITES)
    return adapted.replace(params=jax.tree.map(lambda x: x + 0.1, adapted.params))


@pytest.fixture(scope="module")
def observed():
    """(outputs, seen, gradient) with the statistic, and the outputs and gradient of `lift` without."""
    adapted = start()

    def loss(p, fn):
        return jnp.sum(fn(adapted.replace(params=p), X))

    def both(p):
        def with_seen(p):
            outputs, seen = jlora.observe(model, jlora.input_norms)(adapted.replace(params=p), X)
            return jnp.sum(outputs) + sum(map(jnp.sum, jax.tree.leaves(seen))), (outputs, seen)

        (_, found), gradient = jax.value_and_grad(with_seen, has_aux=True)(p)
        plain = jlora.lift(model)(adapted.replace(params=p), X)
        return *found, gradient, plain, jax.grad(loss)(p, jlora.lift(model))

    return jax.device_get(jit(both)(adapted.params)), adapted


@pytest.mark.once
def test_norms_are_those_of_the_inputs_in_every_form_of_use(observed):
    (_, seen, *_), adapted = observed
    assert set(seen) == set(SHAPES)
    for name, squares in by_hand(jlora.merge(adapted)).items():
        batch = {"stack": (3,), "chosen": (3,), "loose": (2,), "experts": (2,)}.get(name, ())
        size = 24 if name == "convolution" else 6 if name == "down" else 8
        assert seen[name].shape == (*batch, size)
        wanted = np.sqrt(squares[: batch[0] if batch else 1, :size])
        np.testing.assert_allclose(seen[name].reshape(-1, size), wanted, rtol=1e-4, err_msg=name)


def test_outputs_and_gradients_are_those_of_lift_even_where_the_loss_uses_what_was_seen(observed):
    (outputs, _, gradient, plain, wanted), _ = observed
    np.testing.assert_allclose(outputs, plain, rtol=1e-6)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6), gradient, wanted)


def test_plain_params_are_watched_and_the_leading_axes_are_the_activation_s_own():
    sentences = jlora.observe(model, lambda x: x.mean(axis=-2), at="stack|q")  # the mean over tokens, per sentence
    outputs, seen = jit(sentences)(jlora.watch(PARAMS, "[sq].*", SITES), X)
    np.testing.assert_allclose(outputs, model(PARAMS, X), rtol=1e-5)
    found = {}
    model(PARAMS, X, lambda name, x: found.setdefault(name, []).append(x))
    np.testing.assert_allclose(seen["q"], found["q"][0].mean(1), rtol=1e-5, atol=1e-6)
    for n, x in found["stack"]:
        np.testing.assert_allclose(seen["stack"][n], x.mean(1), rtol=1e-5, atol=1e-6)
    assert set(seen) == {"stack", "q"}


def test_squares_of_16_bits_are_summed_in_32():
    found = jlora.input_norms.measure(jnp.ones((300, 2), jnp.bfloat16))
    assert found.dtype == jnp.float32 and found.tolist() == [300, 300]


def test_sums_are_added_over_uses_and_finished_once():
    mean = jlora.Statistic(lambda x: (x.sum((0, 1)), jnp.float32(x.size / x.shape[-1])), lambda t: t[0] / t[1])
    _, seen = jit(jlora.observe(model, mean, at="tied|experts"))(jlora.watch(PARAMS, jlora.ALL_LINEAR, SITES), X)
    found = {}
    model(PARAMS, X, lambda name, x: found.setdefault(name, x))
    np.testing.assert_allclose(seen["tied"], found["tied"].mean((0, 1)), rtol=1e-5, atol=1e-6)
    wanted = found["experts"][1].mean((0, 1))
    np.testing.assert_allclose(seen["experts"], jnp.stack([wanted, 2 * wanted]), rtol=1e-5, atol=1e-6)


def test_a_matrix_that_is_used_at_two_places_has_the_sum_over_both():
    x, w = X[0], PARAMS["q"]
    observed = jlora.observe(lambda p, x: jnp.tanh(x @ p["q"]) @ p["q"], jlora.input_norms)
    _, seen = jit(observed)(jlora.watch({"q": w}, "q"), x)
    wanted = jnp.sqrt(jnp.sum(x**2, 0) + jnp.sum(jnp.tanh(x @ w) ** 2, 0))
    np.testing.assert_allclose(seen["q"], wanted, rtol=1e-5)


def test_under_remat_statistics_are_not_computed_again_for_the_gradient():
    def layers(params, x):
        return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["stack"])[0]

    adapted = jlora.adapterize({"stack": PARAMS["stack"]}, {"stack": jlora.Axes("batch in out", jlora.LoRA(2))})

    def loss(p):
        outputs, seen = jlora.observe(layers, lambda x: jnp.max(jnp.abs(x), axis=(0, 1)))(adapted.replace(params=p), X)
        return jnp.sum(outputs), seen

    text = jax.jit(jax.grad(loss, has_aux=True)).lower(adapted.params).compile().as_text()
    bodies = {line for line in text.splitlines() if re.search(r"= .* reduce\(.*reduce_max", line)}
    assert bodies, "the statistic is not in the program"
    assert not any("transpose" in line or "rematted" in line for line in bodies), "it is computed again"


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_meshes_the_statistic_is_that_of_all_rows(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2)

    def layers(params, x):
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]
        return x @ params["q"]

    base = {"stack": PARAMS["stack"], "q": PARAMS["q"]}
    spec = {"stack": jlora.Axes("batch in out", jlora.LoRA(2)), "q": jlora.LoRA(2)}
    observed = jlora.observe(layers, jlora.input_norms)
    rows = X.reshape(10, 8)[:8]
    _, wanted = jit(observed)(jlora.adapterize(base, spec), rows)
    placed = jax.device_put(base, NamedSharding(mesh, P(None)))
    if kind == AxisType.Auto:
        placed["stack"] = jax.device_put(base["stack"], NamedSharding(mesh, P(None, None, "model")))
    with jax.set_mesh(mesh):
        adapted = jlora.adapterize(placed, spec)
        _, seen = jit(observed)(adapted, jax.device_put(rows, NamedSharding(mesh, P("data"))))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5), seen, wanted)


def refused(fn, params, x, message, **options):
    adapted = jlora.adapterize(params, {".*": jlora.LoRA(2)})
    with pytest.raises(ValueError, match=message):
        jlora.observe(fn, jlora.input_norms, **options)(adapted, x)


def test_what_can_t_be_observed_is_an_error_that_names_path_and_primitive():
    params, x = {"w": PARAMS["q"]}, X[0]
    refused(lambda p, x: lax.cond(True, lambda: x @ p["w"], lambda: x), params, x, "observe: w is used inside `cond`")
    loop = lambda p, x: lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x @ p["w"], x)
    refused(loop, params, x, "observe: w is used inside `while` at .*test_observe.py")
    refused(lambda p, x: p["w"][jnp.array([1, 2])], params, x, "w is used by `gather`.*a lookup multiplies nothing")
    refused(lambda p, x: x @ p["w"].T, params, x, "w is used by `dot_general`.*transposed there; leave it out with at")
    refused(lambda p, x: x @ jnp.tanh(p["w"]), params, x, "w is taken whole by `tanh`")
    mesh = jax.make_mesh((1,), ("model",), (AxisType.Auto,))
    mapped = lambda p, x: jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P(), P()), out_specs=P())(x, p["w"])
    refused(mapped, params, x, "w is used inside `shard_map`")
    refused(jnp.matmul, params, x, "at='v' matches no adapted matrix; there are w", at="v")


def test_arguments_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="needs one Adapted among the arguments, got 0; .* jlora.watch"):
        jlora.observe(model, jlora.input_norms)(PARAMS, X)
    with pytest.raises(TypeError, match="patterns are a regex"):
        jlora.watch(PARAMS, 3)
