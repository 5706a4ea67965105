"""Methods that act on the input of a product, that change the bias beside, and dense updates that no pass keeps."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import jlora
from contract import checks, discovery
from contract.acting import Gain, Network
from contract.problems import adapt, by_hand, close, jit, normal, perturbed, weight
from jlora import LoRA

CHECKS = discovery.checks(checks)
FIRST = {"check_agree", "check_lift", "check_dtype", "check_mesh", "check_merge"}
EACH = [pytest.param(check, marks=() if check in FIRST else pytest.mark.long) for check in CHECKS]


@pytest.mark.parametrize("check", EACH)
@pytest.mark.parametrize("method", [Network(), pytest.param(Network(side="input"), marks=pytest.mark.long), Gain()])
def test_a_method_that_acts_keeps_the_contract(method, check):
    CHECKS[check](method)


def biased(params, x):
    """Stacked layers under scan and remat, an attention kernel of three axes, a convolution, each with its bias."""

    def layer(x, one):
        return jnp.tanh(x @ one["kernel"] + one["bias"]), None

    x = lax.scan(jax.checkpoint(layer), x, params["stack"])[0]
    x = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, params["heads"]["kernel"]) + params["heads"]["bias"])
    x = x.reshape(*x.shape[:2], -1)
    last = params["convolution"]
    x = lax.conv_general_dilated(x, last["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return x + last["bias"]


def biased_params():
    shapes = {"stack": ((3, 8, 8), (3, 8)), "heads": ((8, 2, 3), (2, 3)), "convolution": ((3, 6, 5), (5,))}
    return {
        name: {"kernel": weight(2 * n, *kernel), "bias": normal(2 * n + 1, *bias)}
        for n, (name, (kernel, bias)) in enumerate(shapes.items())
    }


@pytest.mark.once
def test_a_bias_beside_is_changed_in_the_lift_as_it_is_in_the_merged_params():
    params, x = biased_params(), normal(9, 2, 5, 8)
    adapted = perturbed(adapt(params, {".*/kernel": Gain()}, sites=jlora.sites(biased, params, x)))
    merged = jlora.merge(adapted)
    for name in params:
        before, after = params[name]["bias"], merged[name]["bias"]
        assert after.shape == before.shape and not jnp.allclose(after, before)
    close(*jit(lambda a: (jlora.lift(biased)(a, x), biased(merged, x)))(adapted))
    gain = adapted.params["heads"]["kernel"]["g"].reshape(2, 3)
    close(merged["heads"]["bias"], params["heads"]["bias"] * gain)


@pytest.mark.once
def test_a_bias_beside_keeps_the_order_of_its_axes_where_those_of_a_stack_come_last():
    params, x = {"kernel": normal(0, 8, 2, 3, 4), "bias": normal(1, 2, 3, 4)}, normal(2, 5, 8)
    fn = lambda p, x: jnp.einsum("ti,ihkb->thkb", x, p["kernel"]) + p["bias"]
    adapted = perturbed(adapt(params, {"kernel": jlora.Axes("in out out batch", Gain())}))
    gain = jnp.moveaxis(adapted.params["kernel"]["g"].reshape(4, 2, 3), 0, -1)
    wanted = {name: leaf * gain for name, leaf in params.items()}
    close(jlora.merge(adapted), wanted)
    close(jlora.lift(fn)(adapted, x), fn(wanted, x))


@pytest.mark.once
def test_a_leaf_beside_that_is_adapted_too_or_has_another_shape_is_refused_by_its_path():
    params = biased_params()
    roles = jlora.sites(biased, params, normal(9, 2, 5, 8))
    with pytest.raises(
        ValueError, match=r"stack/bias is adapted by Full\(\), but Gain\(\) of stack/kernel changes it too"
    ):
        jlora.adapterize(params, {"stack/bias": jlora.Full(), ".*/kernel": Gain()}, sites=roles)
    params["heads"]["bias"], heads = jnp.zeros(6), jlora.Axes("in out out", Gain())
    with pytest.raises(
        ValueError, match=r"heads/bias: .* wants a float for each output, shape \(2, 3\), got shape \(6,\)"
    ):
        jlora.adapterize(params, {"heads/kernel": heads})


ODD_USES = {
    "scaled": lambda p, x: x @ (0.5 * p["kernel"]) + p["bias"],
    "added and scaled": lambda p, x: 0.5 * (x @ p["kernel"] + p["bias"]),
    "twice": lambda p, x: x @ p["kernel"] + (x + 1) @ p["kernel"] + p["bias"],
    "no bias": lambda p, x: x @ p["kernel"],
    "the bias elsewhere": lambda p, x: x @ p["kernel"] + p["bias"] + jnp.sin(p["bias"]),
    "transposed": lambda p, x: (x @ p["kernel"] + p["bias"]) @ p["kernel"].T,
    "in parts": lambda p, x: x[:, :4] @ p["kernel"][:4] + x[:, 4:] @ p["kernel"][4:] + p["bias"],
}


@pytest.mark.once
@pytest.mark.parametrize("method", [Gain(), jlora.Hadamard(), jlora.Hadamard("input")], ids=str)
def test_however_the_function_uses_kernel_and_bias_it_is_lifted_to_what_it_is_on_merged_params(method):
    params, x = {"kernel": weight(0, 8, 6), "bias": normal(1, 6)}, normal(2, 3, 8)
    adapted = perturbed(adapt(params, {"kernel": method}))
    merged = jlora.merge(adapted)
    close(
        *jit(
            lambda a: ([jlora.lift(fn)(a, x) for fn in ODD_USES.values()], [fn(merged, x) for fn in ODD_USES.values()])
        )(adapted)
    )


@pytest.mark.once
def test_two_kernels_that_would_change_one_bias_are_refused():
    params = {"w_in": weight(0, 8, 6), "w_state": weight(1, 8, 6), "bias": normal(1, 6)}
    with pytest.raises(ValueError, match=r"bias: Gain\(\) of w_state and Gain\(\) of w_in would both change it"):
        jlora.adapterize(params, {"w_.*": Gain()})
    with pytest.raises(ValueError, match=r"bias: .* wants a float for each output, shape \(6,\), got 1.0"):
        jlora.adapterize({"w": params["w_in"], "bias": 1.0}, {"w": Gain()})


@pytest.mark.once
def test_dropout_around_a_gain_drops_and_merges_with_its_bias():
    params, x = {"kernel": weight(0, 8, 6), "bias": normal(1, 6)}, normal(2, 3, 8)
    adapted = perturbed(adapt(params, {"kernel": jlora.Dropout(jlora.IA3(), 0.5)}))
    fn = lambda p, x: x @ p["kernel"] + p["bias"]
    wanted = {name: leaf * adapted.params["kernel"]["l"] for name, leaf in params.items()}
    close(jlora.merge(adapted), wanted)
    close(jlora.lift(fn)(adapted, x), fn(wanted, x))
    keyed = lambda n: jlora.lift(fn)(adapted.replace(context={"dropout": jax.random.key(n)}), x)
    assert not jnp.allclose(keyed(0), keyed(1))
    close(jnp.mean(jax.vmap(keyed)(jnp.arange(4000)), axis=0), jlora.lift(fn)(adapted, x), 0.1)


@pytest.mark.once
def test_dropout_that_could_not_act_is_refused():
    with pytest.raises(TypeError, match=r"DoRA forms the weight of Dropout.* put it outside: Dropout\(DoRA"):
        jlora.DoRA(jlora.Dropout(jlora.HiRA(2), 0.5))
    adapted = adapt({"w": weight(0, 8, 8)}, {"w": jlora.MoRA(1, dropout=0.5)})
    keyed = adapted.replace(context={"dropout": jax.random.key(0)})
    with pytest.raises(
        ValueError, match=r"w: MoRA.* has dropout, which can't act where its weight is formed or transposed"
    ):
        jlora.lift(lambda p, x: x @ p["w"].T)(keyed, normal(1, 3, 8))


@pytest.mark.once
@pytest.mark.parametrize("side", ["parallel", "output"])
def test_a_network_acts_on_every_position_of_a_convolution(side):
    def fn(params, x):
        return lax.conv_general_dilated(x, params["kernel"], (1, 2), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW"))

    params, x = {"kernel": weight(0, 3, 2, 4, 6)}, normal(1, 2, 4, 5, 7)
    adapted = perturbed(adapt(params, {"kernel": Network(2, side)}, sites=jlora.sites(fn, params, x)))
    d, u = adapted.params["kernel"].values()
    numbers = {"dimension_numbers": ("NCHW", "HWIO", "NCHW")}
    y = fn(params, x)
    if side == "parallel":  # the network's first matrix is a convolution's kernel too
        kernel = adapted.plan.sites[0]
        thin = lax.conv_general_dilated(x, d.reshape(*kernel.shape[:3], 2), (1, 2), "SAME", **numbers)
    else:
        thin = jnp.einsum("nohw,or->nrhw", y, d)
    close(jlora.lift(fn)(adapted, x), y + jnp.einsum("nrhw,ro->nohw", jnp.tanh(thin), u))


@pytest.mark.once
def test_a_use_for_which_there_is_no_weight_is_refused_with_leaf_and_line():
    params, x = {"w": weight(0, 8, 8)}, normal(1, 3, 8)
    uses = {
        "dot_general": lambda p, x: x @ p["w"].T,
        "gather": lambda p, x: p["w"][jnp.array([1, 2])],
        "sin": lambda p, x: x @ jnp.sin(p["w"]),
    }
    for primitive, fn in uses.items():
        with pytest.raises(ValueError, match=rf"w: Network.* acts on the input .* `{primitive}` at .*test_acting.py"):
            jlora.lift(fn)(adapt(params, {"w": Network()}), x)
    with pytest.raises(TypeError, match="DoRA needs an inner method that is a weight and nothing else; Network"):
        jlora.DoRA(Network())
    adapted, tx = adapt(params, {"w": Network()}), optax.adam(1e-3)
    with pytest.raises(ValueError, match=r"w: Network.* can't be restarted"):
        jlora.restart(adapted, tx.init(adapted.params), tx, jax.random.key(0))


@pytest.mark.once
def test_a_linear_method_that_acts_is_transposed_by_what_it_does():
    fn = lambda p, x: (2 * (x @ p["w"])) @ p["w"].T
    x = normal(1, 4, 8)
    adapted = perturbed(adapt({"w": weight(0, 8, 6)}, {"w": Gain()}))
    close(*jit(lambda a: (jlora.lift(fn)(a, x), fn(by_hand(a), x)))(adapted))


@pytest.mark.once
def test_a_number_on_the_weight_multiplies_what_a_method_makes_of_the_input():
    x = normal(1, 4, 8)
    adapted = perturbed(adapt({"w": weight(0, 8, 8)}, {"w": Network()}))
    halved = jlora.lift(lambda p, x: x @ (0.5 * p["w"]))(adapted, x)
    close(halved, 0.5 * jlora.lift(lambda p, x: x @ p["w"])(adapted, x))


class OnlyWeight(LoRA):
    """LoRA by its formed weight alone."""

    def weight(self, view):
        return LoRA.weight(self, view)


def temporary_bytes(method, unroll):
    """Temporary memory of a gradient through six layers of width 128."""

    def fn(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"], unroll=unroll)[0]

    params, x = {"w": weight(0, 6, 128, 128)}, normal(1, 8, 128)
    adapted = adapt(params, {"w": jlora.Axes("batch in out", method)})
    loss = lambda p, base, x: jnp.sum(jlora.lift(fn)(adapted.replace(params=p, base=base), x) ** 2)
    compiled = jit(jax.grad(loss)).lower(adapted.params, adapted.base, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.once
@pytest.mark.parametrize("unroll", [1, 6])
def test_no_formed_weight_is_kept_for_the_backward_pass(unroll):
    one_matrix = 128 * 128 * 4
    formed, factored = temporary_bytes(OnlyWeight(4), unroll), temporary_bytes(LoRA(4), unroll)
    assert formed - factored < 4 * one_matrix, f"{(formed - factored) / one_matrix:.1f} matrices more"


@pytest.mark.once
def test_a_small_update_of_a_16_bit_weight_reaches_the_output():
    w = jnp.ones((64, 64), jnp.bfloat16)
    x = jnp.asarray(normal(1, 16, 64), jnp.bfloat16)
    fn = lambda p, x: jnp.matmul(x, p["w"], preferred_element_type=jnp.float32)
    for method in (OnlyWeight(4, alpha=4), Gain()):
        adapted = adapt({"w": w}, {"w": method})
        small = jax.tree.map(lambda leaf: leaf * 1.0, adapted.params)
        if "g" in small["w"]:
            small["w"]["g"] = small["w"]["g"] + 1e-4
            wanted = jnp.float32(1e-4) * fn({"w": w}, x)
        else:
            small["w"]["b"] = small["w"]["b"] + 1e-4
            wanted = x.astype(jnp.float32) @ (small["w"]["a"] @ small["w"]["b"])
        arrived = jlora.lift(fn)(adapted.replace(params=small), x) - fn({"w": w}, x)
        assert jnp.sum(arrived * wanted) / jnp.sum(wanted * wanted) == pytest.approx(1, abs=0.02)


@dataclass(frozen=True)
class Turned(jlora.Method):
    """The inputs turned a little: `r @ w` with `r` close to the identity; trains `1` values."""

    @property
    def axes(self):
        return {"angle": ()}

    def start(self, key, w, site):
        return jlora.Start({"angle": jnp.float32(0)})

    def apply(self, x, product, view):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        angle = view.params["angle"]
        return product(jnp.concatenate([first - angle * second, second + angle * first], axis=-1))


@pytest.mark.once
def test_a_small_change_of_the_input_of_a_16_bit_product_arrives():
    fn = lambda p, x: jnp.matmul(x, p["w"], preferred_element_type=jnp.float32)
    w, x = (jnp.asarray(normal(n, 64, 64), jnp.bfloat16) for n in range(2))
    adapted = adapt({"w": w}, {"w": Turned()}).replace(params={"w": {"angle": jnp.float32(1e-4)}})
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    wanted = 1e-4 * jnp.concatenate([-second, first], axis=-1) @ w.astype(jnp.float32)
    arrived = jlora.lift(fn)(adapted, x) - fn({"w": w}, x)
    assert jnp.sum(arrived * wanted) / jnp.sum(wanted * wanted) == pytest.approx(1, abs=0.02)


@pytest.mark.once
def test_gradients_through_a_16_bit_formed_weight_are_those_of_the_merged_one():
    w, x = jnp.asarray(weight(0, 32, 32), jnp.bfloat16), jnp.asarray(normal(1, 16, 32), jnp.bfloat16)
    adapted = perturbed(adapt({"w": w}, {"w": OnlyWeight(4)}), size=1.0)
    cotangent = normal(3, 16, 32)  # a linear loss: rounding of the output is not in its gradient
    loss = lambda w, x, p: jnp.sum(cotangent * (x @ w(p)))
    lifted = lambda x, p: jnp.sum(cotangent * jlora.lift(lambda p, x: x @ p["w"])(adapted.replace(params=p), x))
    whole = lambda p: by_hand(adapted.replace(base={"w": w.astype(jnp.float32)}, params=p))["w"]
    got = jit(jax.grad(lifted, argnums=(0, 1)))(x, adapted.params)
    wanted = jit(jax.grad(lambda x, p: loss(whole, x, p), argnums=(0, 1)))(x.astype(jnp.float32), adapted.params)
    close(got, wanted, 0.05)


@pytest.mark.once
def test_explain_counts_what_a_method_that_acts_multiplies():
    adapted = adapt({"w": weight(0, 24, 40)}, {"w": Network(3)})
    assert f"{3 * (24 + 40)} multiply-adds more" in jlora.explain(adapted)
