"""The store and its pages: what is taken in, what is refused, and who gives way."""

import json

import jax
import numpy as np
import pytest
from models_data import GOLDEN
from serving.served import adapters, loaded, store, trained

import jlora
from jlora import models
from jlora.serving import AdapterStore, UnknownAdapter
from jlora.serving.pages import Pages


def test_adapters_come_from_memory_and_folders_and_go(tmp_path):
    held = store()
    jlora.save(tmp_path / "saved", adapters()["one"])
    held.add("memory", adapters()["one"])
    held.add("folder", tmp_path / "saved")
    assert held.names == ("memory", "folder") and len(held) == 2 and "folder" in held
    pairs = [held.get(name).arrays for name in held.names]
    jax.tree.map(np.testing.assert_array_equal, *pairs)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(pairs))
    held.remove("memory")
    with pytest.raises(UnknownAdapter, match="no adapter 'memory' in the store, which has 1"):
        held.remove("memory")
    assert held.names == ("folder",)


def test_adapters_are_kept_at_their_own_rank_and_filled_up_to_the_rooms():
    held = store()
    held.add("few", adapters()["few"])
    found = held.get("few")
    assert {keys[2] for keys in found.arrays} == {"q_proj", "v_proj"}
    room = {site.keys: fields for site, fields in zip(held.room.sites, held.room.unpacked(held.room.packed(found)))}
    for keys, fields in room.items():
        own = found.arrays.get(keys, {"a": np.zeros((1, 1, 0)), "b": np.zeros((1, 0, 1))})
        rank = own["a"].shape[-1]
        assert fields["a"].shape[-1] == 8 and (fields["gain"] == 1).all()
        assert (fields["a"][..., :rank] == own["a"]).all() and (fields["b"][:, :rank] == own["b"]).all()
        assert not fields["a"][..., rank:].any() and not fields["b"][:, rank:].any()


def _tree(seed):
    return jax.tree.map(lambda leaf: leaf + seed, loaded()[1])


def _infinite():
    adapted = adapters()["one"]
    return adapted.replace(params=jax.tree.map(lambda leaf: leaf.at[0].set(np.inf), adapted.params))


REFUSED = {
    "taken": (lambda: adapters()["two"], {}, "the store has an adapter 'taken' already"),
    "rank": (lambda: adapters()["two"], {"rank": 4}, "'rank' has rank 8, but the store room for rank=4"),
    "gain": (lambda: adapters()["dora"], {"gains": False}, "'gain' has a gain, and the store no room for gains"),
    "leaf": (lambda: adapters()["one"], {"leaves": ".*/q_proj/kernel"}, "the store has no room for it"),
    "method": (
        lambda: trained(jlora.SHiRA(), 1),
        {},
        "for 'method' there is no room for SHiRA(mask=random, entries=110)",
    ),
    "base": (lambda: trained(jlora.LoRA(2), 1, params=_tree(1)), {}, "different bases"),
    "infinite": (_infinite, {}, "'infinite' holds values that are not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_row_can_not_hold_is_refused(name):
    make, options, said = REFUSED[name]
    held = store(**options)
    if name == "taken":
        held.add(name, adapters()["one"])
    before = held.names
    with pytest.raises(ValueError) as refused:
        held.add(name, make())
    assert said in str(refused.value) and held.names == before


def test_a_store_has_no_room_at_experts():
    model, params = models.load(GOLDEN / "mixtral")
    room = AdapterStore(model, params).room
    assert {site.keys[-2] for site in room.sites} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate"}


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"rank": 0}])
def test_numbers_are_positive(wrong):
    with pytest.raises(ValueError, match="must be a positive whole number, got 0"):
        store(**wrong)


def test_the_least_recently_used_gives_way():
    held = store()
    for name in ("one", "two", "few"):
        held.add(name, adapters()["one"])
    one, two, few = (held.get(name) for name in held.names)
    pages = Pages(held.room, 2)
    pages.get(one), pages.get(two), pages.get(one)
    assert len(pages) == 2 and pages.loads == 2
    pages.get(few)
    assert two not in pages and one in pages and few in pages and pages.loads == 3
    # What is wanted soon does not give way to what is wanted later, and no more is fetched than there is room for.
    pages.prefetch([one, one, two, few])
    assert one in pages and two in pages and few not in pages and pages.loads == 4
    pages.prefetch([])
    assert len(pages) == 2
    np.testing.assert_array_equal(pages.get(two)[""], held.room.packed(two)[""])
    assert pages.get(None) is pages.get(None) and pages.loads == 4


def test_names_of_peft_are_the_models(tmp_path):
    model, _ = loaded()
    held = store()
    jlora.save_peft(tmp_path, adapters()["one"], jlora.models.peft_names(model))
    held.add("peft", tmp_path)
    held.add("own", adapters()["one"])
    ours, theirs = (held.get(name).arrays for name in ("own", "peft"))
    assert set(ours) == set(theirs)
    for keys, fields in ours.items():
        np.testing.assert_allclose(fields["a"] @ fields["b"], theirs[keys]["a"] @ theirs[keys]["b"], atol=1e-6)


@pytest.mark.parametrize("alpha", [1e38, -1e38, 1e25])
def test_a_scale_with_which_norms_would_overflow_is_refused_by_name(tmp_path, alpha):
    """Such numbers are finite, and so would be the answers: of a norm that divides by infinity."""
    model, _ = loaded()
    jlora.save_peft(tmp_path, adapters()["one"], jlora.models.peft_names(model))
    (tmp_path / "jlora_manifest.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
    held = store()
    with pytest.raises(ValueError, match=r"kernel: 'loud' changes a product by up to .* norms overflow: is its scale"):
        held.add("loud", tmp_path)
    assert not held.names


def test_values_that_overflow_in_the_dtype_of_the_rows_are_refused():
    adapted = adapters()["one"]
    loud = adapted.replace(params=jax.tree.map(lambda leaf: leaf * 1e6, adapted.params))
    store().add("wide", loud)
    with pytest.raises(ValueError, match="'narrow' holds values that are not finite as float16"):
        store(dtype="float16").add("narrow", loud)
