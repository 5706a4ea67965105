"""Preference training: rows, losses, gradients and steps are TRL's; the reference is the base, and costs no memory."""

import collections
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import models
from jlora.losses import dpo, ipo, kto, log_probabilities
from jlora.models.config import read_config
from jlora.training.commands.runs import evaluate_file, open_run
from jlora.training.data import chat
from jlora.training.data.dataset import arranged, encode, load_data
from jlora.training.data.pipeline import collate
from jlora.training.data.preferences.encode import encode_preferences
from jlora.training.data.rows import Row
from jlora.training.data.tokens import Codec
from jlora.training.errors import DataError, SettingError
from jlora.training.hosts.placement import make_mesh
from jlora.training.model.loop import State, make_evaluation, make_step, to_devices
from jlora.training.model.losses import LanguageModel
from jlora.training.model.preferences import objective_of, told
from jlora.training.reporting.metrics import read_metrics
from jlora.training.run.trainer import summarize
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN, ARRAYS = json.loads((FOLDER / "preferences.json").read_text()), np.load(FOLDER / "preferences.npz")
TARGETS = ".*/(q|v)_proj/kernel"
RATE, DECAY = 1e-2, 1e-2
# TRL counts all tokens of a row, the job those that predict another.
MAX_LENGTH = GOLDEN["max_length"] - 1
DATA = Settings(task="preference", data="pairs.jsonl")


@pytest.fixture(scope="module")
def codec():
    directory = models.STORIES260K
    return Codec(models.load_tokenizer(directory), read_config(directory), directory)


@pytest.fixture(scope="module")
def template(codec, tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(GOLDEN["template"])
    return lambda: chat.template(str(path), codec.directory, codec.tokenizer.get_vocab())


def rows(values):
    return [Row(each, "pairs.jsonl", line) for line, each in enumerate(values, 1)]


def parts(example):
    """Prompt and answer of a row."""
    start = 1 + int(np.argmax(example.weights))
    tokens = np.append(example.tokens, example.targets[-1]).tolist()
    return tokens[:start], tokens[start:]


@pytest.mark.once
@pytest.mark.parametrize("kind", ["texts", "chats"])
def test_rows_are_the_tokens_that_trl_makes_of_them(codec, template, kind):
    pairs = encode_preferences(rows(GOLDEN["rows"][kind]), codec, template, 128)
    assert len(pairs) == len(GOLDEN["tokens"][kind])
    for pair, wanted in zip(pairs, GOLDEN["tokens"][kind]):
        assert parts(pair.first) == (wanted["prompt_ids"], wanted["chosen_ids"])
        assert parts(pair.second) == (wanted["prompt_ids"], wanted["rejected_ids"])


def settings_of(name):
    options = GOLDEN["losses"][name]
    loss = "dpo" if name == "robust" else name
    given = {"preference_loss": loss, "beta": options["beta"], "label_smoothing": options.get("label_smoothing")}
    return resolve(dataclasses.replace(DATA, max_length=MAX_LENGTH, **given))


def batch_of(codec, name):
    settings = settings_of(name)
    examples = encode(
        rows(GOLDEN["rows"]["judged" if name == "kto" else "pairs"]), settings, codec, [], collections.Counter()
    )
    return collate(arranged(examples, settings), MAX_LENGTH)


@pytest.fixture(scope="module")
def subject():
    model, params = models.load(models.STORIES260K)
    batch = {n: jax.ShapeDtypeStruct((2, 8), jnp.int32) for n in ("tokens", "positions", "segment_ids")}
    forward = LanguageModel(model)
    return forward, params, jlora.sites(forward, params, batch)


def factors(name, part):
    found = {"layers": {"self_attn": {}}}
    for module in ("q_proj", "v_proj"):
        fields = {field: jnp.asarray(ARRAYS[f"{name}/{part}/{module}/{field}"]) for field in "ab"}
        found["layers"]["self_attn"][module] = {"kernel": fields}
    return found


def started(subject, name):
    _, params, sites = subject
    adapted = jlora.adapterize(params, {TARGETS: jlora.LoRA(rank=2, alpha=4)}, sites=sites)
    start = factors(name, "start")
    assert jax.tree.structure(start) == jax.tree.structure(adapted.params)
    return adapted.replace(params=start)


def close(found, wanted, tolerance):
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale), found, wanted)


def keeping_gradients():
    """Passes gradients on, and keeps the last ones."""
    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, state, p=None: (g, g))


