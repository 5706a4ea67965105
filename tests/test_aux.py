"""What a call tells methods (`adapted.on`), and what they say beside their products (`lift(fn, aux=True)`)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import adapt, close, jit, layers, normal, product, weight
from jax import lax

import jlora
from jlora import NF4, Axes, Method, Start


@dataclass(frozen=True)
class Routed(Method):
    """`y * (1 + (x @ g) * strength)`, which says its scores `x @ g`; trains `in` values."""

    mergeable: ClassVar[bool] = False
    context: ClassVar[frozenset[str]] = frozenset({"strength"})

    @property
    def axes(self):
        return {"g": ("in",)}

    def start(self, key, w, site):
        return Start({"g": jax.random.normal(key, w.shape[:1]) / 4})

    def check_context(self, context):
        shape = jnp.shape(context.get("strength", 0))
        if shape not in ((), (3,)):
            raise ValueError(f"strength is a number, or one for each of 3 rows, got shape {shape}")

    def apply(self, x, product, view):
        scores = x @ view.params["g"]
        strength = view.context["strength"]
        strength = strength.reshape(strength.shape + (1,) * (scores.ndim - strength.ndim))
        return product(x) * (1 + scores * strength)[..., None], {"scores": scores}


ROUTED = {"w_0": Axes("batch in out", Routed())}


def unrolled(params, x):
    for w in params["w_0"]:
        x = jnp.tanh(x @ w)
    return x


def by_hand(adapted, strength, x):
    scores = []
    for w, g in zip(adapted.base["w_0"], adapted.params["w_0"]["g"], strict=True):
        scores.append(x @ g)
        x = jnp.tanh((x @ w) * (1 + scores[-1] * strength.reshape(-1, 1))[..., None])
    return x, jnp.stack(scores)


def stacked():
    return adapt({"w_0": weight(0, 2, 8, 8)}, ROUTED), normal(1, 3, 5, 8)


def test_what_a_call_is_told_and_what_methods_say_go_through_scan_remat_unrolled_layers_and_vmap():
    adapted, x = stacked()
    strength = jnp.array([0.5, -1.0, 2.0])
    traces = []

    @jit
    def everything(adapted, x):
        traces.append(None)
        rows = jax.vmap(lambda s, x: jlora.lift(layers, aux=True)(adapted.on(strength=s), x))
        forms = [jlora.lift(fn, aux=True)(adapted, x) for fn in (layers, unrolled)]
        return *forms, rows(adapted.context["strength"], x), jlora.lift(layers)(adapted, x)

    for told in (strength, -strength):
        y, scores = by_hand(adapted, told, x)
        scanned, loose, rows, without = everything(adapted.on(strength=told), x)
        wanted = (y, {"w_0": {"scores": scores}})
        close(scanned, wanted)
        close(loose, wanted)
        close(without, y)
        close(rows, (y, {"w_0": {"scores": jnp.moveaxis(scores, 1, 0)}}))
    assert len(traces) == 1


def test_gradients_flow_through_what_is_said():
    adapted, x = stacked()
    adapted = adapted.on(strength=0.7)
    loss = lambda y, said: jnp.sum(y**2) + jnp.sum(jnp.sin(said["w_0"]["scores"]))

    def lifted(params):
        return loss(*jlora.lift(layers, aux=True)(adapted.replace(params=params), x))

    def wanted(params):
        y, scores = by_hand(adapted.replace(params=params), jnp.full(3, 0.7), x)
        return loss(y, {"w_0": {"scores": scores}})

    close(*jit(lambda p: (jax.grad(lifted)(p), jax.grad(wanted)(p)))(adapted.params))


def test_what_is_said_comes_out_of_the_product_with_a_coded_weight():
    x, params = normal(1, 3, 64), {"w_0": weight(0, 2, 64, 64)}
    spec = {"w_0": Axes("batch in out", NF4())}
    coded = jlora.quantize(params, spec)
    adapted = adapt(coded, ROUTED).on(strength=0.3)
    dense = adapted.replace(base=jlora.dequantize(coded))
    of_coded, of_dense = jit(lambda a, b: [jlora.lift(layers, aux=True)(each, x) for each in (a, b)])(adapted, dense)
    assert of_dense[1]["w_0"]["scores"].shape[0] == 2
    close(of_coded, of_dense)


def test_a_method_that_says_nothing_is_not_in_what_is_said_and_an_observed_one_says_nothing():
    params, x = {"w_0": weight(0, 8, 8)}, normal(1, 4, 8)
    plain = adapt(params, {"w_0": jlora.LoRA(2)})
    y, said = jlora.lift(product, aux=True)(plain, x)
    assert said == {}
    close(y, jlora.lift(product)(plain, x))
    routed = adapt(params, {"w_0": Routed()}).on(strength=1.0)
    close(jlora.observe(product, jlora.input_norms)(routed, x)[1]["w_0"], jnp.linalg.norm(x, axis=0))


def conditional(params, x):
    return lax.cond(x[0, 0] > 0, lambda x: x @ params["w_0"], lambda x: x, x)


def looped(params, x):
    return lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ params["w_0"], x)


def sharded(params, x):
    whole = jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((1,), ("d",))
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(whole, whole), out_specs=whole)(params["w_0"], x)


@pytest.mark.parametrize(("fn", "name"), [(conditional, "cond"), (looped, "while"), (sharded, "shard_map")])
def test_a_body_that_cant_return_what_is_said_is_refused_with_leaf_and_line(fn, name):
    adapted, x = adapt({"w_0": weight(0, 8, 8)}, {"w_0": Routed()}).on(strength=1.0), normal(1, 4, 8)
    with pytest.raises(ValueError, match=rf"aux: w_0 is used inside `{name}` at .*test_aux.py:\d+"):
        jlora.lift(fn, aux=True)(adapted, x)
    jax.eval_shape(jlora.lift(fn), adapted, x)


def test_a_matrix_that_several_products_use_is_refused_and_one_that_none_uses_has_nan():
    adapted, x = stacked()
    adapted = adapted.on(strength=1.0)
    with pytest.raises(ValueError, match="aux: w_0 has 2 matrices, used by 3 products"):
        jlora.lift(lambda p, x: layers(p, x) @ p["w_0"][0], aux=True)(adapted, x)
    _, said = jlora.lift(lambda p, x: x @ p["w_0"][1], aux=True)(adapted, x)
    assert np.isnan(said["w_0"]["scores"][0]).all()
    close(said["w_0"]["scores"][1], x @ adapted.params["w_0"]["g"][1])


def test_what_is_said_under_another_adapted_or_in_two_arguments_is_refused():
    adapted, x = adapt({"w_0": weight(0, 8, 8)}, {"w_0": Routed()}).on(strength=1.0), normal(1, 4, 8)
    outer = jlora.adapterize(adapted, {"base/w_0": jlora.LoRA(2)})
    with pytest.raises(ValueError, match="aux: w_0 belongs to an Adapted that is another one's base"):
        jlora.lift(product, aux=True)(outer, x)
    with pytest.raises(ValueError, match="aux: w_0 is adapted in several arguments"):
        jlora.lift(lambda a, b, x: product(a, x) + product(b, x), aux=True)(adapted, adapted, x)


def test_a_call_is_told_what_methods_know_in_shapes_that_they_take():
    adapted, _ = stacked()
    with pytest.raises(ValueError, match="no adapter here can be told 'slots'; they know dropout, strength"):
        adapted.on(slots=3)
    with pytest.raises(ValueError, match=r"w_0: strength is a number, or one for each of 3 rows, got shape \(2,\)"):
        adapted.on(strength=jnp.ones(2))
    with pytest.raises(ValueError, match="strength='much' is no array"):
        adapted.on(strength="much")
    assert adapted.on(strength=1.0).on(strength=None).context == {}
    told = adapted.on(strength=1.0).on(dropout=jax.random.PRNGKey(0))
    assert set(told.context) == {"strength", "dropout"} and jnp.issubdtype(
        told.context["dropout"].dtype, jax.dtypes.prng_key
    )


@dataclass(frozen=True)
class Wrong(Routed):
    """Says an array that has no name."""

    def apply(self, x, product, view):
        return product(x), x


def test_what_is_said_has_names():
    with pytest.raises(TypeError, match="w_0: Wrong.* what apply says is a dict of arrays"):
        jlora.lift(product)(adapt({"w_0": weight(0, 8, 8)}, {"w_0": Wrong()}), normal(1, 4, 8))
