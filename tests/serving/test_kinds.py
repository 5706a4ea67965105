"""Adapters that are no low-rank factors, beside such in one batch: each row gets what it gets alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving.served import LENGTH, ask, loaded, store, trained

import jlora
from jlora import models
from jlora.compose.kinds import Array, Kind, joined
from jlora.serving import Engine

VALUE, EMBEDDING = ".*/v_proj/kernel", "embed_tokens/embedding"


def together(spec, seed):
    """An adapter of several methods."""
    parts = [trained(method, seed + n, pattern) for n, (pattern, method) in enumerate(spec.items())]
    params, frozen = {}, {}
    for part in parts:
        _merge(params, part.params), _merge(frozen, part.frozen)
    sites = tuple(site for part in parts for site in part.plan.sites)
    return parts[0].replace(params=params, frozen=frozen, plan=parts[0].plan.__class__(sites))


def _merge(into, tree):
    for name, value in tree.items():
        if isinstance(value, dict):
            _merge(into.setdefault(name, {}), value)
        else:
            into[name] = value


@functools.cache
def adapters():
    """Adapters by name, most of them at one leaf."""
    experts = {name: trained(jlora.LoRA(rank), rank, VALUE) for name, rank in (("x", 2), ("y", 3))}
    mixture = jlora.meteora(loaded()[1], experts, k=1, key=jax.random.key(0))
    return {
        "lora": trained(jlora.LoRA(2), 1, VALUE),
        "shira": trained(jlora.SHiRA(entries=300), 2, VALUE),
        "fewer": trained(jlora.SHiRA("weight", rank=1, scale=0.5), 3, VALUE),
        "lengths": trained(jlora.DoRA(jlora.SHiRA(density=0.02)), 4, VALUE),
        "bottleneck": trained(jlora.Bottleneck(4, side="output"), 5, VALUE),
        "formed": trained(jlora.LoHa(2), 6, VALUE),
        "mixture": mixture,
        "prefix": trained(jlora.PrefixTuning(tokens=3), 7, ".*/(k|v)_proj/kernel"),
        "prompt": together({EMBEDDING: jlora.PromptTuning(tokens=5), VALUE: jlora.SHiRA(entries=50)}, 8),
    }


@pytest.fixture(scope="module")
def served():
    model, params = loaded()
    held = store(leaves=VALUE, rank=3, like=[each for name, each in adapters().items() if name != "lora"])
    for name, adapted in adapters().items():
        held.add(name, adapted)
    made = Engine(model, params, rows=3, length=LENGTH, chunk=8, adapters=held)
    made.start()
    yield made
    made.close(drain=False, timeout=60)


@functools.cache
def _forward():
    apply = jlora.lift(loaded()[0].apply)
    runs = {False: apply, True: jlora.prompted(apply)}
    return jax.jit(lambda params, tokens, virtual: runs[virtual]({"params": params}, tokens)[0], static_argnums=2)


def check_alone(prompt, name, heard):
    """Refuses tokens that are not the likeliest, or have other probabilities, by the adapter alone and without a cache."""
    adapted, tokens = adapters()[name], np.zeros((1, 32), np.int32)
    tokens[0, : len(prompt) + len(heard.ids)] = [*prompt, *heard.ids]
    logits = _forward()(adapted, tokens, name in ("prefix", "prompt"))
    logarithms = np.asarray(jax.nn.log_softmax(logits))
    for n, token in enumerate(heard.tokens, len(prompt)):
        assert logarithms[n - 1, token.id] >= logarithms[n - 1].max() - 1e-3, (name, n)
        np.testing.assert_allclose(token.logprob, logarithms[n - 1, token.id], atol=1e-4)


def test_rows_of_all_kinds_get_what_they_get_alone(served):
    """Nine adapters for three rows and two slots, prompts of one and two chunks; twice, so that rows change their kind."""
    for prompt in ([1, 410, 403], [1, *range(300, 312)]):
        heard = {name: ask(served, prompt, name, 8, logprobs=0) for name in adapters()}
        for name, each in heard.items():
            check_alone(prompt, name, each.wait())
    assert served.state().programs == 4
    assert len({tuple(ask(served, [1, 410], name, 8, logprobs=0).wait().tokens) for name in adapters()}) == 9


def test_what_runs_beside_a_row_changes_no_bit_of_it(served):
    exact = lambda heard: [(token.id, token.logprob, token.top) for token in heard.wait().tokens]
    names = ("lora", "shira", "formed", "prefix")
    single = {name: exact(ask(served, [1, 410], name, 8, logprobs=20)) for name in names}
    crowd = {name: ask(served, [1, 410], name, 8, logprobs=20) for name in names}
    assert {name: exact(heard) for name, heard in crowd.items()} == single


def test_virtual_tokens_take_room(served):
    with pytest.raises(ValueError, match="max_new_tokens=60 and the 5 virtual tokens of 'prompt' are more than the 64"):
        ask(served, [1], "prompt", 60)
    assert ask(served, [1], "prompt", 58).wait().end.reason == "length"


def poly():
    return trained(jlora.Poly(rank=2, tasks=2, skills=2), 1, VALUE)


REFUSED = {
    "other method": (lambda: trained(jlora.HRA(2), 1, VALUE), "there is no room for HRA(rank=2), but for SHiRA(mask=random"),
    "more entries": (lambda: trained(jlora.SHiRA(entries=301), 1, VALUE), "no room for SHiRA(mask=random, entries=301)"),
    "longer": (lambda: trained(jlora.PromptTuning(tokens=6), 1, EMBEDDING), "6 virtual tokens in front of a text"),
    "norm": (lambda: trained(jlora.LNTuning(), 1, ".*norm/(scale|weight)"), "otherwise than as a product's matrix"),
    "told": (poly, "wants to be told something by every call"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_rows_have_no_room_for_is_refused_by_name(served, name):
    make, said = REFUSED[name]
    before = served.adapters.names
    with pytest.raises(ValueError) as refused:
        served.adapters.add(name, make())
    assert said in str(refused.value) and repr(name) in str(refused.value) and served.adapters.names == before


def test_a_store_says_what_an_adapter_takes():
    plain, sparse = (store(leaves=VALUE, rank=2, like=like) for like in ([], [adapters()["fewer"]]))
    layers, size, width = 5, 64, 32
    assert plain.row_bytes == 4 * layers * (2 * (size + width) + width)
    assert sparse.row_bytes == plain.row_bytes + 4 * layers * (2 * (size + width) + 1)


def test_sparse_adapters_share_the_room_of_the_largest():
    def sparse(entries):
        arrays = (Array("values", (entries,), "float32", False), Array("index", (entries,), "int32", True))
        return Kind(jlora.SHiRA(entries=entries), arrays)

    assert joined([sparse(3), sparse(9), sparse(5)]) == (sparse(9),)


def test_positions_that_fill_up_sparse_adapters_stand_once():
    held = store(leaves=VALUE, like=[adapters()["shira"]])
    held.add(
        "few",
        adapters()["prompt"].replace(plan=adapters()["prompt"].plan.__class__(adapters()["prompt"].plan.sites[1:])),
    )
    ((fields),) = held.get("few").arrays.values()
    index, values = fields["kind1_index"], fields["kind1_values"]
    assert index.shape == values.shape == (5, 300) and not values[:, 50:].any()
    assert all(len(set(row.tolist())) == 300 for row in index) and jnp.all((index >= 0) & (index < 64 * 32))


def test_a_prefix_of_peft_is_what_it_was(tmp_path):
    held, model = store(leaves=VALUE, like=[adapters()["prefix"]]), loaded()[0]
    jlora.save_peft(tmp_path, adapters()["prefix"], models.peft_names(model), prefix=models.peft_prefix(model))
    held.add("own", adapters()["prefix"]), held.add("peft", tmp_path)
    own, peft = (held.get(name).front for name in ("own", "peft"))
    assert own.tokens == 3 and np.abs(own.keys).max() > 0.1
    np.testing.assert_allclose(own.keys, peft.keys, atol=1e-5)
    np.testing.assert_allclose(own.values, peft.values, atol=1e-5)
