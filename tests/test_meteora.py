"""MeteoRA: training steps of the authors' formulas, three ways of one product, and what tokens that choose must agree with."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import adapt, close, jit, layers, normal, perturbed, weight
from descent import descend
from models_data import quick_jit

import jlora
from jlora import Axes, LoRA, models
from jlora.compose.mixtures.meteora import MeteoRA
from jlora.core.products import of_tokens

GOLDEN = np.load(Path(__file__).parent / "golden" / "meteora.npz")
NAMES, RANKS, SCALES = ("sql", "chat", "code"), (2, 3, 1), (2.0, 0.5, 3.0)
STACK = {"w_0": weight(0, 2, 8, 8)}


def golden(case, part):
    return {name.removeprefix(f"{case}/{part}/"): GOLDEN[name] for name in GOLDEN if name.startswith(f"{case}/{part}/")}


def network(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def fields_of(tensors):
    """Fields by layer; the factors of smaller ranks with zeros beside them."""
    found = {}
    for name in sorted(tensors):
        layer, field = name.split("/")
        if field[0] in "ab" and field[1:].isdigit():
            axis, size = (1, 3) if field[0] == "a" else (0, 3)
            room = [(0, size - tensors[name].shape[axis] if n == axis else 0) for n in range(2)]
            found.setdefault(layer, {}).setdefault(field[0], []).append(np.pad(tensors[name], room))
        elif field == "gate":
            found.setdefault(layer, {})[field] = tensors[name]
    return {
        layer: {name: np.stack(x) if isinstance(x, list) else x for name, x in fields.items()}
        for layer, fields in found.items()
    }


def mixture_of(case, k, tau, train_adapters):
    """The mixture of the three adapters, the gates as the golden run begins."""
    before = golden(case, "before")
    base = {layer: jnp.asarray(before[f"{layer}/w"], jnp.float32) for layer in ("up", "down")}
    adapters = {}
    for slot, (name, rank, scale) in enumerate(zip(NAMES, RANKS, SCALES, strict=True)):
        adapted = jlora.adapterize(base, {".*": LoRA(rank, alpha=rank * scale)})
        factors = {layer: {field: before[f"{layer}/{field}{slot}"] for field in "ab"} for layer in base}
        adapters[name] = adapted.replace(params=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), factors))
    mixture = jlora.meteora(base, adapters, k, tau=tau, train_adapters=train_adapters)
    gates = {layer: {"gate": jnp.asarray(before[f"{layer}/gate"], jnp.float32)} for layer in base}
    return mixture.replace(params={layer: {**mixture.params[layer], **gates[layer]} for layer in base})


@pytest.mark.once
@pytest.mark.parametrize(
    ("case", "k", "tau", "train_adapters", "beta"),
    [("gates", 2, 3.0, False, 50.0), ("all", 2, 1.0, True, 0.5), ("one", 1, 1.0, False, 50.0)],
)
def test_outputs_gradients_and_ten_steps_are_those_of_the_authors_formulas(case, k, tau, train_adapters, beta):
    adapted = mixture_of(case, k, tau, train_adapters)
    x, labels = (jnp.asarray(GOLDEN[f"{case}/{name}"]) for name in ("x", "labels"))
    x, labels = x.astype(jnp.float32), labels.astype(jnp.int32)
    lifted = jlora.lift(network, strict=True, aux=True)

    def loss(outputs):
        y, said = outputs
        return jnp.sum(jnp.sin(y)) + beta * jlora.losses.gate_cross_entropy(said, labels)

    outputs, losses, gradients, after = descend(
        lambda params: lifted(adapted.replace(params=params), x), adapted.params, optax.adam(0.02), 10, loss
    )
    (y, said), gradient = jax.tree.map(lambda leaf: leaf[0], (outputs, gradients))
    near = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    near(y, GOLDEN[f"{case}/y"])
    near(losses, GOLDEN[f"{case}/losses"])
    for layer in ("up", "down"):
        near(said[layer]["gate_logits"], GOLDEN[f"{case}/said/{layer}"])
    jax.tree.map(near, gradient, fields_of(golden(case, "gradient")))
    jax.tree.map(near, after, fields_of(golden(case, "after")))


def test_three_ways_give_one_result_and_gradients_alone_and_under_vmap():
    x, a, b = normal(0, 2, 150, 6), normal(1, 5, 6, 3), normal(2, 5, 3, 4)
    logits = normal(3, 2, 150, 5)
    amounts, chosen = jax.lax.top_k(logits, 2)

    def by_hand(x, a, b, amounts):
        each = jnp.einsum("nti,sir,sro->ntso", x, a, b)
        picked = jnp.take_along_axis(each, chosen[..., None], axis=2)
        return jnp.sum(picked * amounts[..., None], axis=2)

    def mapped(way):
        return lambda x, a, b, amounts: jax.vmap(way, in_axes=(0, None, None, 0, 0))(x, a, b, chosen, amounts)

    def in_one(way):
        flat = lambda x: x.reshape(-1, x.shape[-1])
        return lambda x, a, b, amounts: way(flat(x), a, b, flat(chosen), flat(amounts)).reshape(*x.shape[:2], -1)

    ways = [of_tokens.wide, of_tokens.gathered, of_tokens.by_blocks]

    @jit
    def everything(*args):
        each = [by_hand, *map(mapped, ways), *map(in_one, ways)]
        return [(fn(*args), jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), (0, 1, 2, 3))(*args)) for fn in each]

    wanted, *found = everything(x, a, b, amounts)
    for each in found:
        close(each, wanted)


def test_the_way_is_chosen_by_shapes():
    chosen = lambda tokens, slots, rank=8: of_tokens.way(tokens, 2, (slots, 512, rank), 512).__name__
    assert chosen(1, 4) == chosen(14, 28) == "gathered", "no more choices than slots"
    assert chosen(15, 28) == chosen(4096, 28) == "wide", "all slots are less than the base's product"
    assert chosen(4096, 64) == "by_blocks"
    assert chosen(130, 64) == "wide", "blocks of so few tokens would be empty for the most part"


def adapters_of(params, *ranks):
    spec = lambda rank: {"w_0": LoRA(rank) if params["w_0"].ndim == 2 else Axes("batch in out", LoRA(rank))}
    return {name: perturbed(adapt(params, spec(rank)), rank, 0.3) for name, rank in zip(NAMES, ranks, strict=False)}


def test_choices_of_tokens_are_those_of_a_bank_by_token():
    params, x = {"w_0": weight(0, 8, 8)}, normal(1, 3, 5, 8)
    adapters = adapters_of(params, 2, 3, 1)
    bank = jlora.Bank.of(params, adapters)
    one, two = (jlora.meteora(params, each, k, tau=0.5) for each, k in ((adapters, 1), (bank, 2)))
    single = jlora.meteora(params, {"sql": adapters["sql"]}, k=1)

    @jit
    def everything(one, two, slots, single, sql, x):
        lifted = lambda adapted: jlora.lift(lambda params, x: x @ params["w_0"], aux=True)(adapted, x)
        (y_1, said), (y_2, said_2) = lifted(one), lifted(two)
        slot = 1 + jnp.argmax(said["w_0"]["gate_logits"], axis=-1)
        logits = said_2["w_0"]["gate_logits"]
        least = jnp.argmin(logits, axis=-1)[..., None]
        amounts = jax.nn.softmax(jnp.where(jnp.arange(3) == least, -jnp.inf, logits / 0.5))
        weights = jnp.concatenate([jnp.zeros_like(amounts[..., :1]), amounts], axis=-1)
        by_bank = [lifted(slots.on(**told))[0] for told in ({"slot": slot}, {"weights": weights})]
        return [y_1, y_2, lifted(single)[0]], [*by_bank, lifted(sql)[0]], slot

    found, wanted, slot = everything(one, two, bank.adapted, single, adapters["sql"], x)
    close(found, wanted)
    assert np.unique(slot).size > 1


def unrolled(params, x):
    for w in params["w_0"]:
        x = jnp.tanh(x @ w)
    return x


def test_logits_come_through_scan_remat_and_vmap_and_train_the_gates_where_one_choice_alone_does_not():
    x, labels = normal(1, 3, 5, 8), jnp.array([[0, 1, 1, 0, 1]] * 3)
    adapted = jlora.meteora(STACK, adapters_of(STACK, 2, 3), k=1, train_adapters=True)
    run = lambda fn, adapted, x: jlora.lift(fn, aux=True)(adapted, x)

    def loss(params, beta):
        y, said = run(layers, adapted.replace(params=params), x)
        return jnp.sum(y**2) + beta * jlora.losses.gate_cross_entropy(said, labels)

    @jit
    def everything(adapted, x):
        rows = jax.vmap(lambda row: run(layers, adapted, row))(x)
        return (
            run(layers, adapted, x),
            run(unrolled, adapted, x),
            rows,
            jax.vmap(jax.grad(loss), (None, 0))(adapted.params, jnp.array([0.0, 2.0])),
        )

    scanned, loose, rows, gradients = everything(adapted, x)
    assert scanned[1]["w_0"]["gate_logits"].shape == (2, 3, 5, 2)
    close(loose, scanned)
    close(rows, (scanned[0], {"w_0": {"gate_logits": jnp.moveaxis(scanned[1]["w_0"]["gate_logits"], 1, 0)}}))
    gate = gradients["w_0"]["gate"]
    assert np.all(gate[0] == 0) and np.all(np.any(gate[1] != 0, axis=(1, 2)))
    assert all(np.all(np.any(leaf != 0, axis=(2, 3, 4))) for name, leaf in gradients["w_0"].items() if name != "gate")


@pytest.mark.once
def test_the_loss_of_gates_leaves_out_what_asks_nothing_and_gives_nan_for_what_is_no_slot():
    logits = normal(0, 2, 3, 4, 5)
    said = {"a": {"kernel": {"gate_logits": logits, "other": logits}}, "b": {"gate_logits": logits[0, :, :, :3]}}
    labels = np.array([[0, 1, 2, 2], [-100, -100, 1, -100], [2, -100, -100, -100]])
    each = [-jax.nn.log_softmax(x) for x in (logits[0], logits[1], logits[0, :, :, :3])]
    wanted = [gate[row, at - 1, labels[row, at]] for gate in each for row, at in ((0, 1), (0, 2), (0, 3), (1, 2))]
    loss = jlora.losses.gate_cross_entropy
    close(loss(said, jnp.asarray(labels)), np.mean(wanted))
    unshifted = [gate[row, at, labels[row, at]] for gate in each for row, at in zip(*np.nonzero(labels >= 0))]
    close(loss(said, jnp.asarray(labels), shift=False), np.mean(unshifted))
    assert loss(said, jnp.full((3, 4), -100)) == 0
    for wrong in (3, -1):
        assert np.isnan(loss(said, jnp.full((3, 4), wrong)))


@pytest.mark.once
def test_what_is_saved_goes_on_as_it_was_and_names_its_adapters(tmp_path):
    adapters, x = adapters_of(STACK, 2, 3), normal(1, 3, 5, 8)
    for name, adapted in adapters.items():
        jlora.save(tmp_path / name, adapted)
    folders = {name: tmp_path / name for name in adapters}
    started = [jlora.meteora(STACK, each, key=jax.random.key(5)) for each in (adapters, folders)]
    jax.tree.map(np.testing.assert_array_equal, *started)
    adapted = started[0]
    tx = jlora.optimizer(adapted, optax.adam, learning_rate=0.1)

    @jit
    def step(adapted, state):
        loss = lambda params: jnp.sum(jlora.lift(layers)(adapted.replace(params=params), x) ** 2)
        updates, state = tx.update(jax.grad(loss)(adapted.params), state, adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state

    once, state = step(adapted, tx.init(adapted.params))
    jlora.save(tmp_path / "mixture", once)
    loaded = jlora.load(tmp_path / "mixture", STACK)
    assert loaded.plan == once.plan and loaded.plan.sites[0].method.names == ("sql", "chat")
    jax.tree.map(np.testing.assert_array_equal, step(loaded, state), step(once, state))
    assert np.all(loaded.params["w_0"]["gate"] != adapted.params["w_0"]["gate"])


@pytest.mark.long
def test_texts_written_with_a_cache_are_those_that_are_read_whole():
    model, params = models.load(models.STORIES260K)
    tokens = jnp.array([[1, 410, 403, 407], [1, 411, 288, 262]])
    sites = jlora.sites(lambda p, t: model.apply({"params": p}, t), params, tokens)
    spec = {jlora.ALL_LINEAR: LoRA(2)}
    adapters = {name: perturbed(adapt(params, spec, sites=sites), n, 0.1) for n, name in enumerate(NAMES)}
    adapted = jlora.meteora(params, adapters, key=jax.random.key(1))
    apply = jlora.lift(model.apply)
    written = models.generate(apply, adapted, tokens.tolist(), max_new_tokens=4)
    whole = quick_jit(apply)({"params": adapted}, jnp.concatenate([tokens, jnp.array(written)], axis=1))
    assert np.array_equal(jnp.argmax(whole[:, 3:-1], axis=-1), written)


@pytest.mark.once
@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda base, x: jlora.meteora(base, {}), "give at least one"),
        (
            lambda base, x: jlora.meteora(base, adapters_of(base, 2), k=2),
            "k must be at most the number of adapters, 1, got 2",
        ),
        (
            lambda base, x: jlora.meteora(base, adapters_of(base, 2), k=1, tau=0),
            "tau must be positive and finite, got 0",
        ),
        (
            lambda base, x: jlora.meteora(base, {"dora": adapt(base, {"w_0": jlora.DoRA(LoRA(2))})}, k=1),
            "w_0: an adapter has a gain there, as DoRA has",
        ),
        (
            lambda base, x: jlora.meteora(base, {"hira": adapt(base, {"w_0": jlora.HiRA(2)})}, k=1),
            r"w_0: HiRA\(rank=2\) is no low-rank change",
        ),
        (
            lambda base, x: jlora.meteora({"w_0": base["w_0"] + 1}, jlora.Bank.of(base, adapters_of(base, 2)), k=1),
            "w_0: .*base",
        ),
        (lambda base, x: jlora.merge(jlora.meteora(base, adapters_of(base, 2), k=1)), "w_0 can't be merged: MeteoRA"),
        (
            lambda base, x: jlora.lift(lambda p, x: x @ p["w_0"], plan="merged")(
                jlora.meteora(base, adapters_of(base, 2), k=1), x
            ),
            "w_0: the plan 'merged' has one weight for all tokens",
        ),
        (lambda base, x: jlora.losses.gate_cross_entropy({}, jnp.zeros((3, 5), jnp.int32)), "no gate said its logits"),
        (
            lambda base, x: jlora.losses.gate_cross_entropy({"w": {"gate_logits": x}}, jnp.zeros((3, 4), jnp.int32)),
            r"w: its gate's logits have the shape \(3, 5, 8\), and the labels \(3, 4\)",
        ),
        (lambda base, x: MeteoRA(("a", "a")), "names must be one for each adapter"),
    ],
)
def test_what_has_no_answer_is_refused(use, words):
    with pytest.raises(ValueError, match=words):
        use({"w_0": weight(0, 8, 8)}, normal(1, 3, 5, 8))
