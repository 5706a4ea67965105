"""Every study of `experiments/` runs for a few steps, is resumed where it stopped, and comes to a verdict.

The data are the studies' own. Sentences go to a tiny encoder here, since MiniLM would take minutes.
"""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import Bert, BertConfig

pytestmark = pytest.mark.once

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = ["--seeds", "2", "--steps", "12", "--batch", "4", "--judged", "16"]
RANK = ["--rank", "2"]
# For each study its options, and some of what it tries, by the script's own name: all would compile for minutes.
STUDIES = {
    "olora": ([*SMALL, *RANK, "--tasks", "shakespeare"], {"METHODS": ("LoRA", "OLoRA")}),
    "loraplus": ([*SMALL, *RANK, "--tasks", "shakespeare"], {"RATIOS": (1.0, 4.0)}),
    "rank_allocation": ([*SMALL, "--tasks", "e2e", "--budgets", "2"], {"METHODS": ("LoRA", "ElaLoRA")}),
    "rank_methods": (
        [*SMALL, "--tasks", "sst2", "--budgets", "2"],
        {"METHODS": ("LoRA", "PRILoRA", "GeLoRA", "ALoRA")},
    ),
    "deep_lora": (
        [*SMALL, *RANK, "--tasks", "stsb", "--examples", "16", "--ranks", "2"],
        {"METHODS": ("LoRA", "DeepLoRA")},
    ),
    "shira": (SMALL, {"METHODS": ("LoRA 1 %", "SHiRA weight 1 %")}),
    "continual": (
        [
            "--steps",
            "2",
            "--batch",
            "4",
            "--judged",
            "8",
            "--rank",
            "1",
            "--parts",
            "2",
            "--intents",
            "1",
            "--orders",
            "2",
        ],
        {},
    ),
    "chains": (
        [*SMALL, *RANK, "--tasks", "sst2", "--links", "2", "--sketches", "2", "8", "--quadratic", "9"],
        {"METHODS": ("LoRA", "COLA", "full"), "CHAINS": ("COLA",)},
    ),
}
# All are resumed by the same code; of these one writes texts, the other labels.
RESUMED = ("olora", "rank_methods")