@pytest.mark.once
@pytest.mark.parametrize("name", ["dpo", "robust", "ipo", "kto"])
def test_losses_gradients_metrics_and_three_steps_are_those_of_trl(codec, subject, name):
    forward, settings, adapted = subject[0], settings_of(name), started(subject, name)
    batch = to_devices(batch_of(codec, name), make_mesh({}), 1)
    tx = optax.chain(keeping_gradients(), optax.adamw(RATE, weight_decay=DECAY))
    step = make_step(forward, tx, objective=objective_of(settings, forward))
    params = jax.tree.map(jnp.copy, adapted.params)
    state, losses = State(params, tx.init(params), jnp.zeros((), jnp.int32), jax.random.key(0)), []
    for number in range(3):
        state, result = step(state, adapted, batch)
        losses.append(float(result.loss))
        if number == 0:
            check_metrics(name, told(jax.device_get(result.more)))
            close(state.opt_state[0], factors(name, "gradient"), 2e-4)
    np.testing.assert_allclose(losses, ARRAYS[f"{name}/losses"], rtol=2e-4)
    close(state.params, factors(name, "end"), 2e-3)


def check_metrics(name, found):
    names = {"rewards/chosen": "rewards/chosen", "rewards/rejected": "rewards/rejected", "rewards/margins": "margin"}
    for theirs, ours in names.items():
        assert found[ours] == pytest.approx(float(ARRAYS[f"{name}/metrics/{theirs}"]), rel=2e-4, abs=1e-5)
    if name == "kto":
        assert found["kl"] == pytest.approx(float(ARRAYS["kto/metrics/kl"]), rel=2e-4) and found["kl"] > 0


@pytest.fixture(scope="module")
def small():
    """A function of one product and a table, with three pairs, the last of which is padding."""
    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.standard_normal((9, 6)), jnp.float32),
              "head": {"kernel": jnp.asarray(rng.standard_normal((6, 9)), jnp.float32)}}  # fmt: skip
    batch = {name: rng.integers(0, 9, (3, 2, 5), np.int32) for name in ("tokens", "targets")}
    batch["mask"] = (rng.random((3, 2, 5)) < 0.6).astype(np.float32)
    batch |= {"weights": np.array([1, 1, 0], np.float32), "desirable": np.array([1, 0, 1], np.int32)}
    batch |= {"positions": batch["tokens"], "segment_ids": batch["tokens"]}
    adapted = jlora.adapterize(params, {"head/kernel": jlora.LoRA(rank=2, alpha=2)})
    b = -jnp.asarray(rng.standard_normal((2, 9)), jnp.float32)  # so that the divergence is not the 0 it is clamped to
    moved = jax.tree.map(lambda leaf: b if leaf.shape == b.shape else leaf, adapted.params)

    def forward(params, rows):
        return jnp.tanh(params["table"][rows["tokens"]]) @ params["head"]["kernel"]

    return forward, adapted.replace(params=moved), batch


def by_hand(small, adapters=True):
    """Log probabilities of the answers `[pairs, 2]`, in float64."""
    _, adapted, batch = small
    kernel = np.float64(adapted.base["head"]["kernel"])
    fields = adapted.params["head"]["kernel"]
    kernel = kernel + adapters * (np.float64(fields["a"]) @ np.float64(fields["b"]))
    logits = np.tanh(np.float64(adapted.base["table"])[batch["tokens"]]) @ kernel
    log_p = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    return np.sum(np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0] * batch["mask"], -1)


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_each_loss_is_its_formula_and_padding_weighs_nothing(small, loss):
    forward, adapted, batch = small
    epsilon = 0.2 if loss == "dpo" else None
    settings = resolve(dataclasses.replace(DATA, preference_loss=loss, beta=0.5, label_smoothing=epsilon))
    found = jax.jit(lambda a, b: objective_of(settings, forward)(jlora.lift(forward), a, b))(adapted, batch)
    ratios = by_hand(small) - by_hand(small, adapters=False)
    h, tokens = 0.5 * (ratios[:, 0] - ratios[:, 1]), batch["mask"].sum(-1)
    z = ratios[:2, 1].mean()
    assert z > 0.1
    wanted = {
        "dpo": (0.2 * log_sigmoid(-h) - 0.8 * log_sigmoid(h)) / 0.6,
        "ipo": (ratios[:, 0] / tokens[:, 0] - ratios[:, 1] / tokens[:, 1] - 1) ** 2,
        "kto": 1 - 1 / (1 + np.exp(-0.5 * np.array([1, -1, 1]) * (ratios[:, 0] - z))),
    }[loss]
    assert float(found.loss) == pytest.approx(wanted[:2].sum(), rel=1e-5) and float(found.weight) == 2
    values = told(found.more)
    if loss == "kto":
        assert values["rewards/chosen"] == pytest.approx(0.5 * ratios[0, 0], rel=1e-4)
        assert values["rewards/rejected"] == pytest.approx(0.5 * ratios[1, 0], rel=1e-4)
    else:
        assert values["margin"] == pytest.approx(h[:2].mean(), rel=1e-4)
        assert values["accuracy"] == pytest.approx((h[:2] > 0).mean())


