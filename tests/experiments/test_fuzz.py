"""A few programs of the fuzz (`experiments/fuzz`), and whether it would see a fault."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from contract.problems import jit

import jlora
from jlora.core.walk import interpreter as walk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments" / "fuzz"))
import checks
import programs
import steps

#: Together they have nearly all steps, nests and ends; choose others where a change of `steps.py` makes them other programs.
SEEDS = (1536, 733, 147, 2028, 1480, 1763, 1938, 436, 148, 683)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_program_is_lifted_to_what_it_is_on_merged_params(seed):
    program = programs.random_program(seed)
    assert checks.check(program, jit) == checks.Outcome("equal"), program.source()


def small(*names):
    leaf = programs.Leaf("w0", (4, 3), "float32", jlora.LoRA(rank=1, init="random"), "in out")
    return programs.Program((leaf,), (("w0", tuple((name, 0) for name in names)),))


def test_a_wrong_rule_is_seen_and_shown_by_the_smallest_program(monkeypatch):
    monkeypatch.setitem(walk.RULES, "tanh", lambda walk, eqn, value: [value])
    program = small("jit", "transposed", "tanh", "copied", "product")
    outcome = checks.check(program, jit)
    assert outcome.kind == "wrong value"
    found, _ = checks.shrunk(program, outcome, jit)
    assert found.kinds() == ["product", "tanh"]


def test_a_wrong_gradient_and_a_crash_are_seen(monkeypatch):
    stopped = lambda walk, eqn, value: [jnp.tanh(jax.lax.stop_gradient(walk.materialise(value)))]
    monkeypatch.setitem(walk.RULES, "tanh", stopped)
    assert checks.check(small("tanh", "product"), jit).kind == "wrong gradient"
    monkeypatch.setitem(walk.RULES, "tanh", lambda walk, eqn, value: 1 / 0)
    assert checks.check(small("tanh", "product"), jit).kind.startswith("crash")


def test_the_same_seed_gives_the_same_program_and_every_kind_of_step_comes_up():
    assert programs.random_program(7) == programs.random_program(7)
    seen = {name for seed in range(1000) for name in programs.random_program(seed).kinds()}
    assert seen == set(steps.kinds())
    used = {type(leaf.method) for seed in range(1000) for leaf in programs.random_program(seed).leaves}
    assert {type(case) for case in programs.METHODS} == used
