"""Banks: rows and tokens that choose their adapter in one call get what they would get alone."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import adapt, close, jit, layers, normal, perturbed, weight
from models_data import GOLDEN, quick_jit

import jlora
from jlora import NF4, Axes, DoRA, LoRA, models, paths
from jlora.core.tree.adapted import Adapted, Plan

NAMES = ["sql", None, "chat", "sql"]


def noisy(params, spec, seed, sites=None):
    return perturbed(adapt(params, spec, sites=sites), seed, 0.1)


# Every way in which models use a weight, but a convolution and those beyond the two first axes, on stacked and single leaves.


class Network(nn.Module):
    """A plain model, with an embedding that is its head too, a bias, and layers of a scan."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(12, 8, name="embed")
        x = embed(tokens) + nn.Dense(8, name="mixed")(embed(tokens))
        scan = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return embed.attend(scan(name="layers")(x, None)[0])


class Layer(nn.Module):
    """Attention-like heads."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.DenseGeneral((2, 4), name="heads")(x)
        return x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(jnp.tanh(y)), None


def linen():
    """A plain Linen model, its params, tokens, and two adapters of several methods and ranks."""
    model, tokens = Network(), jnp.asarray(np.random.default_rng(0).integers(0, 12, (4, 5)))
    params = model.init(jax.random.key(0), tokens)["params"]
    fn = lambda params, tokens: model.apply({"params": params}, tokens)
    sites = jlora.sites(fn, params, tokens)
    sql = noisy(params, {".*/(kernel|embedding)": LoRA(3, alpha=6)}, 5, sites)
    chat = noisy(params, {"layers/heads/kernel": DoRA(LoRA(2)), "mixed/kernel|embed/.*": LoRA(1)}, 7, sites)
    return fn, params, tokens, {"sql": sql, "chat": chat}


def alone(fn, params, adapters, names, rows):
    """Each row by itself, with its own adapter."""
    lifted = jlora.lift(fn, unread="allow")
    each = [adapters[name] if name else params for name in names]
    return jnp.concatenate([lifted(one, rows[n : n + 1]) for n, one in enumerate(each)])


def test_rows_tokens_and_all_get_what_they_would_get_alone_in_a_plain_model():
    fn, params, tokens, adapters = linen()
    bank = jlora.Bank.of(params, adapters, capacity=3)
    bank.check(fn, tokens)
    ids = bank.ids(NAMES)
    assert ids.tolist() == [1, 0, 2, 1] and bank.names == ("sql", "chat") and bank.capacity == 3
    by_token = np.stack([ids, ids[::-1], *[ids] * 3], axis=1)  # the second token of each row has another one

    @quick_jit
    def everything(rows, tokens_of, one, adapters):
        lifted = jlora.lift(fn, strict=True)
        wanted = alone(fn, params, adapters, NAMES, tokens)
        return (
            lifted(rows, tokens),
            wanted,
            lifted(tokens_of, tokens),
            lifted(one, tokens),
            lifted(adapters["chat"], tokens),
        )

    every = everything(bank.on(slot=ids), bank.on(slot=by_token), bank.on(slot=bank.ids("chat")), adapters)
    rows, wanted, mixed, chat, wanted_chat = every
    close(rows, wanted)
    close(chat, wanted_chat)
    np.testing.assert_array_equal(rows[1], jax.jit(fn)(params, tokens)[1])
    # No token sees another one here.
    close(mixed[:, 0], wanted[:, 0])
    close(mixed[:, 1], alone(fn, params, adapters, NAMES[::-1], tokens)[:, 1])


def llama(name, scan_layers=True):
    model, params = models.load(name, scan_layers=scan_layers)
    fn = lambda params, tokens: model.apply({"params": params}, tokens)
    tokens = np.random.default_rng(1).integers(1, model.config.vocab_size, (4, 6))
    sites = jlora.sites(fn, params, tokens)
    return model, fn, params, tokens, sites


QWEN = GOLDEN / "qwen2_window_tied"


@pytest.mark.once
@pytest.mark.parametrize("form", ["scan", "unrolled", "nf4"])
def test_rows_of_a_llama_get_what_they_would_get_alone(form):
    model, fn, params, tokens, sites = llama(models.STORIES260K if form == "nf4" else QWEN, form != "unrolled")
    if form == "nf4":
        params = jlora.quantize(params, {r".*/(q|k|v|o|gate|up)_proj/kernel": NF4(32)}, sites)
    every = {jlora.ALL_LINEAR: LoRA(4)}
    adapters = {
        "sql": noisy(params, every, 5, sites),
        "chat": noisy(params, {r".*[qv]_proj/kernel": LoRA(2)}, 6, sites),
    }
    bank = jlora.Bank.of(params, adapters)
    wanted = alone(fn, params, adapters, NAMES, tokens)
    close(quick_jit(jlora.lift(fn))(bank.on(slot=bank.ids(NAMES)), tokens), wanted)
    if form == "scan":
        apply, prompts = jlora.lift(model.apply), [row[: n + 2].tolist() for n, row in enumerate(tokens)]
        together = models.generate(apply, bank.on(slot=bank.ids(NAMES)), prompts, max_new_tokens=4)
        for name, prompt, row in zip(NAMES, prompts, together, strict=True):
            one = models.generate(apply, bank.on(slot=bank.ids(name)), [prompt], max_new_tokens=4)
            assert row == one[0]


@pytest.mark.once
def test_rows_may_have_adapters_that_hold_no_factors():
    """Sparse ones of several sizes, formed and acting ones beside LoRA, at a stacked leaf; before and after growth."""
    params, x = {"w_0": weight(0, 2, 8, 8)}, normal(1, 4, 3, 8)
    make = lambda method, seed: noisy(params, {"w_0": Axes("batch in out", method)}, seed)
    adapters = {
        "lora": make(LoRA(2), 1),
        "sparse": make(jlora.SHiRA(entries=6), 2),
        "lengths": make(DoRA(jlora.SHiRA(density=0.1)), 3),
        "output": make(jlora.Bottleneck(4, side="output"), 4),
        "turned": make(jlora.OFT(4), 5),
    }
    bank = jlora.Bank.of(params, adapters)
    run = jit(lambda adapted, x, ids: jlora.lift(layers)(adapted.on(slot=ids), x))
    lifted = jit(jlora.lift(layers))

    def agrees(names):
        wanted = [lifted(adapters[name] if name else params, x)[n] for n, name in enumerate(names)]
        close(run(bank.adapted, x, bank.ids(names)), jnp.stack(wanted))

    agrees(["lora", "sparse", None, "lengths"])
    agrees(["turned", "output", "lora", "turned"])
    adapters["more"] = make(jlora.SHiRA("weight", entries=9, scale=0.5), 6)
    with pytest.raises(
        ValueError, match=r"for 'sparse' there is no room for SHiRA\(mask=random, entries=9\), but for SHiRA"
    ):
        bank.replace("sparse", adapters["more"])
    bank.grow(capacity=6, fit=adapters["more"])
    positions = bank.adapted.params["w_0"]["kind1_index"][:, bank.ids("sparse")]
    assert [len(set(each)) for each in positions.tolist()] == [
        9,
        9,
    ]  # none stands twice, as is promised to the products
    bank.add("more", adapters["more"])
    agrees(["more", "sparse", "turned", "lengths"])
    bank.replace("turned", adapters["sparse"])
    bank.remove("sparse")
    adapters |= {"turned": adapters["sparse"]}
    agrees(["turned", "more", "lora", None])
    with pytest.raises(ValueError, match=r"adapters that hold no factors \(SHiRA.* can't be mixed by weights="):
        bank.on(weights={"lora": 1.0})


@pytest.mark.once
def test_one_slot_without_factors_has_a_weight():
    params, x = {"w_0": weight(0, 8, 8)}, normal(1, 3, 8)
    make = lambda method, seed: noisy(params, {"w_0": method}, seed)
    adapters = {"lora": make(LoRA(2), 0), "sparse": make(jlora.SHiRA(entries=5), 1), "formed": make(jlora.LoHa(2), 2)}
    bank = jlora.Bank.of(params, adapters)
    turned = jit(lambda adapted, x: jlora.lift(lambda p, x: x @ p["w_0"].T)(adapted, x))
    for name, adapted in adapters.items():
        one = bank.on(slot=bank.ids(name))
        close(jlora.merge(one), jlora.merge(adapted))
        close(turned(one, x), x @ jlora.merge(adapted)["w_0"].T)
    with pytest.raises(ValueError, match=r"w_0: rows that choose .* no weight in common"):
        jlora.merge(bank.on(slot=np.array([1, 0])))
    bank = jlora.Bank.of(params, {"acts": make(jlora.Bottleneck(4, side="output"), 3)})
    with pytest.raises(ValueError, match=r"w_0: a slot may hold Bottleneck.*, which has no weight to form"):
        jlora.merge(bank.on(slot=1))


@pytest.mark.once
def test_weights_mix_the_changes_of_all_adapters():
    params, x = {"w_0": weight(0, 3, 8, 8)}, normal(1, 4, 5, 8)
    adapters = {name: noisy(params, {"w_0": Axes("batch in out", LoRA(2))}, n) for n, name in enumerate("ab")}
    bank = jlora.Bank.of(params, adapters, rank=3)
    lifted = jit(jlora.lift(layers, strict=True))
    both = lifted(jlora.combine(list(adapters.values()), [0.7, -0.4]), x)
    close(lifted(bank.on(weights={"a": 0.7, "b": -0.4}), x), both)
    close(
        jlora.merge(bank.on(weights={"a": 0.7, "b": -0.4})),
        jlora.merge(jlora.combine(list(adapters.values()), [0.7, -0.4])),
    )
    rows = jnp.array([[0, 0.7, -0.4], [0, 1, 0], [3, 0, 0], [0, 0, 1]])
    wanted = [
        both[:1],
        *(lifted(each, x[n : n + 1]) for n, each in enumerate((adapters["a"], params, adapters["b"]), 1)),
    ]
    close(lifted(bank.on(weights=rows), x), jnp.concatenate(wanted))
    gradient = jit(jax.grad(lambda m: jnp.sum(jlora.lift(layers)(bank.on(weights=m), x) ** 2)))
    merged = lambda m: jnp.sum(layers(jlora.merge(bank.on(weights=m)), x) ** 2)
    mix = jnp.array([0.0, 0.7, -0.4])
    close(gradient(mix), jit(jax.grad(merged))(mix))


@pytest.mark.once
def test_adapters_come_and_go_without_compilation_and_growth_alone_compiles():
    params, x = {"w_0": weight(0, 8, 8), "u_0": weight(1, 8, 8)}, normal(2, 3, 8)
    fn = lambda p, x: jnp.tanh(x @ p["w_0"]) @ p["u_0"]
    make = lambda seed, rank, names="w_0": noisy(params, {names: LoRA(rank)}, seed)
    bank = jlora.Bank.of(params, {"a": make(0, 2), "b": make(1, 3)}, capacity=3)
    traces = []

    @jit
    def step(adapted, x):
        traces.append(None)
        return jlora.lift(fn)(adapted, x)

    def agrees(**adapters):
        names = [*adapters]
        ids = bank.ids([names[0], None, names[-1]])
        got = step(bank.on(slot=ids), x)
        each = [adapters[names[0]], params, adapters[names[-1]]]
        close(got, jnp.concatenate([jlora.lift(fn, unread="allow")(one, x[n : n + 1]) for n, one in enumerate(each)]))

    a, b, c, d = make(0, 2), make(1, 3), make(2, 1), make(3, 3)
    agrees(a=a, b=b)
    bank.add("c", c)
    agrees(a=a, c=c)
    bank.replace("a", d)
    agrees(a=d, c=c)
    bank.remove("a")
    close(step(bank.adapted.on(slot=np.array([1, 1, 1])), x), fn(params, x))  # nothing is left of it
    bank.add("d", b)
    agrees(d=b, b=b)
    assert len(traces) == 1 and bank.names == ("b", "c", "d")
    before = bank.adapted.params["w_0"]["a"]
    bank.grow(capacity=5, fit=make(4, 6, ".*"))
    wide = make(5, 6, ".*")
    bank.add("wide", wide)
    agrees(d=b, wide=wide)
    agrees(b=b, c=c)
    assert len(traces) == 2 and bank.capacity == 5 and not before.is_deleted()


@pytest.mark.once
def test_slots_are_written_in_place():
    params = {"w_0": weight(0, 8, 8)}
    one = noisy(params, {"w_0": LoRA(2)}, 0)
    bank = jlora.Bank.of(params, {"a": one}, capacity=2)
    assert f"{2 * (8 + 8)} multiply-adds more" in jlora.explain(bank.on(slot=1))
    stale = bank.on(slot=1)
    bank.add("b", one)
    with pytest.raises(RuntimeError, match="deleted"):
        jlora.lift(lambda p, x: x @ p["w_0"])(stale, normal(1, 3, 8))


@pytest.mark.once
def test_adapters_come_from_directories_of_jlora_of_a_run_and_of_peft(tmp_path):
    model, fn, params, tokens, sites = llama(QWEN)
    adapters = {
        "saved": noisy(params, {r".*q_proj/kernel": LoRA(2)}, 1, sites),
        "run": noisy(params, {r".*v_proj/kernel": LoRA(4)}, 2, sites),
        "peft": noisy(params, {r".*(up|o)_proj/kernel": DoRA(LoRA(3))}, 3, sites),
    }
    jlora.save(tmp_path / "saved", adapters["saved"])
    jlora.save(tmp_path / "run" / "adapters", adapters["run"])
    names = models.peft_names(model)
    jlora.save_peft(tmp_path / "peft", adapters["peft"], names=names)
    folders = {name: tmp_path / name for name in adapters}
    with pytest.raises(ValueError, match="peft is in PEFT's format: give names="):
        jlora.Bank.of(params, folders)
    bank = jlora.Bank.of(params, folders, names=names)
    order = ["peft", "run", None, "saved"]
    close(quick_jit(jlora.lift(fn))(bank.on(slot=bank.ids(order)), tokens), alone(fn, params, adapters, order, tokens))
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        bank.replace("run", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no adapters: wanted one of the files jlora.json, adapter_config.json"):
        bank.replace("run", tmp_path)


@pytest.mark.once
def test_the_set_up_check_finds_models_that_move_the_batch_axis_or_mix_rows():
    params, x = {"w_0": weight(0, 8, 8)}, normal(1, 5, 5, 8)
    bank = jlora.Bank.of(params, {"a": noisy(params, {"w_0": LoRA(2)}, 0)})
    bank.check(lambda p, x: {"y": jnp.einsum("btd,do->bto", x, p["w_0"])}, x)
    with pytest.raises(
        ValueError, match=r"row 0 of the function's result\['y'\] is another one among 5 rows than alone"
    ):
        bank.check(lambda p, x: {"y": jnp.moveaxis(jnp.moveaxis(x, 1, 0) @ p["w_0"], 1, 0)}, x)
    with pytest.raises(ValueError, match="row . of the function's result is another one"):
        bank.check(lambda p, x: (x - x.mean(0)) @ p["w_0"], x)
    with pytest.raises(
        ValueError,
        match=r"w_0: slots for \(5,\) rows .* leading axes \(25,\): .* at `dot_general` at .*test_bank.py:\d+",
    ):
        bank.check(lambda p, x: (x.reshape(-1, 8) @ p["w_0"]).reshape(x.shape), x)
    with pytest.raises(ValueError, match=r"has shape \(8,\), where 5 rows were wanted in front"):
        bank.check(lambda p, x: (x @ p["w_0"]).sum((0, 1)), x)
    with pytest.raises(ValueError, match="check takes inputs with two rows or more in front"):
        bank.check(lambda p, x: x @ p["w_0"], x[:1])


@pytest.mark.once
@pytest.mark.parametrize("layout, out, groups", [("NHWC", "NHWC", 1), ("CHNW", "HCWN", 1), ("NHWC", "NCHW", 2)])
def test_rows_choose_in_convolutions(layout, out, groups):
    """In feature groups too, and where the batch axis is not in front; more rows than slots, and fewer."""
    params = {"w_0": weight(0, 3, 2, 4 // groups, 6), "u_0": weight(1, 6, 6)}
    image = normal(2, *({"N": 5, "H": 5, "W": 4, "C": 4}[axis] for axis in layout))

    def fn(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["w_0"], (1, 2), "SAME", dimension_numbers=(layout, "HWIO", out), feature_group_count=groups
        )
        return jnp.transpose(y, [out.index(axis) for axis in "NHWC"]) @ params["u_0"]

    make = lambda method, seed: noisy(params, {"w_0": Axes("in in in out", method)}, seed)
    adapters = {"a": make(LoRA(2), 0), "b": make(DoRA(LoRA(1)), 1), **{name: make(LoRA(1), 2) for name in "cdef"}}
    few, many = (jlora.Bank.of(params, dict(list(adapters.items())[:count])) for count in (2, 6))
    run = jit(lambda adapted, x, ids: jlora.lift(fn)(adapted.on(slot=ids), x))
    lifted = jit(jlora.lift(fn, unread="allow"))
    names = ["a", None, "b", "b", "a"]
    wanted = jnp.stack([lifted(adapters[name] if name else params, image)[n] for n, name in enumerate(names)])
    for bank in (few, many):
        close(run(bank.adapted, image, bank.ids(names)), wanted)
        unknown = run(bank.adapted, image, np.where(np.arange(5) == 1, 9, bank.ids(names)))
        assert np.isnan(unknown[1]).all()
        close(unknown[2:], wanted[2:])
    if groups == 1:
        shares = jnp.zeros((5, 7)).at[:, 3].set(jnp.arange(5.0)).at[:, 4].set(1)  # c and d
        sums = jlora.Bank.of(
            params, {name: each for name, each in adapters.items() if name != "b"} | {"b": make(LoRA(1), 5)}
        )
        unknown = run(sums.adapted, image, np.array([1, 9, 1, 1, 1]))
        assert np.isnan(unknown[1]).all() and np.isfinite(unknown[2]).all()
        mix = jit(lambda adapted, x, shares: jlora.lift(fn)(adapted.on(weights=shares), x))
        both = lifted(jlora.combine([adapters["d"], adapters["e"]], [2.0, 1.0]), image)
        close(mix(sums.adapted, image, shares)[2], both[2])


@pytest.mark.once
def test_what_rows_cant_choose_is_refused_with_leaf_and_line():
    params = {"w_0": weight(0, 3, 8, 8)}
    x, adapter = normal(1, 4, 6, 8), noisy(params, {"w_0": Axes("in in out", LoRA(2))}, 0)
    bank = jlora.Bank.of(params, {"a": adapter})

    def convolved(params, x):
        return jax.lax.conv_general_dilated(x, params["w_0"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    close(jlora.lift(convolved, strict=True)(bank.on(slot=1), x), jlora.lift(convolved)(adapter, x))
    with pytest.raises(
        ValueError, match=r"w_0: a convolution mixes positions, so rows choose .* at `conv_general_dilated` at"
    ):
        jlora.lift(convolved)(bank.on(slot=np.ones((4, 6), np.int32)), x)
    with pytest.raises(ValueError, match=r"w_0: slots for \(3,\) rows .* has the leading axes \(4,\)"):
        jlora.lift(convolved)(bank.on(slot=np.array([1, 0, 1])), x)
    mapped = jax.vmap(lambda slot, row: jlora.lift(convolved)(bank.on(slot=slot), row[None])[0])(
        jnp.array([1, 0, 1, 0]), x
    )
    close(mapped[::2], jlora.lift(convolved)(adapter, x)[::2])
    close(mapped[1::2], convolved(params, x)[1::2])
    with pytest.raises(ValueError, match=r"w_0: rows that choose .* no weight in common"):
        jlora.merge(bank.on(slot=np.array([1, 0])))
    with pytest.raises(ValueError, match=r"w_0: the call must say which slots: on\(slot=...\)"):
        jlora.lift(convolved)(bank.adapted, x)


@pytest.mark.once
def test_adapters_and_choices_that_dont_fit_are_refused_by_name():
    params = {"w_0": weight(0, 8, 8), "u_0": weight(1, 8, 8)}
    make = lambda method, names="w_0": noisy(params, {names: method}, 0)
    with pytest.raises(ValueError, match="w_0: Poly.* of 'c' wants to be told something by every call"):
        jlora.Bank.of(params, {"c": make(jlora.Poly(rank=2, tasks=2, skills=2))})
    with pytest.raises(
        ValueError, match="w_0: PrefixTuning.* of 'c' stands in front of a text, where no bank has slots"
    ):
        jlora.Bank.of(params, {"c": make(jlora.PrefixTuning(2))})
    with pytest.raises(ValueError, match="2 adapters don't fit into a bank with capacity=1"):
        jlora.Bank.of(params, {"a": make(LoRA(2)), "b": make(LoRA(2))}, capacity=1)
    spoilt = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), make(LoRA(2)).params)
    with pytest.raises(ValueError, match="w_0: 'a' holds values that are not finite"):
        jlora.Bank.of(params, {"a": make(LoRA(2)).replace(params=spoilt)})
    other = jlora.adapterize({**params, "w_0": params["w_0"] + 1}, {"w_0": LoRA(2)})
    with pytest.raises(ValueError, match="w_0: adapters 0 and 1 stand on different bases"):
        jlora.Bank.of(params, {"a": other})
    bank = jlora.Bank.of(params, {"a": make(LoRA(2))}, capacity=2)
    before = bank.adapted.params
    refusals = {
        r"the bank has an adapter 'a' already": ("a", make(LoRA(1))),
        r"w_0: 'b' has rank 3, but the bank room for 2; grow\(rank=3\)": ("b", make(LoRA(3))),
        r"u_0: the bank has no room for this leaf, which 'b' adapts": ("b", make(LoRA(2), ".*")),
        r"w_0: 'b' has a gain, and the bank no room for gains": ("b", make(DoRA(LoRA(2)))),
        r"w_0: for 'b' there is no room for SHiRA.*, but for no method beside low-rank factors; grow\(fit=": (
            "b",
            make(jlora.SHiRA(entries=4)),
        ),
    }
    for message, (name, adapter) in refusals.items():
        with pytest.raises(ValueError, match=message):
            bank.add(name, adapter)
    assert bank.adapted.params is before
    bank.add("b", make(LoRA(1)))
    with pytest.raises(ValueError, match="the bank is full: 2 adapters"):
        bank.add("c", make(LoRA(1)))
    with pytest.raises(ValueError, match="no adapter 'c' in the bank; there are a, b"):
        bank.ids(["a", "c"])
    with pytest.raises(ValueError, match="w_0: there are slots 0 to 2, got 3"):
        bank.on(slot=[0, 3])
    bank.remove("a")
    with pytest.raises(ValueError, match=r"no adapter is in slot 1; there are \{'b': 2\}"):
        bank.on(slot=[0, 1])
    with pytest.raises(ValueError, match="slot= takes whole numbers"):
        bank.on(slot=0.5)
    with pytest.raises(ValueError, match=r"weights= takes numbers \[slots\].* for 3 slots; got shape \(2,\)"):
        bank.on(weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="either slot=bank.ids"):
        bank.on()
    with pytest.raises(ValueError, match="a bank does not shrink"):
        bank.grow(capacity=1)
    bank.grow(gains=True)
    with pytest.raises(ValueError, match="adapters with a gain, such as DoRA, are no sums"):
        bank.on(weights=[0.0, 0.0, 1.0])


@pytest.mark.once
def test_a_traced_slot_that_is_none_of_the_banks_gives_nan():
    params, x = {"w_0": weight(0, 8, 8)}, normal(1, 3, 8)
    bank = jlora.Bank.of(params, {"a": noisy(params, {"w_0": LoRA(2)}, 0)})
    run = jit(lambda adapted, x, ids: jlora.lift(lambda p, x: x @ p["w_0"])(adapted.on(slot=ids), x))
    # More rows than slots meet all slots at once; of fewer each gets its own factors.
    for ids in (np.array([1, 2, -1]), np.array([1, -1]), np.array([0, 2])):
        y = run(bank.adapted, x[: len(ids)], ids)
        assert np.isfinite(y[0]).all() and np.isnan(y[1:]).all()
    assert np.isnan(run(bank.adapted, x, np.array(2))).all()


def test_rows_that_own_their_slots_get_what_they_would_choose():
    """Products, turned ones, lookups and gains of a bank whose row `n` has slot `n`, and one slot for all."""
    fn, params, tokens, adapters = linen()
    bank = jlora.Bank.of(params, adapters)
    ids = bank.ids(["sql", None, "chat", "sql"])
    chosen = bank.on(slot=ids)
    sites = [replace(site, method=replace(site.method, slots=4, own=True)) for site in chosen.plan.sites]
    own = {}
    for site in sites:
        fields = paths.lookup(chosen.params, site.keys)
        axis = len(site.batch_axes)
        paths.insert(own, site.keys, {name: jnp.take(array, ids, axis) for name, array in fields.items()})
    rows = Adapted(params, own, {}, {}, Plan(tuple(sites)))
    lifted = jax.jit(jlora.lift(fn))
    close(lifted(rows, tokens), lifted(chosen, tokens))
    close(lifted(rows.on(slot=2), tokens), lifted(bank.on(slot=bank.ids("chat")), tokens))
    with pytest.raises(ValueError, match="slots for \\(4,\\) rows"):
        lifted(rows, tokens[:3])