def study_of(name):
    """The module of a study's script, which tries a part of its methods, each at one learning rate."""
    sys.path.insert(0, str(EXPERIMENTS))
    spec = importlib.util.spec_from_file_location(f"{name}_run", EXPERIMENTS / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.study.COMPILER["xla_backend_optimization_level"] = 0
    module.tasks.MOST_ROWS = 300
    module.tasks.encoder = tiny_encoder
    for table, chosen in STUDIES.get(name, ((), {}))[1].items():
        every = getattr(module, table)
        setattr(module, table, {each: every[each] for each in chosen} if isinstance(every, dict) else chosen)
    if hasattr(module, "rates"):
        rates = module.rates
        module.rates = lambda *which: rates(*which)[:1]
    elif hasattr(module, "RATES"):
        module.RATES = {key: rates[:1] for key, rates in module.RATES.items()}
    return module


def tiny_encoder(data):
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
    )
    model = Bert(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.mark.long
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_to_its_verdict_and_some_are_resumed(name, tmp_path, capsys):
    module = study_of(name)
    arguments = [*STUDIES[name][0], "--out", str(tmp_path)]
    module.study.main(module.STUDY, arguments)
    written = (tmp_path / "results.jsonl").read_text().splitlines()
    told = (tmp_path / "results.md").read_text()
    assert "\nVerdict: inconclusive: " in told and "\nSize: " in told  # two seeds and one task, or two, tell nothing
    assert (tmp_path / "results.png").stat().st_size > 1000
    if name in RESUMED:
        (tmp_path / "results.jsonl").write_text("\n".join(written[:-1]) + "\n")
        module.study.main(module.STUDY, arguments)
        again = (tmp_path / "results.jsonl").read_text().splitlines()
        assert again[:-1] == written[:-1]
        first, second = ({**json.loads(lines[-1]), "seconds": 0} for lines in (written, again))
        assert first == second, "a run that was done again came out otherwise"


def cases_of(sides, verdicts):
    """A case for each letter: above, below, neither, or mute (and above)."""
    differences = {"a": [1.0, 1.1, 0.9], "b": [-1.0, -1.1, -0.9], "n": [1.0, -1.1, 0.1], "m": [1.0, 1.1, 0.9]}
    return [verdicts.Case(side, differences[side], "nothing was learned" if side == "m" else "") for side in sides]


@pytest.mark.parametrize(
    ("sides", "word"),
    [
        ("aa", "reproduced"),
        ("aam", "reproduced"),
        ("aan", "reproduced in part"),
        ("a", "inconclusive"),  # one task is one witness
        ("amm", "inconclusive"),
        ("an", "inconclusive"),
        ("nnn", "inconclusive"),
        ("aab", "inconclusive"),
        ("m", "inconclusive"),
    ],
)
def test_a_verdict_needs_two_witnesses_and_treats_both_sides_alike(sides, word):
    verdicts = study_of("olora").study.verdicts
    assert verdicts.word(cases_of(sides, verdicts)) == word
    mirrored = [verdicts.Case(c.name, [-d for d in c.differences], c.mute) for c in cases_of(sides, verdicts)]
    assert verdicts.word(mirrored) == word.replace("reproduced", "contradicted")


def test_a_side_is_in_doubt_where_a_wider_grid_could_favour_the_other_method():
    verdicts = study_of("olora").study.verdicts
    above, below = cases_of("ab", verdicts)
    side = lambda case, ours, theirs: verdicts.Case("t", case.differences, "", verdicts.doubts(ours, theirs)).side
    assert [side(above, ours, theirs) for ours, theirs in ((None, None), ("highest", None), (None, "lowest"))] == [
        "above",
        "above",
        "neither",
    ]
    assert [side(below, ours, theirs) for ours, theirs in ((None, None), ("highest", None), (None, "lowest"))] == [
        "below",
        "neither",
        "below",
    ]


def test_a_difference_that_would_have_been_seen_is_seen_in_eight_of_ten_studies():
    verdicts = study_of("olora").study.verdicts
    noise = np.random.default_rng(0).standard_normal((4000, 5))
    size = verdicts.visible(np.array([-1.0, 1.0, 0.0, 0.5, -0.5]) / np.std([-1.0, 1.0, 0.0, 0.5, -0.5], ddof=1))
    seen = sum(verdicts.surely_above(each + size, 0.0) for each in noise) / len(noise)
    assert 0.75 < seen < 0.85


def test_steps_to_a_target_say_nothing_where_lora_itself_gets_there_at_the_end():
    study = study_of("olora").study
    falling, early = list(np.linspace(2, 1, 100)), [2.0] * 10 + [1.0] * 90
    runs = [{"losses": falling}, {"losses": falling}]
    assert "last tenth" in study.late(runs, [study.smooth(falling)[-1]] * 2)
    assert study.late([{"losses": early}], [1.0]) == ""


def test_a_report_tells_claims_by_their_verdicts_and_what_could_be_seen():
    verdicts = study_of("olora").study.verdicts
    claims = {"x": cases_of("aa", verdicts), "y": cases_of("nm", verdicts), "z": cases_of("a", verdicts)}
    assert verdicts.verdict(claims) == "reproduced: x. inconclusive: y; z."
    assert verdicts.could_see(claims, 1) == "Differences that would have been seen: 0.3 on a, 3.3 on n."
    assert verdicts.table(claims, 1)[4] == "| y | inconclusive | n | +0.0 ± 2.6 | on neither side | 3.3 |"
    assert verdicts.table(claims, 1)[5] == "|  |  | m | +1.0 ± 0.2 | not counted: nothing was learned | – |"


RESULTS = sorted(EXPERIMENTS.glob("*/results.jsonl"))


@pytest.mark.parametrize("path", [p for p in RESULTS if p.parent.name != "finetune"], ids=lambda path: path.parent.name)
def test_committed_results_say_how_large_the_study_was_and_no_more_than_it_could_tell(path):
    told = (path.parent / "results.md").read_text()
    assert "\nSize: " in told and "would have been seen" in told
    verdict = told.partition("\nVerdict: ")[2].partition("\n")[0]
    assert verdict and "not reproduced" not in verdict


@pytest.mark.long
@pytest.mark.parametrize("name", STUDIES)
def test_committed_reports_are_what_the_scripts_make_of_the_committed_results(name, tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_bytes((EXPERIMENTS / name / "results.jsonl").read_bytes())
    for shared in ("study", "tasks", "verdicts"):  # as they are: what `study_of` has made small stays out
        monkeypatch.delitem(sys.modules, shared, raising=False)
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    runpy.run_path(str(EXPERIMENTS / name / "run.py"), run_name="__main__")
    assert (tmp_path / "results.md").read_text() == (EXPERIMENTS / name / "results.md").read_text()
    assert (tmp_path / "results.jsonl").read_bytes() == (EXPERIMENTS / name / "results.jsonl").read_bytes()


def test_both_ends_of_a_grid_are_named():
    study = study_of("rank_methods").study
    best = {"LoRA": 1, "SoRA": 2, "ALoRA": 3}
    results = [
        {
            "settings": {"stage": "choose", "task": "t", "method": m, "rate": rate, "seed": 0},
            "losses": [abs(rate - own)],
        }
        for m, own in best.items()
        for rate in (1, 2, 3)
    ]
    said = study.edges(results, ["t"], best)
    assert said.endswith("at the lowest rate LoRA on t; at the highest rate ALoRA on t.")
    assert study.edges(results, ["t"], ["SoRA"]) == "Every best rate lies inside its grid."
    assert "the lowest of its grid on t" in study.edge_note(results, ["t"], method="LoRA")


def test_a_chain_is_nearer_to_full_fine_tuning_only_where_that_is_above():
    case = study_of("chains").chain_case
    scores = {"LoRA": [0.5, 0.6, 0.7], "COLA": [0.6, 0.71, 0.79]}
    tried = case("t", {**scores, "full": [0.7, 0.81, 0.89]}, "COLA")
    assert (tried.side, tried.mute) == ("above", "")
    assert "full fine-tuning is not surely above LoRA" in case("t", {**scores, "full": [0.5, 0.7, 0.6]}, "COLA").mute


def test_a_task_of_uneven_classes_is_scored_by_matthews_correlation():
    module = study_of("rank_methods")
    task = module.tasks.Task("cola", "detect", None, {}, {"targets": np.array([1, 1, 1, 0, 0])}, None)
    assert module.study.blind(task, 5) == 0.0
    outputs = np.eye(2)[[1, 1, 0, 0, 1]]  # 2 hits, 1 false alarm, 1 miss, 1 right rejection
    assert task.score(outputs, task.test["targets"]) == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/run.py")), ids=lambda path: path.parent.name)
def test_every_study_is_tried_here_or_beside(path):
    beside = Path(__file__).parent / f"test_{path.parent.name}.py"
    assert path.parent.name in STUDIES or beside.exists() or path.parent.name == "finetune"


def test_a_wrong_folder_and_an_unknown_task_are_refused(tmp_path, capsys):
    module = study_of("olora")
    for arguments, message in (
        (["--data", str(tmp_path / "none")], "there is no folder"),
        (["--tasks", "nonsense"], "unknown tasks ['nonsense']; there are ['shakespeare'"),
    ):
        with pytest.raises(SystemExit):
            module.study.main(module.STUDY, [*arguments, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
