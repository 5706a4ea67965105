"""A form of update is added in one file: `reflection.py` passes the contract without its weight ever being formed."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from contract import checks, discovery
from contract.problems import adapt, by_hand, close, jit, normal, perturbed, weight
from contract.reflection import Reflected, Reflection
from jlora import LoRA
from jlora.core.products.update import Update

CHECKS = discovery.checks(checks)
# Plain `pytest` tries those in which a form is used in the most ways.
FIRST = {"check_agree", "check_lift", "check_dtype", "check_mesh"}
EACH = [pytest.param(check, marks=() if check in FIRST else pytest.mark.long) for check in CHECKS]


@pytest.mark.parametrize("check", EACH)
def test_a_method_of_a_new_form_keeps_the_contract(check):
    CHECKS[check](Reflected())


def formed_in_a_gradient(method):
    """What the gradient of a product with a `[24, 40]` weight computes of that shape."""
    adapted = adapt({"w": weight(0, 24, 40)}, {"w": method})
    loss = lambda p, x: jnp.sum(jnp.sin(jlora.lift(lambda p, x: x @ p["w"])(adapted.replace(params=p), x)))
    program = str(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(adapted.params, normal(1, 3, 24)))
    assert "dot_general" in program
    return re.findall(r"f32\[24,40\](?: \w+:\S+)* = .*", program)


def test_its_product_and_gradients_form_no_array_of_the_weights_shape():
    class Formed(Reflected):
        def weight(self, view):
            return Reflected.weight(self, view)

    assert formed_in_a_gradient(Reflected()) == []
    assert formed_in_a_gradient(Formed())


def test_its_uses_by_experts_by_a_number_and_by_columns_equal_the_formed_weight():
    def fn(params, x):
        x = lax.ragged_dot(x, params["experts"], jnp.array([3, 5, 8], jnp.int32))
        x = x @ (0.5 * params["halved"])
        return x + params["table"][:, jnp.array([1, 0, 6] * 6)[:16]].T

    params = {"experts": weight(0, 3, 8, 12), "halved": weight(1, 12, 8), "table": weight(2, 8, 7)}
    x = normal(3, 16, 8)
    sites = jlora.sites(fn, params, x)
    for method in (Reflected(), jlora.DoRA(Reflected())):
        # By its use alone the table's looked-up axis would be its rows.
        adapted = perturbed(adapt(params, {"table": jlora.Axes("in out", method), ".*": method}, sites=sites))
        lifted = lambda a: jlora.lift(fn, strict=True)(a, x)
        close(*jit(lambda a: (lifted(a), fn(by_hand(a), x)))(adapted))


def test_products_of_one_activation_with_weights_of_several_forms_are_each_by_its_own():
    fn = lambda params, x: (x @ params["q"], x @ params["k"], x @ params["v"])
    params = {name: weight(n, 8, 8) for n, name in enumerate("qkv")}
    adapted = perturbed(adapt(params, {"[qv]": LoRA(2), "k": Reflected()}))
    x = normal(5, 4, 8)
    close(*jit(lambda a: (jlora.lift(fn, strict=True)(a, x), fn(by_hand(a), x)))(adapted))


def test_explain_asks_the_form_what_it_costs():
    adapted = adapt({"w": weight(0, 24, 40)}, {"w": Reflected()})
    assert "48 multiply-adds more" in jlora.explain(adapted)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Half(Update):
    """`w * half`: a form that knows the dense product alone."""

    half: jax.Array

    def times(self, number):
        return self

    def cost(self, rows, columns, lookup):
        return columns

    def dense(self, x, w, key, options):
        return (x @ w * self.half.astype(x.dtype)).astype(options.out_dtype)


@dataclass(frozen=True)
class Halved(jlora.Method):
    """Trains `1` values."""

    form = Half

    @property
    def axes(self):
        return {"half": ()}

    def start(self, key, w, site):
        return jlora.Start({"half": jnp.float32(0.5)})

    def weight(self, view):
        return view.w * view.params["half"]

    def update(self, view):
        return Half(view.params["half"])


def test_for_a_use_that_a_form_does_not_own_the_weight_is_formed_or_strict_refuses():
    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Unformed(Half):
        refuses_forming: ClassVar[bool] = True

    class Refusing(Halved):
        form = Unformed

        def update(self, view):
            return Unformed(view.params["half"])

    fn = lambda params, x: (x @ params["w"]) @ params["w"].T
    x = normal(1, 3, 24)
    halved, refusing = (adapt({"w": weight(0, 24, 40)}, {"w": method}) for method in (Halved(), Refusing()))
    close(jlora.lift(fn, strict=True)(halved, x), fn(by_hand(halved), x))
    close(jlora.lift(fn)(refusing, x), fn(by_hand(refusing), x))
    with pytest.raises(ValueError, match=r"strict: the effective weight of w, shape \(40, 24\).*dot_general"):
        jlora.lift(fn, strict=True)(refusing, x)


def test_a_form_without_norms_or_scale_lets_dora_form_the_weight():
    adapted = adapt({"w": weight(0, 24, 40)}, {"w": jlora.DoRA(Halved())})
    assert adapted.plan.sites[0].method.form is None
    x = normal(1, 3, 24)
    close(jlora.lift(lambda p, x: x @ p["w"])(adapted, x), x @ by_hand(adapted)["w"])


def test_a_class_has_the_form_of_what_it_says_last():
    class Weighs(Reflected):
        def weight(self, view):
            return 2 * Reflected.weight(self, view)

    class Factored(jlora.DoRA):
        def factors(self, view):
            return jlora.Factors(view.params["a"], view.params["b"])

    class Mixed:
        def weight(self, view):
            return view.w

    class Below(Weighs):
        pass

    class Beside(Mixed, LoRA):
        pass

    forms = {cls: cls.form for cls in (Reflected, Weighs, Below, Factored, LoRA, Beside, jlora.SHiRA, jlora.Full)}
    assert list(forms.values()) == [Reflection, None, None, jlora.Factors, jlora.Factors, None, jlora.Sparse, None]
    assert jlora.DoRA(LoRA(2)).form is jlora.Factors and jlora.DoRA(Weighs()).form is None
    assert Weighs().update(None) is None and Beside().update(None) is None


def test_a_method_that_gives_factors_alone_is_told_to_give_its_weight_too():
    class Thin(LoRA):
        weight = jlora.Method.weight

        def factors(self, view):
            return LoRA.factors(self, view)

    adapted = adapt({"w": weight(0, 8, 8)}, {"w": Thin(2)})
    with pytest.raises(
        NotImplementedError, match=r"Thin must give weight\(view\), .*, beside factors, sparse, update or apply"
    ):
        jlora.merge(adapted)


def test_an_update_without_its_form_is_refused_where_the_class_is_made():
    with pytest.raises(TypeError, match=r"Nameless must state both or neither: update\(view\), and form"):

        class Nameless(jlora.Method):
            def update(self, view):
                return None

    with pytest.raises(TypeError, match="Empty must state both or neither"):

        class Empty(jlora.Method):
            form = Reflection


def test_an_update_of_another_form_than_the_method_names_is_refused_with_the_leaf():
    class Mistaken(Reflected):
        form = Half

        def update(self, view):
            return Reflected.update(self, view)

    adapted = adapt({"w": weight(0, 8, 8)}, {"w": Mistaken()})
    with pytest.raises(TypeError, match=r"w: Mistaken\(\) has the form Half, but its update is of the form Reflection"):
        jlora.lift(lambda p, x: x @ p["w"])(adapted, normal(1, 3, 8))


def test_the_core_and_what_counts_costs_know_no_form_by_name():
    package = Path(jlora.__file__).parent
    files = [*package.glob("core/*/*.py"), *package.glob("analysis/*.py"), package / "methods" / "dora.py"]
    knowing = {f.stem for f in files if re.search(r"\b(Factors|Sparse)\b", f.read_text(encoding="utf-8"))}
    assert knowing == {"low_rank", "one_of", "routed", "slots", "sparse", "method", "gated", "kept", "scaled"}
