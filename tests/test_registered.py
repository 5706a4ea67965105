"""Flax's serialization writes adapters without their base, and `jax.export` names them by their plan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import discovery
from flax import serialization
from flax.training.train_state import TrainState
from jax import export

import jlora
from jlora.core.protocol.code import Code
from jlora.disk import registered
from jlora.disk.serialize import imported

pytestmark = pytest.mark.once

W, X = jax.random.normal(jax.random.key(0), (64, 8)), jnp.ones((2, 64))
PARAMS = {"w": W}
CODED = jlora.quantize(PARAMS, {"w": jlora.NF4()})


def adapted_on(params, rank=2, seed=0):
    return jlora.adapterize(params, {"w": jlora.LoRA(rank, init="random")}, jax.random.key(seed))


def product(params, x):
    return x @ params["w"]


class AdaptedState(TrainState):
    adapted: jlora.Adapted


def state_of(adapted):
    return AdaptedState.create(apply_fn=None, params=adapted.params, tx=optax.sgd(0.1), adapted=adapted)


@pytest.mark.parametrize("params", [PARAMS, CODED], ids=["plain", "coded"])
def test_flax_writes_the_adapters_and_not_the_base(params):
    written = serialization.to_bytes(state_of(adapted_on(params)))
    assert len(written) < W.nbytes + 1000, "64 x 8 numbers of the base beside two times 144 of the adapter"
    names = serialization.msgpack_restore(written)["adapted"]
    assert sorted(names) == ["base", "frozen", "params"] and names["base"] == jlora.fingerprint(params)
    given = adapted_on(params, seed=1)
    found = serialization.from_bytes(state_of(given), written)
    jax.tree.map(np.testing.assert_array_equal, found.adapted, adapted_on(params))
    assert found.adapted.base is given.base


def test_adapters_of_another_base_shape_or_kind_are_refused():
    adapted = adapted_on(PARAMS)
    state = serialization.to_state_dict(adapted)
    with pytest.raises(ValueError, match="made for another base: fingerprint .*, but the base of this Adapted has"):
        serialization.from_state_dict(adapted_on({"w": W + 1}), state)
    with pytest.raises(
        ValueError, match=r"params/w/a has the shape \(64, 2\) and dtype float32 in the state, and \(64, 4\)"
    ):
        serialization.from_state_dict(adapted_on(PARAMS, rank=4), state)
    with pytest.raises(ValueError, match=r"the state of a jlora.Adapted has params and frozen, got \['w'\]"):
        serialization.from_state_dict(adapted, {"w": 1})
    shapes = jax.eval_shape(lambda: adapted)
    assert "base" not in serialization.to_state_dict(shapes), "shapes have no fingerprint"
    assert serialization.from_state_dict(shapes, state).params["w"]["a"] is state["params"]["w"]["a"]


def test_flax_writes_coded_leaves_with_the_name_of_their_code():
    written = serialization.to_bytes(CODED)
    empty = jax.tree.map(jnp.zeros_like, CODED)
    jax.tree.map(np.testing.assert_array_equal, serialization.from_bytes(empty, written), CODED)
    with pytest.raises(
        ValueError, match=r"kept as NF4\(block=32.*here, but was written as NF4\(block=64, double=False\)"
    ):
        serialization.from_bytes(jlora.quantize(PARAMS, {"w": jlora.NF4(32)}), written)


def test_flax_writes_what_leaves_have_in_common():
    pair = {"up": PARAMS["w"], "out": PARAMS["w"] * 2}
    joint = jlora.quantize(
        pair, {"up|out": jlora.JointLowRank(2)}, jlora.sites(lambda p, x: (x @ p["up"], x @ p["out"]), pair, X)
    )
    empty = jax.tree.map(jnp.zeros_like, joint)
    found = serialization.from_bytes(empty, serialization.to_bytes(joint))
    assert joint["up"].common and all(np.any(np.asarray(array)) for array in found["up"].common.values())
    jax.tree.map(np.testing.assert_array_equal, found, joint)


@pytest.mark.parametrize("params", [PARAMS, CODED], ids=["plain", "coded"])
def test_an_exported_function_takes_an_adapted(params):
    adapted, lifted = adapted_on(params), jax.jit(jlora.lift(product))
    exported = export.export(lifted)(adapted, X)
    np.testing.assert_array_equal(exported.call(adapted_on(params, seed=1), X), lifted(adapted_on(params, seed=1), X))
    for node in (adapted, CODED["w"]):
        kind = type(node)
        with pytest.raises(ValueError, match=f"Duplicate serialization registration for type.*jlora.{kind.__name__}"):
            export.register_pytree_node_serialization(
                kind, serialized_name="again", serialize_auxdata=bytes, deserialize_auxdata=bytes
            )


def test_plans_of_all_methods_and_forms_of_all_codes_come_back_from_bytes():
    (site,) = adapted_on(PARAMS).plan.sites
    sites = [dataclasses.replace(site, method=case, beside=("bias",)) for case in discovery.cases()]
    plan = jlora.Adapted({}, {}, {}, {}, type(adapted_on(PARAMS).plan)(tuple(sites)))
    static = jax.tree.structure(plan).node_data()[1]
    assert registered.plan_from_bytes(registered.plan_to_bytes(static)) == static
    codes = [case for cls in imported(Code).values() for case in cls.CASES]
    assert len(codes) > 8
    for code in codes:
        leaf = jlora.Stored({}, code, (4, 64, 8), jnp.dtype("bfloat16"), (1,), (2,), (0,))
        static = jax.tree.structure(leaf).node_data()[1]
        assert registered.form_from_bytes(registered.form_to_bytes(static)) == static
    with pytest.raises(ValueError, match="no code 'else.Where' is imported: import else before this is read"):
        registered.form_from_bytes(b'[{"code": "else.Where"}, [2], "float32", [0], [], []]')


def test_an_adapted_is_no_tree_of_params_and_says_what_is():
    adapted = adapted_on(PARAMS)
    for call in (
        lambda: TrainState.create(apply_fn=None, params=adapted, tx=optax.sgd(0.1)),
        lambda: product(adapted, X),
        lambda: list(adapted),
    ):
        with pytest.raises(TypeError, match=r"has no keys.*jlora.lift\(fn\).*TrainState.* is adapted.params"):
            call()