def test_the_reference_is_one_pass_of_the_base_and_keeps_nothing(small):
    """The products of the pass without adapters are those of the plain function, and the backward pass has none of it."""
    forward, adapted, batch = small

    def products(fn, *given):
        return str(jax.make_jaxpr(fn)(*given)).count("dot_general")

    objective, lifted = objective_of(resolve(DATA), forward), jlora.lift(forward)
    flat = {name: x.reshape(6, 5) for name, x in batch.items() if x.ndim == 3}

    def policy(params):
        rows = lifted(adapted.replace(params=params), flat)
        return log_probabilities(rows, flat["targets"], flat["mask"]).sum()

    def loss(params):
        return objective(lifted, adapted.replace(params=params), batch).loss

    assert products(forward, adapted.base, flat) == 1
    assert products(loss, adapted.params) == products(policy, adapted.params) + 1
    assert products(jax.grad(loss), adapted.params) == products(jax.grad(policy), adapted.params) + 1


def test_before_the_first_step_the_model_is_its_reference(small):
    forward, adapted, batch = small
    start = jlora.adapterize(adapted.base, {"head/kernel": jlora.LoRA(rank=2)})
    found = make_evaluation(forward, objective=objective_of(resolve(DATA), forward))(start, [batch])
    values = summarize(found, classify=False)
    assert values["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert values["accuracy"] == 0.5 and values["margin"] == 0


def write(path, values):
    path.write_text("".join(json.dumps(each) + "\n" for each in values))
    return str(path)


@pytest.mark.long
def test_a_job_learns_to_prefer_and_goes_on_after_a_stop(tmp_path, stopped_and_resumed):
    turns = lambda text: [{"role": "assistant", "content": text}]
    asked = [(who, what) for who in ("Tom", "Sue") for what in ("dog", "cat", "sun")]
    values = [{"prompt": [{"role": "user", "content": f"{who} saw a {what}."}], "chosen": turns(f"{who} ran."),
               "rejected": turns(f"The {what} is red.")} for who, what in asked]  # fmt: skip
    data = write(tmp_path / "pairs.jsonl", values)
    settings = Settings(task="preference", data=data, validation=data, steps=4, batch=3, learning_rate=5e-3,
                        max_length=48, rank=2, targets=TARGETS, checkpoint_every=2, evaluate_every=4, sample_tokens=0,
                        progress="none")  # fmt: skip
    result = stopped_and_resumed(settings, at=2)
    assert result.before["loss"] == pytest.approx(np.log(2), abs=1e-3) and result.after["loss"] < 0.6
    assert result.after["accuracy"] == 1 and result.after["margin"] > 0.1 and result.complaint is None
    records = [record for record in read_metrics(result.out / "metrics.jsonl") if record["kind"] == "train"]
    assert len(records) == 4 and {"rewards/chosen", "rewards/rejected", "margin", "accuracy"} <= set(records[-1])
    page = (result.out / "report.html").read_text()
    assert "validation rewards/chosen, before → after" in page and "validation margin, before" in page
    again = evaluate_file(open_run(result.out), data, say=lambda text: None)
    assert again["loss"] == pytest.approx(result.after["loss"], rel=1e-3)
    assert evaluate_file(open_run(result.out), data, base=True)["margin"] == 0


@pytest.mark.once
def test_prompts_may_be_given_in_several_ways(codec, template):
    said = [{"role": "user", "content": "Hi"}]
    answer = lambda text: [{"role": "assistant", "content": text}]
    same = [
        {"prompt": said, "chosen": answer("Yes."), "rejected": answer("No.")},
        {"prompt": "Hi", "chosen": said + answer("Yes."), "rejected": said + answer("No.")},
        {"prompt": "Hi", "chosen": answer("Yes."), "rejected": answer("No.")},
        {"prompt": said, "chosen": "Yes.", "rejected": "No."},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ]
    pairs = encode_preferences(rows(same), codec, template, 64)
    assert len(pairs) == 5
    for pair in pairs[1:]:
        np.testing.assert_array_equal(pair.first.tokens, pairs[0].first.tokens)
        np.testing.assert_array_equal(pair.second.weights, pairs[0].second.weights)


@pytest.mark.once
@pytest.mark.parametrize(
    ("values", "judged_by", "message"),
    [
        ({"text": "a"}, None, r"pairs.jsonl:1: there is no 'chosen'; the row has 'text'; --task preference reads rows"),
        ({"prompt": "a", "completion": "b", "label": True}, None, "rows with a label are for --preference-loss kto"),
        ({"chosen": "yes", "rejected": "no"}, None, "there is no 'prompt'; .* don't begin with the same prompt either"),
        ({"chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}, None, "there is no prompt"),
        ({"prompt": "a", "completion": "b"}, "label", "there is no 'label'"),
        (
            {"prompt": "a", "completion": "b", "label": 2},
            "label",
            "'label' must be true or false .*, got 2; of a score say",
        ),
        (
            {"prompt": "a", "completion": "b", "label": 0.7},
            "label",
            "must be true or false .or 1 or 0., .*, got 0.7; of a",
        ),
        ({"prompt": "a", "completion": "b", "label": float("nan")}, "label", "must be true or false .*, got nan"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "label", "must be true or false .*, got 'good'$"),
    ],
)
def test_rows_that_are_no_preferences_are_named(codec, template, values, judged_by, message):
    with pytest.raises(DataError, match=message):
        encode_preferences(rows([values]), codec, template, 64, judged_by)


@pytest.mark.once
def test_what_teaches_nothing_is_left_out_and_counted(codec, template):
    values = [
        {"prompt": "One", "chosen": " two", "rejected": " two"},
        {"prompt": "One", "chosen": " ", "rejected": " two"},
        {"prompt": "One " * 80, "chosen": "two", "rejected": "three"},
        {"prompt": "One", "chosen": " two" * 80, "rejected": " three"},
    ]
    for drop, kept in ((False, 1), (True, 0)):
        counts = collections.Counter()
        pairs = encode_preferences(rows(values), codec, template, 32, drop=drop, counts=counts)
        assert len(pairs) == kept and all(pair.cut for pair in pairs)
        assert counts == {"same": 1, "empty": 1, **({"dropped": 2} if drop else {"answerless": 1})}


@pytest.mark.once
def test_a_label_is_yes_or_no_in_any_form_that_says_one(codec, template):
    for value, wanted in ((True, 1), (False, 0), (1, 1), (0, 0), (1.0, 1), (0.0, 0), ("True", 1), ("0", 0), ("1.0", 1)):
        row = rows([{"prompt": "Tom", "completion": " ran.", "label": value}])
        assert encode_preferences(row, codec, template, 64, judged_by="label")[0].desirable == wanted


@pytest.mark.once
def test_answers_to_one_prompt_alone_are_told_of(tmp_path, codec):
    for prompts, parts in (("a", ["to train on", "to validate"]), ("ab", [])):
        data = tmp_path / f"{prompts}.jsonl"
        values = (
            {"prompt": prompts[n % len(prompts)], "completion": f" {n} dogs", "label": n % 3 > 0} for n in range(40)
        )
        data.write_text("".join(json.dumps(each) + "\n" for each in values))
        settings = resolve(dataclasses.replace(DATA, data=str(data), preference_loss="kto", validation_fraction=0.5))
        notes = load_data(settings, codec).notes
        assert [note.partition(" have the same prompt: ")[0] for note in notes] == [
            f"all rows {part}" for part in parts
        ]


@pytest.mark.once
def test_an_answer_by_itself_stands_beside_that_of_another_prompt(codec):
    settings = resolve(dataclasses.replace(DATA, preference_loss="kto"))
    given = [
        {"prompt": "Tom", "chosen": " ran", "rejected": " sat"},
        {"prompt": "Sue", "completion": " ate", "label": "0"},
    ]
    pairs = arranged(encode(rows(given), settings, codec, [], collections.Counter()), settings)
    assert [pair.desirable for pair in pairs] == [1, 0, 0]
    read = [[codec.decode(np.append(side.tokens, side.targets[-1])) for side in (p.first, p.second)] for p in pairs]
    # The second row has the answer of the last other prompt: that of Tom's own other answer would be none.
    assert read == [["Tom ran", "Tom ate"], ["Tom sat", "Tom ate"], ["Sue ate", "Sue sat"]]


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "lm"}, "beta is for --task preference"),
        ({"preference_loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is for --preference-loss dpo, not ipo"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, got 0.5"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"packing": True}, "packing is for --task lm; rows of --task preference are never packed"),
        ({"long_rows": "split"}, "split is for --task lm"),
        ({"data": None}, "task preference needs a data file with answers that are better and worse"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        Settings(**{"task": "preference", "data": "pairs.jsonl", "beta": 0.2, **changes})


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dpo(x, x, x, x[:1]), "wanted log probabilities .*all of one shape"),
        (lambda x: dpo(x, x, x, x, beta=0), "beta must be above 0, got 0"),
        (lambda x: dpo(x, x, x, x, label_smoothing=0.5), "label_smoothing must be at least 0 and below 0.5"),
        (lambda x: ipo(x[None], x[None], x[None], x[None], lengths=(x, x)), "wanted log probabilities"),
        (lambda x: kto(x, x, x[:1] > 0, 0.0), "desirable has shape"),
        (lambda x: log_probabilities(jnp.ones((2, 3, 4)), jnp.ones((2, 2), int), jnp.ones((2, 3))), "wanted logits"),
    ],
)
def test_the_losses_refuse_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros(2))
