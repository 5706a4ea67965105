"""The study of deep matrix completion runs for a few steps, is resumed where it stopped, and comes to a verdict."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parents[2] / "experiments" / "deep_matrix_completion" / "run.py"
SMALL = ["--size", "12", "--rank", "1", "--width", "4", "--steps", "20", "--seeds", "2"]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("deep_matrix_completion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FORMS = {form: choices[:1] for form, choices in module.FORMS.items()}
    return module


@pytest.mark.long
def test_the_study_runs_to_its_verdict_and_is_resumed(script, tmp_path):
    arguments = [*SMALL, "--out", str(tmp_path)]
    script.main(arguments)
    written = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(written) == 4 * 3
    assert "Verdict: inconclusive: 0 wide and 0 compressed runs" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 1000

    (tmp_path / "results.jsonl").write_text("\n".join(written[:-1]) + "\n")
    script.main(arguments)
    again = (tmp_path / "results.jsonl").read_text().splitlines()
    assert again[:-1] == written[:-1]
    first, second = ({**json.loads(lines[-1]), "seconds_a_step": 0} for lines in (written, again))
    assert first == second, "a run that was done again came out otherwise"


def records(error, steps, count=3):
    return [{"error": error * (1 + n / 100), "steps_to_goal": steps, "seconds_a_step": 1e-3} for n in range(count)]


@pytest.mark.parametrize(
    ("wide", "moving", "fixed", "words"),
    [
        (
            (1e-5, 900),
            (1e-6, 300),
            (0.4, None),
            "Verdict: reproduced. Compressed with gamma > 0 meets the goal 3.0 times",
        ),
        ((1e-5, 300), (1e-6, 900), (0.4, None), "Verdict: contradicted"),
        ((1e-5, 900), (1e-6, 300), (1e-6, 300), "Verdict: contradicted"),
        ((1e-6, 900), (1e-5, 300), (0.4, None), "Verdict: contradicted. .* error is higher"),
        ((1e-5, 900), (1.5e-5, 300), (0.4, None), "Verdict: reproduced. .* error is higher"),  # both far below the goal
        ((1e-6, 900), (0.4, None), (0.4, None), "Verdict: inconclusive: 3 wide and 0 compressed runs"),
    ],
)
def test_the_verdict_follows_from_the_numbers(script, wide, moving, fixed, words):
    results = dict(zip((script.WIDE, script.MOVING, script.FIXED), (records(*r) for r in (wide, moving, fixed))))
    assert re.match(words, script.verdict(results))


def test_the_narrow_product_is_set_beside_the_compressed_one(script):
    results = {script.MOVING: records(1e-6, 600), script.NARROW: records(1e-6, 300)}
    assert re.search(r"meets the goal 2 times \(2 to 2\) as fast as the compressed one", script.beside(results))
    assert "did not both meet" in script.beside({**results, script.NARROW: records(0.4, None)})


def test_too_few_steps_are_refused(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--steps", "5", "--out", str(tmp_path)])
    assert "at least 20 steps and 2 seeds are needed" in capsys.readouterr().err
