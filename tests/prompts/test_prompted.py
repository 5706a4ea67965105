"""Virtual tokens in front of texts: on `jlora.models`, padded, packed, with a cache; on every framework; what is refused."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import jit
from flax import nnx

import jlora
from jlora import models
from jlora.models.attention import KVCache
from jlora.models.rope import rotate, rotation
from jlora.prompts.inserting import before_each, first_tokens

TEXT, LORA = (5, 77, 300), jlora.LoRA(2)
EMBEDDING, KEYS = r".*embed_tokens/embedding", r".*/(k|v)_proj/kernel"
IDS = np.random.default_rng(0).integers(3, 500, (2, 9)).astype(np.int32)


@functools.cache
def loaded(scan=True):
    model, params = models.load(models.STORIES260K, scan_layers=scan)
    return model, params, jlora.sites(lambda params, ids: model.apply({"params": params}, ids), params, IDS)


def adapted(spec, scan=True, seed=0):
    _, params, sites = loaded(scan)
    return jlora.adapterize(params, spec, sites=sites, key=jax.random.key(seed))


def text(tokens=3):
    return adapted({EMBEDDING: jlora.PromptTuning(tokens, init="text", text=TEXT[:tokens])})


def prefix(scan=True, **options):
    return adapted({KEYS: jlora.PrefixTuning(3, deviation=1.0, **options)}, scan)


@functools.cache
def prompted(texts=1, scan=True):
    apply = jlora.prompted(jlora.lift(loaded(scan)[0].apply), texts=texts)
    return jit(lambda params, ids, **beside: apply({"params": params}, ids, **beside))


@functools.cache
def plain(scan=True):
    apply = loaded(scan)[0].apply
    return jit(lambda params, ids, **beside: apply({"params": params}, ids, **beside))


def close(x, y, tolerance=2e-4):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.once
def test_a_prompt_of_real_rows_is_the_text_in_front():
    hard = np.concatenate([np.tile(TEXT, (2, 1)), IDS], axis=1)
    np.testing.assert_array_equal(prompted()(text(), IDS), plain()(loaded()[1], hard)[:, 3:])


@pytest.mark.once
def test_padding_changes_nothing():
    mask = np.ones((2, 9), bool)
    mask[1, :4] = False
    padded = prompted()(text(), IDS, attention_mask=mask)
    alone = prompted()(text(), IDS[1:, 4:])
    close(padded[1:, 4:], alone)


@pytest.mark.once
def test_every_packed_text_has_its_prompt():
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 0], range(9)], np.int32)
    for trained in (text(), prefix()):
        packed = prompted(2)(trained, IDS, segment_ids=segments, positions=positions)
        whole = prompted()(trained, IDS)
        close(packed[0, :3], whole[0, :3])
        close(packed[1], whole[1])
        close(packed[:1, 3:7], prompted()(trained, IDS[:1, 3:7]))


@pytest.mark.once
def test_texts_for_which_there_is_no_room_are_nan():
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2]] * 2, np.int32)
    logits = prompted()(text(), IDS, segment_ids=segments)
    assert np.isfinite(logits[:, :3]).all() and np.isnan(logits[:, 3:]).all()


@pytest.mark.once
def test_places_of_packed_texts_are_those_by_hand():
    found = before_each(first_tokens(jnp.array([[0, 1, 1, 2, 0, 3]]), None), 2, 3)
    assert found.source.tolist() == [[0, 6, 6, 1, 2, 6, 6, 3, 4, 6, 6, 5]]
    assert found.number.tolist() == [[-1, 0, 1, -1, -1, 0, 1, -1, -1, 0, 1, -1]]
    assert found.kept.tolist() == [[0, 3, 4, 7, 8, 11]]


def filled_by_hand(trained, scan):
    """The logits with the prefix in the cache, rotated, as past keys and values."""
    model, params, _ = loaded(scan)
    c, width = model.config, 3
    attention = [params["layers"]["self_attn"]] if scan else [params[f"layers_{n}"]["self_attn"] for n in range(5)]
    assert all("bias" not in each["k_proj"] for each in attention)
    own = trained.params
    rows = {
        name: own["layers"]["self_attn"][name]["kernel"]["rows"]
        if scan
        else jnp.stack([own[f"layers_{n}"]["self_attn"][name]["kernel"]["rows"] for n in range(5)])
        for name in ("k_proj", "v_proj")
    }
    keys, values = (rows[name].reshape(5, width, c.num_key_value_heads, c.head_dim) for name in ("k_proj", "v_proj"))
    cosine, sine = rotation(c.rope, c.head_dim, jnp.arange(width)[None])
    keys = rotate(keys, cosine, sine)
    room = lambda x: jnp.pad(jnp.stack([x, x], 1), ((0, 0), (0, 0), (0, 9), (0, 0), (0, 0)))
    at = jnp.tile(jnp.pad(jnp.arange(width), (0, 9)), (2, 1))
    segments = jnp.tile(jnp.pad(jnp.ones(width, jnp.int32), (0, 9)), (2, 1))
    cache = KVCache(room(keys), room(values), at, segments, jnp.int32(width))
    return plain(scan)(params, IDS, cache=cache)[0]


@pytest.mark.parametrize("scan", [True, False])
def test_a_prefix_is_past_keys_and_values_filled_by_hand(scan):
    trained = prefix(scan)
    close(prompted(scan=scan)(trained, IDS), filled_by_hand(trained, scan), 2e-5)


@pytest.mark.once
def test_generating_writes_what_the_whole_text_gives():
    apply = jlora.prompted(jlora.lift(loaded()[0].apply))
    for trained in (text(), prefix()):
        written = models.generate(apply, trained, [IDS[0, :5].tolist(), IDS[1, :2].tolist()], max_new_tokens=3)
        for start, found in zip((IDS[0, :5], IDS[1, :2]), written, strict=True):
            logits = apply({"params": trained}, jnp.array([[*start, *found]]))
            assert found == np.argmax(logits[0, len(start) - 1 : -1], -1).tolist()


@pytest.mark.once
def test_networks_are_left_out_exactly():
    spec = {EMBEDDING: jlora.PTuning(3, hidden=4), KEYS: jlora.PrefixTuning(3, hidden=4, width=5), ".*mlp.*": LORA}
    trained = adapted(spec)
    bare = jlora.without_encoder(trained)
    assert "~shared" not in bare.params
    assert {str(s.method) for s in bare.plan.sites} == {
        "PromptTuning(tokens=3)",
        "PrefixTuning(tokens=3, width=5)",
        str(LORA),
    }
    close(prompted()(bare, IDS), prompted()(trained, IDS), 3e-5)
    with pytest.raises(ValueError, match="no network makes a prompt"):
        jlora.without_encoder(bare)


@pytest.mark.once
@pytest.mark.parametrize("spec", [{EMBEDDING: jlora.PTuning(3, "lstm", 4)}, {KEYS: jlora.PrefixTuning(3, 4, 5)}])
def test_prompts_learn_and_nothing_of_them_is_dead(spec):
    start = adapted(spec)
    tx, apply = jlora.optimizer(start, optax.adam, learning_rate=1e-2), jlora.prompted(jlora.lift(loaded()[0].apply))

    @jit
    def losses(start):
        def loss(params):
            logits = apply({"params": start.replace(params=params)}, IDS[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, 1:]).mean()

        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), (value, gradient)

        return jax.lax.scan(step, (start.params, tx.init(start.params)), length=10)[1]

    values, gradients = losses(start)
    assert values[-1] < values[0] - 0.3
    assert all(np.any(leaf[-1] != 0) for leaf in jax.tree.leaves(gradients))


def test_saved_prompts_come_back(tmp_path):
    trained = adapted({EMBEDDING: jlora.PromptTuning(2, init="classes", classes=((5, 7), (9,)))})
    jlora.save(tmp_path / "prompt", trained)
    again = jlora.load(tmp_path / "prompt", loaded()[1])
    assert again.plan == trained.plan
    np.testing.assert_array_equal(prompted()(again, IDS), prompted()(trained, IDS))
    rows = loaded()[1]["embed_tokens"]["embedding"]
    close(trained.params["embed_tokens"]["embedding"]["prompt"], jnp.stack([(rows[5] + rows[7]) / 2, rows[9]]), 1e-6)


@pytest.mark.once
def test_drawn_rows_are_different_ones_of_the_vocabulary():
    drawn = adapted({EMBEDDING: jlora.PromptTuning(40)}).params["embed_tokens"]["embedding"]["prompt"]
    rows = np.asarray(loaded()[1]["embed_tokens"]["embedding"])
    numbers = [int(np.flatnonzero((rows == row).all(1))[0]) for row in np.asarray(drawn)]
    assert len(set(numbers)) == 40


@pytest.mark.once
def test_merging_is_refused_by_name():
    for trained, path in ((text(), "embed_tokens/embedding"), (prefix(), "layers/self_attn/k_proj/kernel")):
        with pytest.raises(ValueError, match=f"{path} can't be merged"):
            jlora.merge(trained)


@pytest.mark.once
def test_a_focus_is_prefix_tuning_with_what_is_common_taken_away():
    apply = jlora.prompted(jlora.lift(loaded()[0].apply))
    cheerful, common = (adapted({KEYS: jlora.PrefixTuning(2, deviation=1.0)}, seed=seed) for seed in (1, 2))
    prompts = [IDS[0, :5].tolist(), IDS[1, :2].tolist()]
    write = lambda apply, params: models.generate(apply, params, prompts, max_new_tokens=3)
    focused = jlora.focused(apply)
    alone = jlora.focus([cheerful], [common], alpha=1.0, top_p=1.0)
    assert write(focused, alone) == write(apply, cheerful)
    both = focused({"params": jlora.focus([cheerful], [common], alpha=2.0, top_p=0.8)}, IDS)
    specific, general = (jax.nn.log_softmax(apply({"params": each}, IDS)) for each in (cheerful, common))
    order = np.argsort(-specific, -1)
    before = np.cumsum(np.take_along_axis(np.exp(specific), order, -1), -1) - np.take_along_axis(
        np.exp(specific), order, -1
    )
    inside = np.take_along_axis(before < 0.8, np.argsort(order, -1), -1)
    close(both, np.where(inside, 2 * specific - general, -np.inf), 1e-3)
    assert 0 < inside.mean() < 0.5
    with pytest.raises(ValueError, match="must have the same leaves"):
        jlora.focus([cheerful], [prefix()])
    with pytest.raises(ValueError, match="a general adapter for each of the 1 specific ones"):
        jlora.focus([cheerful], [])
    with pytest.raises(ValueError, match="on the same base"):
        jlora.focus([cheerful], [common.replace(base={**common.base, "more": np.ones(2)})])
    with pytest.raises(ValueError, match="focus wants finite numbers, got alpha nan"):
        jlora.focus([cheerful], [common], alpha=float("nan"))
    assert jlora.focus([cheerful], [common], alpha=np.float32(2)).alpha.tolist() == [2]


# Attention by hand in each framework, with the past filled in as an argument.
WIDTH, HEADS, VOCABULARY = 8, 2, 11
SMALL = np.array([[1, 5, 2, 7, 3], [3, 3, 0, 1, 10]])


def attend(q, k, v):
    """Causal attention of the last queries; `[batch, length, width]`."""
    q, k, v = (x.reshape(*x.shape[:2], HEADS, -1) for x in (q, k, v))
    seen = jnp.arange(k.shape[1]) <= jnp.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], WIDTH)


def with_past(past, x):
    return x if past is None else jnp.concatenate([jnp.broadcast_to(past, (len(x), *past.shape)), x], axis=1)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, ids, past=(None, None)):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(ids)
        q, k, v = (nn.Dense(WIDTH, name=name, use_bias=name != "q")(x) for name in "qkv")
        x = x + attend(q, with_past(past[0], k), with_past(past[1], v))
        return nn.Dense(VOCABULARY, name="head")(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.q, self.k, self.v = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3))
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, ids, past=(None, None)):
        x = self.embed(ids)
        x = x + attend(self.q(x), with_past(past[0], self.k(x)), with_past(past[1], self.v(x)))
        return self.head(x)


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Embedding
    q: eqx.nn.Linear
    k: eqx.nn.Linear
    v: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.q, self.k, self.v = (eqx.nn.Linear(WIDTH, WIDTH, key=key) for key in keys[1:4])
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[4])

    def __call__(self, ids, past=(None, None)):
        each = lambda layer: jax.vmap(jax.vmap(layer))
        x = each(self.embed)(ids)
        q, k, v = (each(layer)(x) for layer in (self.q, self.k, self.v))
        x = x + attend(q, with_past(past[0], k), with_past(past[1], v))
        return each(self.head)(x)


def linen():
    model = LinenModel()
    params = model.init(jax.random.key(0), SMALL)["params"]
    return lambda params, ids, *past: model.apply({"params": params}, ids, *past), params, "k/bias", "v/bias"


def of_nnx():
    graph, params = nnx.split(NnxModel(nnx.Rngs(0)))
    return lambda params, ids, *past: nnx.merge(graph, params)(ids, *past), params, "k/bias", "v/bias"


def equinox():
    model = EquinoxModel(jax.random.key(0))
    return lambda model, ids, *past: model(ids, *past), model, "k/bias", "v/bias"


@pytest.mark.once
@pytest.mark.parametrize("framework", [linen, of_nnx, equinox])
def test_every_framework(framework):
    fn, params, *biases = framework()
    sites = jlora.sites(fn, params, SMALL)
    apply = jlora.prompted(jlora.lift(fn))
    soft = jlora.adapterize(params, {"embed/.*": jlora.PromptTuning(3, "text", (4, 9, 1))}, sites=sites)
    hard = np.concatenate([np.tile((4, 9, 1), (2, 1)), SMALL], axis=1)
    close(apply(soft, SMALL), fn(params, hard)[:, 3:], 1e-6)
    rows = jlora.adapterize(params, {"[kv]/(kernel|weight)": jlora.PrefixTuning(3, deviation=1.0)}, sites=sites)
    leaves = {site.path: site for site in rows.plan.sites}
    found = {"/".join(keys): leaf for keys, leaf in jlora.paths.flatten_with_keys(params)[0]}
    past = []
    for path, bias in zip(sorted(leaves), biases, strict=True):
        name = path.split("/")
        past.append(rows.params[name[0]][name[1]]["rows"] + found[bias])
    close(apply(rows, SMALL), fn(params, SMALL, tuple(past)), 1e-5)


@pytest.mark.once
def test_columns_of_a_fused_product():
    def fn(params, ids):
        x = params["embed"][ids]
        return x + attend(*jnp.split(x @ params["qkv"], 3, axis=-1))

    keys = jax.random.split(jax.random.key(1))
    params = {
        "embed": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
        "qkv": jax.random.normal(keys[1], (WIDTH, 3 * WIDTH)),
    }
    with pytest.raises(ValueError, match=r"qkv, shape \(8, 24\): .*PrefixTuning\(columns=\(8, 24\)\)"):
        jlora.adapterize(params, {"qkv": jlora.PrefixTuning(2)})
    with pytest.raises(ValueError, match="not all among the 24"):
        jlora.adapterize(params, {"qkv": jlora.PrefixTuning(2, columns=(8, 25))})
    trained = jlora.adapterize(params, {"qkv": jlora.PrefixTuning(2, columns=(8, 24), deviation=1.0)})
    rows = trained.params["qkv"]["rows"]
    x = params["embed"][SMALL]
    q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
    wanted = x + attend(q, with_past(rows[:, :8], k), with_past(rows[:, 8:], v))
    close(jlora.prompted(jlora.lift(fn))(trained, SMALL), wanted, 1e-5)


@pytest.mark.once
def test_what_virtual_tokens_would_get_wrong_is_refused():
    table = {"embed": jnp.ones((VOCABULARY, WIDTH))}
    soft = jlora.adapterize(table, {"embed": jlora.PromptTuning(2)})
    one_hot = jlora.prompted(jlora.lift(lambda params, ids: jax.nn.one_hot(ids, VOCABULARY) @ params["embed"]))
    with pytest.raises(ValueError, match="embed: virtual tokens are ids beyond the last row, .*one-hot"):
        one_hot(soft, SMALL)
    formed = jlora.prompted(jlora.lift(lambda params, ids: jnp.sort(params["embed"], axis=0)[ids]))
    with pytest.raises(ValueError, match="embed: PromptTuning"):
        formed(soft, SMALL)
    lookup = jlora.prompted(jlora.lift(lambda params, ids: params["embed"][ids]))
    with pytest.raises(ValueError, match="can't hold the virtual ones, 120 to 129"):
        big = jlora.adapterize({"embed": jnp.ones((120, 2))}, {"embed": jlora.PromptTuning(10)})
        lookup(big, SMALL.astype(np.int8))
    with pytest.raises(ValueError, match="got none"):
        lookup(table, SMALL)
    with pytest.raises(ValueError, match=r"ids \[batch, length\] of integers, got shape \(5,\)"):
        lookup(soft, SMALL[0])
    pooling = lambda params, ids: params["embed"][ids].mean(1)
    with pytest.raises(ValueError, match=r"results with the axes \[batch, length, ..\].*got shape \(2, 8\)"):
        jlora.prompted(jlora.lift(pooling))(soft, SMALL)
    assert jlora.prompted(jlora.lift(pooling), pooled=True)(soft, SMALL).shape == (2, 8)
    kernels = {"q_proj": jnp.ones((4, 4)), "k_proj": jnp.ones((4, 4)), "v_proj": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="q_proj.*makes queries"):
        jlora.adapterize(kernels, {"q_proj": jlora.PrefixTuning()})
    uneven = jlora.adapterize(kernels, {"k_proj": jlora.PrefixTuning(2), "v_proj": jlora.PrefixTuning(3)})
    keyed = jlora.prompted(jlora.lift(lambda params, ids: (ids[..., None] * 1.0) @ params["k_proj"][:1]))
    with pytest.raises(ValueError, match="k_proj has 2 and v_proj has 3"):
        keyed(uneven, SMALL)
    turned = jlora.prompted(jlora.lift(lambda params, ids: jnp.ones((*ids.T.shape, 4)) @ params["k_proj"]))
    with pytest.raises(ValueError, match=r"k_proj: prefix-tuning wants .* got \(7, 2, 'in'\)"):
        turned(jlora.adapterize({"k_proj": jnp.ones((4, 4))}, {"k_proj": jlora.PrefixTuning(2)}), SMALL)


@pytest.mark.once
def test_labels_as_many_as_tokens_are_not_cut():
    """A result `[batch, labels]` is not mistaken for one number a token."""
    table = {"embed": jnp.ones((VOCABULARY, 7))}
    soft = jlora.adapterize(table, {"embed": jlora.PromptTuning(2)})
    apply = jlora.prompted(jlora.lift(lambda params, ids: params["embed"][ids].mean(1)), pooled=True)
    assert apply(soft, SMALL).shape == (2, 7)
    each = jlora.prompted(jlora.lift(lambda params, ids: params["embed"][ids].mean(2)))
    assert each(soft, SMALL).shape == (2, 5)


def test_a_batch_and_other_places_of_the_ids():
    soft = jlora.adapterize({"embed": jnp.arange(22.0).reshape(11, 2)}, {"embed": jlora.PromptTuning(2)})
    masked = lambda params, batch: params["embed"][batch["input_ids"]] * batch["attention_mask"][..., None]
    mask = np.array([[0, 1, 1, 1, 1], [1] * 5])
    wanted = soft.base["embed"][SMALL] * mask[..., None]
    np.testing.assert_array_equal(
        jlora.prompted(jlora.lift(masked))(soft, {"input_ids": SMALL, "attention_mask": mask}), wanted
    )
    behind = jlora.prompted(jlora.lift(lambda ids, params: params["embed"][ids]), tokens=0)
    np.testing.assert_array_equal(behind(SMALL, soft), soft.base["embed"][SMALL])
    named = jlora.prompted(jlora.lift(lambda params, *, ids: params["embed"][ids]), tokens="ids")
    np.testing.assert_array_equal(named(soft, ids=SMALL), soft.base["embed"][SMALL])
