"""The step benchmark runs, in every shape, at sizes of a test; its numbers are right where they can be known."""

import json
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments" / "benchmarks"))
import cost_model
import run_memory
import step_time
import variants
from problems import problem, settings_for

pytestmark = pytest.mark.once

TINY = {"layers": 2, "width": 32, "hidden": 48, "heads": 2, "vocab": 64, "batch": 2, "length": 16, "rank": 2}


@pytest.mark.long
def test_the_gpu_shape_is_two_7b_layers_in_bfloat16_and_runs_small(monkeypatch):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # so that seconds of tracing are honest; none are read here
    whole = settings_for("gpu")
    assert (whole.width, whole.hidden, whole.length, whole.dtype) == (4096, 11008, 4096, "bfloat16")
    p = problem(settings_for("gpu", **{**TINY, "layers": 1}))
    adapted = variants.adapt(p, variants.jlora.LoRA(2))
    found = {"bound": variants.bound(p), "jlora auto": variants.lifted(p, adapted)}
    compiled = step_time.compile_all(found)
    times = step_time.interleave(step_time.timers(found, compiled), 2)
    assert set(times) == set(found) and all(len(each) == 2 and min(each) > 0 for each in times.values())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(p.params)} == {"bfloat16"}


def test_the_inputs_that_lora_must_keep_are_counted_once_each():
    s = settings_for("llama", **TINY)
    p = problem(s)
    adapted = variants.adapt(p, variants.jlora.LoRA(2))
    tokens = s.batch * s.length
    assert variants.distinct_inputs_bytes(p, adapted) == 4 * tokens * s.layers * (3 * s.width + s.hidden)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "layers"), [("llama", 1), ("scanned", 2)])
def test_every_variant_starts_at_the_loss_of_the_model(shape, layers):
    p = problem(settings_for(shape, **{**TINY, "layers": layers}))
    wanted = float(jax.jit(lambda params: p.loss(p.net.apply, params, p.batch))(p.params))
    losses = {name: float(each.step(*each.arguments)[2]) for name, each in variants.all_variants(p, 2).items()}
    assert {"bound", "jlora auto", "jlora DoRA", "naive", "full"} <= set(losses)
    for name, loss in losses.items():
        assert loss == pytest.approx(wanted, rel=1e-5), name


@pytest.mark.long
def test_nothing_of_the_bases_size_is_left_by_any_phase_of_a_run():
    s = settings_for("llama", **{**TINY, "layers": 1, "width": 128, "hidden": 256, "vocab": 512})
    found = run_memory.measure(s)
    left = {name: row["left_mb"] for name, row in found.items() if isinstance(row, dict)}
    assert {"adapterize", "optimizer", "step", "save"} <= set(left)
    assert all(each < 0.2 * found["base_mb"] for each in left.values()), (left, found["base_mb"])
    assert "adapterize" in run_memory.show(found)


def test_the_results_hold_every_target_and_every_pair_of_the_cost_model():
    results = step_time.RESULTS
    for shape in ("llama", "minilm", "scanned"):
        result = json.loads((results / f"step_time_{shape}.json").read_text())
        assert any(line.startswith("time / bound") for line in result["targets"])
    rows = json.loads((results / "cost_model.json").read_text())["rows"]
    assert {row["tokens"] for row in rows} >= {64, 1024, 4096} and {row["rank"] for row in rows} >= {4, 64}
    assert cost_model.__doc__ and step_time.show(result).count("\n") == len(result["rows"])
