"""The rules of `experiments/README.md` as code: criteria that come first, grids that grow, and one pooled test."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

pytestmark = pytest.mark.once

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
criteria, grids, ruling, verdicts = map(importlib.import_module, ("criteria", "grids", "ruling", "verdicts"))

CLAIM = criteria.Criterion("x is better", "a paper, 2 %", "score, x minus y", 0.02, ("s", "t"), 10)


def test_a_criterion_is_written_first_and_doesnt_change(tmp_path):
    path = tmp_path / "criterion.json"
    with pytest.raises(ValueError, match="3 runs are done: a criterion that comes after results is none"):
        criteria.register(path, [CLAIM], 3)
    criteria.register(path, [CLAIM], 0)
    written = path.read_bytes()
    assert json.loads(written)["criteria"][0]["effect"] == 0.02
    criteria.register(path, [CLAIM], 3)
    assert path.read_bytes() == written
    for change in ({"effect": 0.01}, {"seeds": 20}, {"tasks": ("s",)}, {"claim": "x is not worse"}):
        with pytest.raises(ValueError, match=f"says {next(iter(change))} .*choose another --out"):
            criteria.register(path, [dataclasses.replace(CLAIM, **change)], 3)
    with pytest.raises(ValueError, match="has 1 criteria, the study now has 2"):
        criteria.register(path, [CLAIM, CLAIM], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"effect": 0.0}, "above zero on the claimed side, got 0.0"),
        ({"seeds": 9}, "wanted 10 seeds at least, got 9"),
        ({"seeds": 1, "small": True}, "wanted 2 seeds at least, got 1"),
        ({"tasks": ()}, "wanted one task at least"),
        ({"kind": "nicer"}, "kind must be one of .*got 'nicer'"),
    ],
)
def test_what_the_rules_dont_allow_is_no_criterion(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLAIM, **change)


def finished(criterion, steps=40, least=0.3, most=4):
    """The plan and the results of a study of a method and its baseline, whose best rates are these."""
    own = {"y": 1.0, "x": least}

    def loss(settings):
        return abs(np.log(settings["rate"] / own[settings["method"]])) + 0.01 * settings["seed"]

    variants = [{"method": "y"}, {"method": "x"}]
    results, wanted = [], []
    while True:
        planned = grids.plan(
            results, criterion, variants, lambda task, v: (0.5, 1.0, 2.0), lambda task: {}, steps, most
        )
        if planned == wanted:
            return planned, results
        wanted = planned
        results = [{"settings": s, "train_loss": loss(s)} for s in planned]


@pytest.mark.parametrize("kind", ["level", "faster"])
def test_a_plan_by_the_rules_breaks_none(kind):
    criterion = dataclasses.replace(CLAIM, kind=kind)
    planned, results = finished(criterion)
    assert criteria.broken(criterion, planned) == []
    runs = [s for s in planned if s["stage"] == "run"]
    assert {(s["method"], s["reading"], s["rate"]) for s in runs} == {
        ("y", "shared", 1.0),
        ("x", "shared", 1.0),
        ("x", "tuned", 0.25),  # of a grid that ended at 0.5 and grew to 0.125
    }
    assert {s["rate"] for s in planned if s["method"] == "x" and s["stage"] == "choose"} == {0.125, 0.25, 0.5, 1.0, 2.0}
    assert {s["steps"] for s in runs} == ({10, 20, 40} if kind == "faster" else {40})
    assert grids.ends(criterion, results) == []


def test_a_plan_that_breaks_a_rule_is_told_which():
    planned, _ = finished(CLAIM)
    without = lambda keep: criteria.broken(CLAIM, [s for s in planned if keep(s)])
    assert "the runs are on ['s']" in without(lambda s: s["task"] == "s")[0]
    assert "a reported setting has 9 seeds, wanted 10" in without(lambda s: s["seed"] != 4)[0]
    assert "a rate that is tried has 2 seeds, wanted 3" in without(lambda s: s["seed"] != 101)[0]
    assert "the readings are ['shared']" in without(lambda s: s.get("reading") != "tuned")[0]
    one = dict(next(s for s in planned if s["stage"] == "run"), seed=100)
    assert criteria.broken(CLAIM, [*planned, one]) == ["seeds [100] choose a rate and are reported"]
    assert "a quarter, half and all" in criteria.broken(dataclasses.replace(CLAIM, kind="faster"), planned)[0]


def test_a_grid_grows_to_an_inner_optimum_or_to_its_limit_which_is_told():
    grow = lambda losses, **more: grids.grown(losses, (1.0, 2.0, 4.0), **more)
    assert grow({1.0: 3.0, 2.0: 1.0, 4.0: 2.0}) is None
    assert grow({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}) == 0.5
    assert grow({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}) == 8.0
    assert grow({1.0: np.inf, 2.0: np.nan, 4.0: np.inf}) == 0.5, "where all diverge lower rates are tried"
    assert grow({1.0: 3.0, 2.0: 2.0, 4.0: 1.5, 8.0: 1.0}, most=1) is None
    with pytest.raises(ValueError, match="two positive rates at least"):
        grids.grown({1.0: 1.0}, (1.0,))
    _, results = finished(CLAIM, least=1e-9, most=2)
    told = grids.ends(CLAIM, results)
    assert len(told) == 2 and "best" not in told[0] and "0.125 of 0.125 to 2: method x" in told[0]


def test_one_test_over_tasks_is_students_for_one_and_welchs_for_two():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 10), rng.normal(0.2, 3, 7)
    one, student = ruling.pool([list(a)]), stats.ttest_1samp(a, 0)
    assert one.p == pytest.approx(student.pvalue)
    assert one.interval == pytest.approx(tuple(student.confidence_interval(0.95)))
    # The mean of two means is half the difference of the one and minus the other.
    two, welch = ruling.pool([list(a), list(b)]), stats.ttest_ind(a, -b, equal_var=False)
    assert two.p == pytest.approx(welch.pvalue) and two.freedom == pytest.approx(welch.df)
    assert two.interval == pytest.approx([end / 2 for end in welch.confidence_interval(0.95)])
    assert one.visible == pytest.approx(verdicts.visible(list(a)))
    with pytest.raises(ValueError, match="two seeds of each, got \\[10, 1\\]"):
        ruling.pool([list(a), [1.0]])


@pytest.mark.parametrize(
    ("mean", "doubted", "word"),
    [
        (1.0, (), "reproduced"),
        (5.0, (), "reproduced"),
        (0.5, (), "reproduced, but smaller"),
        (0.5, ("below",), "reproduced"),
        (0.5, ("above",), "not of this size"),
        (1.0, ("above",), "inconclusive"),
        (0.1, (), "not of this size"),
        (0.1, ("below",), "inconclusive"),
        (-1.0, (), "contradicted"),
        (-1.0, ("below",), "inconclusive"),
    ],
)
def test_a_verdict_sees_zero_and_the_papers_effect(mean, doubted, word):
    estimate = ruling.Estimate(mean, 0.1, 1e6)  # the interval is the mean ± 0.196
    assert ruling.word(estimate, 1.0, doubted) == word


def test_an_interval_that_holds_zero_and_the_papers_effect_tells_nothing():
    assert ruling.word(ruling.Estimate(0.5, 0.6, 1e6), 1.0) == "inconclusive"


def test_the_lines_of_a_verdict():
    criterion = dataclasses.replace(CLAIM, effect=1.0)
    p = 2 * stats.t.sf(1.1 / np.sqrt(2 * np.var([1.0, 1.2] * 5, ddof=1) / 10) * 2, 18)
    case = lambda name, mute="": verdicts.Case(name, [1.0, 1.2] * 5, mute)
    told = "\n".join(ruling.rule(criterion, [case("s"), case("t")]))
    assert "\nVerdict: reproduced: x is better." in told and "\nPaper: +1 (a paper, 2 %)." in told
    assert (
        f"\nOurs: +1.100 (+1.050 to +1.150), p = {p:.2g} against zero; 0.070 would have been seen; 2 of 2 tasks, 10 seeds."
        in told
    )
    doubtful = ruling.rule(criterion, [case("s"), dataclasses.replace(case("t"), doubted=("above",))])
    assert "In doubt: a best rate lies at an end of its grid on t." in doubtful
    assert doubtful[-1] == "Verdict: inconclusive: x is better."
    assert not any(line.startswith("In doubt") for line in told.splitlines())
    small = dataclasses.replace(criterion, small=True)
    assert "\nVerdict: inconclusive (small: above zero): " in "\n".join(ruling.rule(small, [case("s"), case("t")]))
    mute = "\n".join(ruling.rule(criterion, [case("s", "nothing was learned"), case("t", "nothing was learned")]))
    assert (
        "\nVerdict: inconclusive: " in mute
        and "\nOurs: nothing counts" in mute
        and "not counted: nothing was learned" in mute
    )
    with pytest.raises(ValueError, match="the cases are \\['s'\\]"):
        ruling.rule(criterion, [case("s")])
    with pytest.raises(ValueError, match="s has 2 seeds, the criterion says 10"):
        ruling.rule(criterion, [verdicts.Case("s", [1.0, 2.0]), case("t")])


def study_of(plan, out, **criterion):
    """Runs a study that needs no model; its plan gets the results, its criterion changes as told."""
    study = importlib.import_module("study")
    tried = study.Study(
        "about",
        out,
        sizes={"seeds": 10},
        full={},
        plan=lambda results, options: plan,
        run=lambda settings, options: {"flops": 2.0},
        report=lambda results, options: [study.cost(results)],
        small={"seeds": 2},
        criteria=lambda options: (dataclasses.replace(CLAIM, seeds=options.seeds, small=options.small, **criterion),),
        needs_data=False,
    )
    return lambda *arguments: study.main(tried, ["--data", str(out / "none"), *arguments])


def test_a_study_with_a_criterion_is_held_to_it_before_its_runs(tmp_path):
    planned = [
        {"stage": "run", "task": task, "seed": seed, "method": m} for seed in range(10) for task in "st" for m in "xy"
    ]
    run = study_of(planned, tmp_path, rates="measured")
    run()
    assert json.loads((tmp_path / "criterion.json").read_text())["criteria"][0]["seeds"] == 10
    assert (tmp_path / "results.md").read_text() == "Cost: 0 s, 8.0e+01 FLOPs.\n"
    with pytest.raises(ValueError, match="says effect 0.02, the study now says 0.5"):
        study_of(planned, tmp_path, rates="measured", effect=0.5)()
    for seeds, folder in (("10", "other"), ("11", "more")):
        fewer = [s for s in planned if s["seed"] < 9] if seeds == "10" else planned
        with pytest.raises(ValueError, match=f"has {'9' if seeds == '10' else '10'} seeds, wanted {seeds}"):
            study_of(fewer, tmp_path, rates="measured")("--seeds", seeds, "--out", str(tmp_path / folder))
        assert not (tmp_path / folder / "results.jsonl").exists()
    run("--small")
    assert json.loads((tmp_path / "small" / "criterion.json").read_text())["criteria"][0]["small"] is True


def test_losses_are_measured_on_the_same_rows_for_all(monkeypatch):
    study, tasks = map(importlib.import_module, ("study", "tasks"))
    seen = []
    monkeypatch.setattr(study, "_outputs", lambda task, adapted, most, data: seen.append(data) or data["inputs"])
    data = {"inputs": np.arange(20.0)[:, None], "targets": np.zeros(20)}
    task = tasks.Task("t", "regress", None, data, data, None)
    first, second = study.measured(task, None, 5), study.measured(task, None, 5)
    rows = seen[0]["inputs"][:, 0]
    assert len(set(rows)) == 5 and list(rows) != list(range(5)) and (rows == seen[2]["inputs"][:, 0]).all()
    assert first == second and first["train_loss"] == pytest.approx(np.mean(rows**2))
    assert study.measured(task, None, 99)["test_loss"] == pytest.approx(np.mean(np.arange(20.0) ** 2))


def test_flops_are_the_compilers():
    import jax

    study = importlib.import_module("study")
    compiled = jax.jit(lambda a, b: a @ b).lower(np.ones((4, 8), np.float32), np.ones((8, 3), np.float32)).compile()
    assert study.flops(compiled) == pytest.approx(2 * 4 * 8 * 3)
    with pytest.raises(ValueError, match="the compiler gives no cost"):
        study.flops(argparse.Namespace(cost_analysis=lambda: None))
    assert study.cost([{"seconds": 2.0}, {"seconds": 1.0, "flops": 5.0}]) == "Cost: 3 s; FLOPs were not counted."
