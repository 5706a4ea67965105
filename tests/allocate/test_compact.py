"""Adapters of allocated ranks as plain LoRA: fewer columns, the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import discovery
from contract.problems import perturbed, weight
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.core.tree.starts import blank

pytestmark = pytest.mark.once

BASE = {"p": weight(0, 8, 6), "q": weight(1, 6, 8), "stack": weight(2, 3, 8, 8), "rest": weight(3, 8, 8)}
BASE |= {"gated": weight(4, 8, 8), "beams": weight(5, 8, 8)}
SPEC = {
    "p": jlora.AdaLoRA(4, 2, alpha=3),
    "q": jlora.DoRA(jlora.AdaLoRA(4, 2)),
    "stack": jlora.Axes("batch in out", jlora.ElaLoRA(2, max_rank=5)),
    "rest": jlora.LoRA(2),
    "gated": jlora.SoRA(4),
    "beams": jlora.BeamLoRA(3, 5, temperature=1.0),
}


def trained():
    """Adapters with some ranks at zero, all of `p`'s among them."""
    adapted = perturbed(jlora.adapterize(BASE, SPEC))
    params = dict(adapted.params)
    used = {"p": [0, 0, 0, 0], "q": [0, 1, 0, 1], "stack": [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]}
    for name, mask in used.items():
        params[name] = {**params[name], "e": params[name]["e"] * jnp.asarray(mask, jnp.float32)}
    params["gated"] = {**params["gated"], "g": params["gated"]["g"].at[1].set(0)}
    return adapted.replace(params=params)


def test_compact_adapters_have_the_ranks_that_are_left_and_the_same_weights():
    adapted = trained()
    small = jlora.compact(adapted)
    shapes = {name: fields["a"].shape for name, fields in small.params.items()}
    assert shapes == {"p": (8, 1), "q": (6, 2), "stack": (3, 8, 3), "rest": (8, 2), "gated": (8, 3), "beams": (8, 3)}
    methods = {site.path: site.method for site in small.plan.sites}
    assert {type(methods[name]) for name in ("p", "stack", "gated", "beams")} == {jlora.LoRA}
    assert type(methods["q"].inner) is jlora.LoRA
    assert methods["rest"] == SPEC["rest"] and small.params["rest"] is adapted.params["rest"]
    got, wanted = jlora.merge(small), jlora.merge(adapted)
    for name in BASE:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert not np.allclose(wanted["q"], BASE["q"], atol=1e-2)


def test_compact_under_jit_is_refused():
    with pytest.raises(TypeError, match="call it outside of jit"):
        jax.jit(jlora.compact)(trained())


class Tanh(jlora.AdaLoRA):
    def weight(self, view):
        return view.w + jnp.tanh(super().weight(view) - view.w)


class HalfChain(jlora.Chain):
    def factors(self, view):
        f = super().factors(view)
        return dataclasses.replace(f, b=f.b / 2)

    def weight(self, view):
        f = self.factors(view)
        return view.w + f.a @ f.b


class HalfAda(jlora.AdaLoRA):
    @property
    def scale(self):
        return super().scale / 2


@pytest.mark.parametrize("method", [Tanh(4, 2), HalfChain(jlora.LoRA(2), 3), HalfAda(4, 2)], ids=str)
def test_derived_classes_keep_their_weight(method):
    adapted = perturbed(jlora.adapterize({"p": BASE["p"]}, {"p": method}))
    small = jlora.compact(adapted)
    assert type(small.plan.sites[0].method) is (jlora.LoRA if type(method) is HalfAda else type(method))
    np.testing.assert_allclose(jlora.merge(small)["p"], jlora.merge(adapted)["p"], rtol=1e-5, atol=1e-6)


CLASSES = [cls for module in discovery.modules() for cls in discovery.methods_of(module)]
SAID = [cls.CASES[-1] for cls in CLASSES if cls.plain is not jlora.Method.plain]


@pytest.mark.parametrize("method", SAID, ids=lambda method: type(method).__name__)
def test_what_a_method_says_it_is_as_plain_lora_has_its_weight(method):
    base = {"stack": BASE["stack"][:2]}
    spec = {"stack": jlora.Axes("batch in out", method)}
    adapted = perturbed(jlora.adapterize(base, spec, prepared=blank(base, spec)))
    small = jlora.compact(adapted)
    assert type(small.plan.sites[0].method) is jlora.LoRA and not small.frozen
    np.testing.assert_allclose(jlora.merge(small)["stack"], jlora.merge(adapted)["stack"], rtol=1e-5, atol=1e-6)


def test_compact_factors_lie_as_their_base_also_where_an_inner_one_of_folded_axes_is_cut():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        leaf = jax.device_put(weight(5, 8, 2, 4), NamedSharding(mesh, P("fsdp", None, "tensor")))
        chain = jlora.Axes("in out out", jlora.Chain(jlora.LoRA(2)))
        fields = jlora.compact(jlora.adapterize({"heads": leaf}, {"heads": chain})).params["heads"]
    assert fields["a"].shape == (8, 2) and fields["a"].sharding.spec == P("fsdp", None)
    assert fields["b"].shape == (2, 8) and fields["b"].sharding.spec == P(None, None)
