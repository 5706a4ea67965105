"""The study of LCM-LoRA and ZipLoRA runs for a few steps and comes to a verdict, which treats both sides alike."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parents[2] / "experiments" / "diffusion" / "run.py"
SMALL = "--seeds 1 --width 8 --blocks 1 --base 3 --steps 3 --zips 2 --images 20 --judged 10 --tasks noise"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("diffusion_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.study.COMPILER, "xla_backend_optimization_level", 0)
    module.PENALTIES = ("dot",)
    return module


@pytest.mark.long
def test_the_study_runs_to_its_verdict(script, tmp_path):
    script.main([*SMALL.split(), "--out", str(tmp_path)])
    told = (tmp_path / "results.md").read_text()
    assert "\nVerdict: inconclusive: LCM-LoRA in 4 steps is nearer than DDIM in 4; " in told and "\nSize: " in told
    assert "the base has not learned its digits" in told  # in three steps
    assert (tmp_path / "results.png").stat().st_size > 1000


def records(script, lcm, fast, zipped, base=0.9):
    """Three seeds of both cases, with these distances, shares of the sum, and shares of ZipLoRA."""
    shares = {"digit": base, "style": 1.0, "both": 0.8, "distance": 10.0}
    found = {
        "base, DDIM 50": shares,
        "base, DDIM 4": shares,
        "LCM-LoRA, 4": {**shares, "distance": lcm},
        "style, DDIM 20": shares,
        "style, DDIM 4": shares,
        "0.8 style + LCM-LoRA, 4": {**shares, "distance": lcm, "both": fast},
        **{name: {"subject": 0.6, "style": 0.6, "both": 0.3} for name in ("subject alone", "style alone", "sum")},
        "ZipLoRA, dot": {"subject": zipped, "style": 0.6, "both": 0.3},
    }
    return [{"settings": {"case": case, "seed": seed}, "found": found} for case in script.CASES for seed in range(3)]


@pytest.mark.parametrize(
    ("numbers", "word"),
    [((5.0, 0.9, 0.7), "reproduced"), ((15.0, 0.7, 0.5), "contradicted"), ((10.0, 0.8, 0.6), "inconclusive")],
)
def test_a_claim_and_its_opposite_are_judged_alike(script, numbers, word):
    options = SimpleNamespace(tasks=list(script.CASES))
    claims = script.claims_of(records(script, *numbers), options)
    assert len(claims) == 4
    assert {script.study.verdicts.word(cases) for cases in claims.values()} == {word}


def test_nothing_follows_where_the_base_draws_no_digits(script):
    options = SimpleNamespace(tasks=list(script.CASES))
    claims = script.claims_of(records(script, 5.0, 0.9, 0.7, base=0.4), options)
    assert [script.study.verdicts.word(cases) for cases in claims.values()] == ["inconclusive"] * 3 + ["reproduced"]
