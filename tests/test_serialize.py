"""Methods as tables, and what is said of a table that is wrong."""

import json
import re
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.core.protocol.gated import Gated


@dataclass(frozen=True)
class HalvedHere(jlora.LoRA):
    gain: float = 0.5

    @property
    def scale(self):
        return super().scale * self.gain


@dataclass(frozen=True)
class VeRA(jlora.VeRA):
    """Has the name of one of jlora's own."""


@dataclass(frozen=True)
class Several(jlora.LoRA):
    """Has methods in a tuple, and one value that it computes."""

    parts: tuple = (jlora.LoRA(rank=2), jlora.DoRA(jlora.LoRA(rank=3)))
    twice: int = field(init=False, default=0)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "twice", 2 * self.rank)


@dataclass(frozen=True)
class Typed(jlora.LoRA):
    kind: object = None


class Quiet(jlora.Full):
    pass


def test_a_table_gives_the_method_and_what_it_leaves_out_is_the_default():
    assert jlora.method_from_dict({"method": "LoRA", "rank": 4}) == jlora.LoRA(rank=4)
    assert jlora.method_from_dict({"method": "Full"}) == jlora.Full()


def test_inner_methods_are_nested_tables():
    method = jlora.DoRA(jlora.LoRA(rank=4, scaling="rslora"))
    table = json.loads(json.dumps(jlora.method_to_dict(method)))
    assert table["method"] == "DoRA" and table["inner"]["method"] == "LoRA" and table["inner"]["rank"] == 4
    assert jlora.method_from_dict(table) == method


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rank": 4}, "a method table needs method = one of ["),
        ({"method": "Lora"}, "'LoRA'"),
        ({"method": ["LoRA"]}, "a method table needs method = one of ["),
        ("LoRA", "a method table needs method = one of ["),
        ({"method": "LoRA", "rnk": 4, "alpa": 1}, "LoRA has no hyperparameter alpa, rnk; it has ['alpha', 'dropout',"),
        ({"method": "LoRA", "rank": 0}, "LoRA's rank must be a positive integer, got 0"),
        ({"method": "LoRA", "rank": "8"}, "LoRA's rank must be a positive integer, got '8'"),
        ({"method": "LoRA", "alpha": "8"}, "LoRA's alpha must be positive and finite, got '8'"),
        (
            {"method": "DoRA", "inner": 3},
            "DoRA: DoRA goes around a method that adapts a matrix, such as LoRA(8); got 3",
        ),
        ({"method": "DoRA", "inner": {"method": "LoRA", "rank": -1}}, "LoRA's rank must be a positive integer, got -1"),
    ],
)
def test_a_wrong_table_is_refused_with_what_would_do(table, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jlora.method_from_dict(table)


def test_a_class_of_ones_own_is_stored_by_its_import_path_and_comes_back_as_itself(tmp_path):
    method = jlora.DoRA(HalvedHere(2, gain=0.25))
    table = json.loads(json.dumps(jlora.method_to_dict(method)))
    assert table["method"] == "DoRA" and table["inner"]["method"] == f"{__name__}.HalvedHere"
    assert jlora.method_from_dict(table) == method and type(jlora.method_from_dict(table).inner) is HalvedHere
    params = {"w": jnp.ones((4, 3))}
    jlora.save(tmp_path / "own", jlora.adapterize(params, {"w": method}))
    assert jlora.load(tmp_path / "own", params).plan.sites[0].method == method


def test_a_class_of_the_same_name_takes_over_no_table():
    assert type(jlora.method_from_dict({"method": "VeRA", "rank": 3})) is jlora.VeRA
    assert type(jlora.method_from_dict(jlora.method_to_dict(jlora.VeRA(3)))) is jlora.VeRA
    assert type(jlora.method_from_dict(jlora.method_to_dict(VeRA(3)))) is VeRA


def test_classes_of_the_same_name_share_no_constants():
    base = {"u": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}
    adapted = jlora.adapterize(base, {"u": jlora.VeRA(3), "w": VeRA(2)})
    drawers = adapted.frozen["~shared"]
    assert sorted(drawer["a"].shape for drawer in drawers.values()) == [(4, 2), (4, 3)]
    merged = jlora.merge(adapted.replace(params=jax.tree.map(lambda x: x + 1, adapted.params)))
    assert not np.array_equal(merged["u"], merged["w"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Gated", "a method table needs method = one of ['ALoRA', 'AdaLoRA', "),
        ("Around", "a method table needs method = one of ["),
        ("jlora.core.protocol.gated.Gated", "a method table needs method = one of ["),
        ("HalvedHere", f"a class of your own is named by its import path, {__name__}.HalvedHere"),
        ("json.decoder.JSONDecoder", "no class 'json.decoder.JSONDecoder' is imported"),
        (
            "elsewhere.Mine",
            "no class 'elsewhere.Mine' is imported: import elsewhere, where Mine is, before this is read",
        ),
    ],
)
def test_what_is_no_method_or_is_not_imported_is_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jlora.method_from_dict({"method": name})
    assert Gated.__subclasses__()


def test_no_claim_of_a_parent_is_told_of_a_derived_class():
    adapted = jlora.adapterize({"w": jnp.ones((4, 3)), "v": jnp.ones(3)}, {"w": HalvedHere(2), "v": Quiet()})
    text = jlora.explain(adapted)
    assert "Has no docstring; derived from LoRA." in text and "derived from Full." in text
    assert "arXiv" not in text and "s * a @ b" not in text


def test_methods_in_a_tuple_come_back_and_what_a_class_computes_is_not_stored(tmp_path):
    params = {"w": jnp.ones((4, 4))}
    adapted = jlora.adapterize(params, {"w": Several(rank=3)})
    jlora.save(tmp_path / "a", adapted)
    method = jlora.load(tmp_path / "a", params).plan.sites[0].method
    assert method == Several(rank=3) and method.twice == 6
    assert "twice" not in jlora.method_to_dict(method)


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.tanh, np.float32(2), frozenset({1}), (1, (b"x",))], ids=str)
def test_a_hyperparameter_that_no_file_can_hold_is_refused_by_name(kind, tmp_path):
    adapted = jlora.adapterize({"w": jnp.ones((4, 4))}, {"w": Typed(rank=2, kind=kind)})
    with pytest.raises(ValueError, match="Typed's kind is .*, which no file can hold"):
        jlora.save(tmp_path / "a", adapted)
    assert not (tmp_path / "a").exists()
