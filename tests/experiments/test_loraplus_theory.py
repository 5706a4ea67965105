"""The study of LoRA+'s ratio over widths: its own arithmetic, and a run of a few steps to its verdict."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parents[2] / "experiments" / "loraplus_theory" / "run.py"
SMALL = ["--small", "--widths", "4", "8", "--steps", "3", "--rows", "6", "--rank", "1", "--seeds", "2"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("loraplus_theory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.study.COMPILER["xla_backend_optimization_level"] = 0
    return module


@pytest.mark.long
def test_the_study_grows_its_grids_and_is_resumed_and_comes_to_a_direction(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.grids, "MOST", 1)
    arguments = [*SMALL, "--tasks", "tanh", "--out", str(tmp_path)]
    script.study.main(script.STUDY, arguments)
    written = (tmp_path / "results.jsonl").read_text().splitlines()
    told = (tmp_path / "results.md").read_text()
    assert "\nVerdict: inconclusive" in told and "\nPaper: +1 (" in told and "\nCost: " in told
    assert (tmp_path / "results.png").stat().st_size > 1000
    first = json.loads(written[0])
    assert np.shape(first["train_loss"]) == np.shape(first["test_loss"]) == (8, 8)
    assert len(written) > 4, "three steps are best at the highest rates, so that a grid must grow"
    (tmp_path / "results.jsonl").write_text("\n".join(written[:-1]) + "\n")
    script.study.main(script.STUDY, arguments)
    again = [{**json.loads(line), "seconds": 0} for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert again == [{**json.loads(line), "seconds": 0} for line in written]

    # A run of the grid is the run alone: Adam by optax, with rates of its own for a and b.
    (power_a, power_b), steps = (-3, -2), 3
    params = script.drawn(jax.random.key(0), 4)
    adapted = jlora.adapterize(params, {"hidden/kernel": jlora.LoRA(1, alpha=1)}, jax.random.key(0))
    (x, y), _ = script.data(0, 6, "tanh")
    fields = adapted.params["hidden"]["kernel"]

    def loss(p):
        kernel = params["hidden"]["kernel"] + p["a"] @ p["b"]
        return ((script.network({**params, "hidden": {"kernel": kernel}}, x, "tanh") - y) ** 2).mean()

    rates = {"a": 4.0**power_a, "b": 4.0**power_b}
    tx = {name: optax.adam(lambda count, r=r: r * (1 - count / steps)) for name, r in rates.items()}
    states = {name: tx[name].init(fields[name]) for name in rates}
    for _ in range(steps):
        gradients = jax.jit(jax.grad(loss))(fields)
        for name in rates:
            update, states[name] = tx[name].update(gradients[name], states[name])
            fields = {**fields, name: fields[name] + update}
    place = (script.POWERS.index(power_a), script.POWERS.index(power_b))
    assert np.array(first["train_loss"])[place] == pytest.approx(float(loss(fields)), rel=1e-4)


def test_between_the_points_of_a_grid_the_lowest_is_a_parabolas(script):
    bowl = lambda a, b: float(np.exp(0.7 * (a + 3.3) ** 2 + 0.2 * (b + 5.1) ** 2))
    table = {(a, b): bowl(a, b) for a in script.POWERS for b in script.POWERS}
    assert script.between(table) == pytest.approx((-3.3, -5.1))
    assert script.between({**table, (-2, -5): np.inf}) == pytest.approx((-3, -5.1)), "beside a run that diverged"
    assert script.between({place: loss for place, loss in table.items() if place[1] <= -6})[1] == -6, "at an end"


def test_a_grid_grows_where_its_best_is_at_an_end_by_a_line_of_the_whole_other_axis(script):
    low = lambda a, b: {(x, y): abs(x - a) + abs(y - b) + 1.0 for x in (-3, -2, -1) for y in (-5, -4, -3)}
    assert script.grown(low(-2, -4)) is None
    assert script.grown(low(-1, -4)) == ((0,), (-5, -4, -3))
    assert script.grown(low(-2, -5)) == ((-3, -2, -1), (-6,))


def test_the_slope_is_the_power_of_the_width(script):
    assert script.slope([64, 256, 1024], [3 * w**0.8 for w in (64, 256, 1024)]) == pytest.approx(0.8)
    assert script.slope([64, 256, 1024], [5.0] * 3) == pytest.approx(0)


def test_targets_are_the_same_for_all_widths(script):
    (x, y), (test_x, test_y) = script.data(3, 20, "relu")
    whole = np.concatenate([y, test_y])
    assert x.shape == test_x.shape == (20, script.FEATURES)
    assert whole.mean() == pytest.approx(0, abs=1e-5) and whole.std() == pytest.approx(1, abs=1e-5)


def test_the_committed_report_is_what_the_script_makes_of_the_committed_results(script, tmp_path):
    for name in ("results.jsonl", "criterion.json"):
        (tmp_path / name).write_bytes((SCRIPT.parent / name).read_bytes())
    script.study.main(script.STUDY, ["--out", str(tmp_path)])
    for name in ("results.jsonl", "criterion.json", "results.md"):
        assert (tmp_path / name).read_bytes() == (SCRIPT.parent / name).read_bytes(), name
