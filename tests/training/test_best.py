"""Validations judged by a metric: which is the best one, when a run stops early, and with whose adapters it ends."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from little_data import sentences

from jlora.training.data.encode import Example
from jlora.training.data.packing import join
from jlora.training.errors import CheckpointError, SettingError
from jlora.training.job import finetune
from jlora.training.model.answers import exact_match, make_written, questions, rouge_l
from jlora.training.model.scores import f1, matthews
from jlora.training.reporting.metrics import Metrics, read_metrics
from jlora.training.reporting.shown import of_rows
from jlora.training.reporting.verdict import overfitting
from jlora.training.run.best import best_of, waited
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once


def validations(*losses):
    return [{"step": 5 * n, "loss": loss, "f1": -loss} for n, loss in enumerate(losses)]


def test_the_best_validation_is_the_first_of_equal_ones_after_a_step():
    found = validations(1.0, 3.0, 2.0, 2.0, 2.5)
    assert best_of(found, "loss")["step"] == best_of(found, "f1")["step"] == 10
    assert best_of(found[:1], "loss") is None
    assert [waited(found[:n], "loss") for n in range(1, 6)] == [0, 0, 0, 1, 2]


def test_f1_is_that_of_the_second_of_two_labels_and_the_mean_of_more():
    assert f1(np.array([[5, 2], [1, 3]])) == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    three = np.array([[2, 0, 1], [1, 3, 0], [0, 0, 0]])
    assert f1(three) == pytest.approx((2 * 2 / 6 + 2 * 3 / 7 + 0) / 3)
    assert f1(np.array([[4, 0], [0, 0]])) == 0.0


def test_matthews_is_the_correlation_of_labels_and_predictions():
    confusion = np.array([[5, 2], [1, 3]])
    rows = np.array([(true, found) for true in (0, 1) for found in (0, 1) for _ in range(confusion[true, found])])
    assert matthews(confusion) == pytest.approx(np.corrcoef(rows.T)[0, 1])
    assert matthews(np.array([[5, 0], [3, 0]])) == 0.0
    assert matthews(np.diag([3, 4, 5])) == pytest.approx(1.0)


def example(tokens, learned):
    none = np.zeros(0, np.int32)
    tokens = np.array(tokens, np.int32)
    weights = np.array(learned, np.float32)[1:]
    return Example(tokens[:-1], tokens[1:], weights, none, -1, np.ones(len(tokens) - 1, np.int32))


def test_a_question_is_what_stands_before_the_last_answer_of_each_packed_row():
    chat = example([1, 7, 8, 9, 5, 6, 2], [0, 0, 1, 0, 0, 1, 1])
    text = example([1, 4, 4, 2], [0, 1, 1, 1])
    prompt = example([1, 3, 8, 2], [0, 0, 1, 1])
    found = list(questions([join([chat, text, prompt])], begin=1))
    assert found == [([1, 7, 8, 9, 5], [6, 2]), ([1, 3], [8, 2])]
    assert list(questions([text], begin=None)) == []
    assert list(questions([example([3, 8, 2], [0, 1, 1])], begin=1)) == []


def test_answers_are_compared_to_the_letter():
    assert exact_match(["a b", "c"], ["a b", "C"]) == 0.5


def test_rouge_l_is_that_of_its_package(monkeypatch):
    if importlib.util.find_spec("rouge_score") is None:
        # What is used of it, with what it gives for these texts.
        known = {("the cat", "the cat sat"): 0.8, ("b", "a"): 0.0}
        scorer = SimpleNamespace(
            score=lambda target, prediction: {"rougeL": SimpleNamespace(fmeasure=known[target, prediction])}
        )
        module = SimpleNamespace(RougeScorer=lambda kinds: scorer)
        monkeypatch.setitem(sys.modules, "rouge_score", SimpleNamespace(rouge_scorer=module))
        monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", module)
    # Of "the cat sat" and "the cat": precision 2/3, recall 1.
    assert rouge_l(["the cat sat", "a"], ["the cat", "b"]) == pytest.approx((2 * (2 / 3) / (2 / 3 + 1)) / 2)


def test_a_metric_of_answers_without_answers_is_refused():
    data = SimpleNamespace(validation=[example([1, 4, 4, 2], [0, 1, 1, 1])])
    subject = SimpleNamespace(codec=SimpleNamespace(begin=1, end=2))
    with pytest.raises(SettingError, match="no row of the validation has a prompt and an answer"):
        make_written(subject, data, Settings(metric="exact_match"))


def test_metrics_belong_to_tasks_and_turn_the_best_checkpoint_on():
    with pytest.raises(SettingError, match="metric accuracy is not one of task lm, which has loss, perplexity"):
        Settings(metric="accuracy")
    given = {}, {"patience": 2}, {"metric": "perplexity"}, {"patience": 2, "best": False}
    assert [resolve(Settings(**each)).best for each in given] == [False, True, True, False]


def test_the_worst_rows_are_those_of_the_largest_loss():
    given = np.array([0.1, 2.0, 0.5]), np.array([0, 0, 1]), np.array([0, 1, 1])
    confusion, worst = of_rows(*given, ["no", "yes"], ["a", "b", "c"].__getitem__)
    assert confusion.tolist() == [[1, 0], [1, 1]]
    assert [(row.text, row.label, row.predicted) for row in worst] == [
        ("b", "yes", "no"),
        ("c", "yes", "yes"),
        ("a", "no", "no"),
    ]


def test_overfitting_is_noted_where_the_training_loss_fell_on():
    def run(train, *losses):
        found = {
            "train": [{"step": n, "loss": loss} for n, loss in enumerate(train, 1)],
            "validation": [{**each, "weight": 1e4} for each in validations(*losses)],
        }
        return overfitting(SimpleNamespace(of=found.__getitem__), Settings(learning_rate=1.0))

    falling = [4.0 - 0.2 * n for n in range(15)]
    assert "was best at step 5 (3.0000) and rose to 3.5000 at step 15" in run(falling, 4.0, 3.0, 3.2, 3.5)
    assert run(falling, 4.0, 3.0, 2.9, 2.91) is None
    assert run([4.0 + 0.1 * n for n in range(15)], 4.0, 3.0, 3.2, 3.5) is None


#: What validations are made to say, since no rate makes losses rise at the same step on every release of JAX.
LOSSES = {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 3.2, 10: 3.1}


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """A run whose validation after four steps is its best: it stops early."""
    folder, write = tmp_path_factory.mktemp("early"), Metrics.write

    def made(self, step, kind, **values):
        write(self, step, kind, **(values | ({"loss": LOSSES[step]} if kind == "validation" else {})))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "write", made)
        yield from run_of(folder)


def run_of(folder):
    settings = Settings(
        data=sentences(folder),
        out=str(folder / "run"),
        steps=40,
        batch=8,
        max_length=16,
        rank=2,
        targets=".*/(q|v)_proj/kernel",
        learning_rate=1e-2,
        max_validation_rows=1,
        checkpoint_every=3,
        evaluate_every=2,
        patience=3,
        keep=1,
        sample_tokens=0,
        progress="none",
    )
    seen = []
    yield settings, finetune(settings, lambda text: None, seen.append), seen


def test_a_run_stops_early_and_ends_with_the_adapters_of_the_best_validation(early):
    settings, result, seen = early
    records = read_metrics(result.out / "metrics.jsonl")
    assert seen == records
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "validation" and record["step"]}
    best, last = 4, 10
    assert max(losses) == last and len([step for step in losses if step > best]) == settings.patience
    assert result.record["best_step"] == result.record["step"] == best < last
    assert result.after["loss"] == losses[best]
    # The best checkpoint is kept beside the last one.
    assert {int(path.name) for path in (result.out / "checkpoints").iterdir()} == {best, last}
    kept = ocp.StandardCheckpointer().restore(result.out.resolve() / "checkpoints" / str(best) / "state")["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(result.adapted.params):
        np.testing.assert_array_equal(leaf, kept[jax.tree_util.keystr(path, simple=True, separator=".")])
    page = (result.out / "report.html").read_text()
    assert f"step {best}" in page and "jlora compare" in page


def adapters(out):
    return json.loads((Path(out) / "adapters" / "jlora.json").read_text())["adapters"]


def lines(out):
    return [{k: v for k, v in each.items() if k != "per_second"} for each in read_metrics(Path(out) / "metrics.jsonl")]


def test_a_stopped_run_waits_on_as_long_and_ends_with_the_same_bits(early, tmp_path, unplugged):
    settings, result, _ = early
    again = dataclasses.replace(settings, out=str(tmp_path / "run"))
    last = result.record["steps"]
    # After the best validation, and before patience ends.
    with unplugged(last - 1):
        finetune(again, lambda text: None)
    finished = finetune(dataclasses.replace(again, resume=True), lambda text: None)
    assert 0 < finished.record["resumed_at"] < last
    assert lines(again.out) == lines(settings.out) and adapters(again.out) == adapters(settings.out)
    # Nothing is left to train: patience has ended.
    once_more = finetune(dataclasses.replace(again, resume=True), lambda text: None)
    assert once_more.record["steps"] == last and adapters(again.out) == adapters(settings.out)


def test_a_damaged_best_checkpoint_is_told_and_the_last_one_can_be_had(early, tmp_path):
    settings, result, _ = early
    out = shutil.copytree(result.out, tmp_path / "run")
    (out / "checkpoints" / str(result.record["best_step"]) / "manifest.json").write_text("{}")
    again = dataclasses.replace(settings, out=str(out), resume=True)
    with pytest.raises(CheckpointError, match="the best validation is that of step .* has a damaged manifest.json"):
        finetune(again, lambda text: None)
    # As the message says; patience has ended already.
    finished = finetune(dataclasses.replace(again, best=False), lambda text: None)
    assert finished.record["step"] == finished.record["steps"] == result.record["steps"]
    assert adapters(out) != adapters(result.out)
