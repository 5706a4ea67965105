"""Every study of `experiments/` runs for a few steps, is resumed where it stopped, and comes to a verdict.

The data are the studies' own. Sentences go to a tiny encoder here, since MiniLM would take minutes.
"""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import Bert, BertConfig

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = ["--seeds", "2", "--steps", "12", "--batch", "4", "--judged", "16"]
RANK = ["--rank", "2"]
# For each study its options, and the methods that are tried: all would compile for minutes.
STUDIES = {
    "olora": ([*SMALL, *RANK, "--tasks", "shakespeare"], ("LoRA", "OLoRA")),
    "loraplus": ([*SMALL, *RANK, "--tasks", "shakespeare"], ()),
    "rank_allocation": ([*SMALL, "--tasks", "e2e", "--budgets", "2"], ("LoRA", "ElaLoRA")),
    "rank_methods": ([*SMALL, "--tasks", "sst2", "--budgets", "2"], ("LoRA", "PRILoRA", "GeLoRA", "ALoRA")),
    "deep_lora": ([*SMALL, *RANK, "--tasks", "stsb", "--examples", "16", "--ranks", "2"], ("LoRA", "DeepLoRA")),
    "shira": (SMALL, ("LoRA 1 %", "SHiRA weight 1 %")),
    "chains": ([*SMALL, *RANK, "--tasks", "sst2", "--links", "2", "--sketches", "2", "8", "--quadratic", "9"], ()),
}


def study_of(name):
    """The module of a study's script."""
    sys.path.insert(0, str(EXPERIMENTS))
    spec = importlib.util.spec_from_file_location(f"{name}_run", EXPERIMENTS / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.study.COMPILER["xla_backend_optimization_level"] = 0
    module.tasks.MOST_ROWS = 300
    module.tasks.encoder = tiny_encoder
    if methods := STUDIES.get(name, ((), ()))[1]:
        every = module.METHODS
        module.METHODS = {m: every[m] for m in methods} if isinstance(every, dict) else methods
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


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_to_its_verdict_and_is_resumed(name, tmp_path, capsys):
    module = study_of(name)
    arguments = [*STUDIES[name][0], "--out", str(tmp_path)]
    module.study.main(module.STUDY, arguments)
    written = (tmp_path / "results.jsonl").read_text().splitlines()
    assert "Verdict: " in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 1000

    (tmp_path / "results.jsonl").write_text("\n".join(written[:-1]) + "\n")
    module.study.main(module.STUDY, arguments)
    again = (tmp_path / "results.jsonl").read_text().splitlines()
    assert again[:-1] == written[:-1]
    first, second = ({**json.loads(lines[-1]), "seconds": 0} for lines in (written, again))
    assert first == second, "a run that was done again came out otherwise"


@pytest.mark.parametrize(
    ("above", "below", "cases", "word"),
    [
        (3, 0, 3, "reproduced "),
        (1, 0, 3, "not reproduced"),  # one interval of three lies above by chance in 7 of 100 studies
        (2, 0, 6, "reproduced in part"),
        (2, 2, 9, "not reproduced"),
        (0, 1, 3, "not reproduced"),
        (1, 3, 9, "contradicted"),
    ],
)
def test_a_verdict_reckons_with_chance(above, below, cases, word):
    study = study_of("rank_methods").study
    found = ["above"] * above + ["below"] * below + ["between"] * (cases - above - below)
    assert study.verdict(found).startswith(word)


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
    verdict = study_of("chains").chain_verdict
    sides = {"above": ("+", 0.1, 0.3), "below": ("-", -0.3, -0.1), "between": ("0", -0.1, 0.1)}
    others = dict.fromkeys(("ReLoRA", "RAC-LoRA", "XGBLoRA"), sides["between"])
    of = lambda full, cola: {**others, "COLA": sides[cola], "full": sides[full]}
    assert verdict("t", of("above", "above")).endswith("nearer to it than LoRA are COLA.")
    assert verdict("t", of("above", "between")).endswith("no chain is surely nearer to it.")
    assert verdict("t", of("below", "above")).endswith("so the claim can't be tried.")


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
