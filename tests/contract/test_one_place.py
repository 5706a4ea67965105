"""A method is one file and one line: a rehearsal method, registered as the line would, is known wherever methods are."""

import ast
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
import jlora.methods
from contract import checks, discovery, rehearsal
from contract.rehearsal import Rehearsal
from jlora.disk import catalog
from jlora.training.cli import main
from jlora.training.model.selection import make_spec
from jlora.training.run.schedule import make_optimizer, restarts_of
from jlora.training.settings import told
from jlora.training.settings.configuration import gather
from jlora.training.settings.defaults import resolve
from jlora.training.settings.flags import Parser, add_flags, given
from jlora.training.settings.inspected import settings_table
from jlora.training.settings.named import named

pytestmark = pytest.mark.once

PARAMS = {name: {"kernel": jnp.cos(jnp.arange(80.0) + n).reshape(10, 8)} for n, name in enumerate(("up", "down"))}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The one line, `from jlora.methods.rehearsal import Rehearsal as Rehearsal`."""
    monkeypatch.setattr(jlora.methods, "Rehearsal", Rehearsal, raising=False)


def settings(*flags):
    parser = Parser("job")
    add_flags(parser, ("model", "data", "method", "training"))
    return resolve(
        given(parser.parse_args(["--model", "m", "--data", "d", "--method", "rehearsal", *flags])).settings()
    )


def test_the_contract_s_discovery_takes_it():
    assert discovery.problems_of(rehearsal, jlora.methods) == []
    checks.check_serialisation(Rehearsal.CASES[0])


@pytest.mark.long
@pytest.mark.parametrize("check", discovery.checks(checks))
def test_the_contract_holds(check):
    discovery.checks(checks)[check](Rehearsal.CASES[0])


def test_the_job_takes_it_by_name_with_its_recipe_and_hyperparameters():
    chosen = settings("--steps", "10", "--rank", "3", "--set", "target=2")
    assert named(chosen) == Rehearsal(6, 2, 6.0, 10)
    assert (chosen.learning_rate, chosen.targets) == (2e-3, "all-linear")
    assert "rehearsal" in told.method_help() and "rehearsal: mean rank after half of the run" in told.rank_help()
    assert "rehearsal: 2e-3" in told.rate_help()
    table = [line.split(maxsplit=3) for line in settings_table(chosen).splitlines()]
    assert ["target", "2", "2", "ranks a matrix that are left, on average"] in table


def test_a_file_names_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[spec]\n".*" = {method = "Rehearsal", rank = 3}\n')
    (method,) = make_spec(None, resolve(gather({"steps": 8, "model": "m", "data": "d"}, path).settings())).values()
    assert method == Rehearsal(3, steps=8)
    path.write_text('method = "rehearsal"\n[set]\ntarget = 1\n')
    assert named(resolve(gather({"set": {"rank": "5"}}, path).settings())) == Rehearsal(5, 1, 32.0, 250)


def trained(tmp_path):
    """Two matrices after a cut, trained as the job does."""
    chosen = settings("--steps", "4", "--rank", "1", "--warmup", "1", "--learning-rate", "0.1", "--dropout", "0.0")
    adapted = jlora.adapterize(PARAMS, {".*": named(chosen)}, key=jax.random.key(0))
    assert restarts_of(adapted) == [2]
    tx = make_optimizer(adapted, chosen)
    opt_state, said = tx.init(adapted.params), []
    for step in range(1, 5):
        gradient = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(float(leaf.size))).reshape(leaf.shape), adapted.params)
        updates, opt_state = tx.update(gradient, opt_state, adapted.params)
        adapted = adapted.replace(params=optax.apply_updates(adapted.params, updates))
        adapted, opt_state = jlora.run_events(adapted, opt_state, tx, jax.random.key(step), step, say=said.append)
    return adapted, said


def test_it_is_trained_saved_and_goes_to_peft_and_back(tmp_path):
    adapted, said = trained(tmp_path)
    gates = [np.asarray(adapted.params[name]["kernel"]["g"]) for name in PARAMS]
    assert sum(np.count_nonzero(gate) for gate in gates) == 2 and said == ["the ranks are given out"]
    assert all(adapted.frozen[name]["kernel"]["mark"] == 1 for name in PARAMS)
    assert "Rehearsal(rank=2, target=1, alpha=2.0, steps=4)" in jlora.summary(adapted)
    assert "Ranks that are cut once" in jlora.explain(adapted)

    jlora.save(tmp_path / "own", adapted)
    again = jlora.load(tmp_path / "own", PARAMS)
    assert again.plan == adapted.plan and jax.tree.all(jax.tree.map(np.array_equal, again.params, adapted.params))

    names = {"(?P<m>up|down)/kernel": "{m}"}
    jlora.save_peft(tmp_path / "peft", adapted, names)
    told_by = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (told_by["peft_type"], told_by["r"], told_by["lora_alpha"]) == ("LORA", 2, 2.0)
    merged = jlora.merge(jlora.load_peft(tmp_path / "peft", PARAMS, names))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged, jlora.merge(adapted))


def test_a_class_derived_from_it_has_no_part_in_its_peft_form(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Halved(Rehearsal):
        @property
        def scale(self):
            return super().scale / 2

    adapted = jlora.adapterize(PARAMS, {"up/kernel": Halved()}, key=jax.random.key(0))
    adapted = adapted.replace(params=jax.tree.map(lambda leaf: leaf + 1, adapted.params))
    names = {"(?P<m>up|down)/kernel": "{m}"}
    jlora.save_peft(tmp_path / "peft", adapted, names)
    merged = jlora.merge(jlora.load_peft(tmp_path / "peft", PARAMS, names))
    np.testing.assert_allclose(merged["up"]["kernel"], jlora.merge(adapted)["up"]["kernel"], atol=1e-4)


@pytest.mark.long
def test_the_command_line_trains_it(tmp_path, capsys):
    (tmp_path / "data.txt").write_text("A function is called with arguments and returns a value. " * 60)
    small = {"--steps": 6, "--batch": 4, "--max-length": 16, "--sample-tokens": 0, "--max-validation-rows": 4}
    flags = ["--method", "rehearsal", "--rank", "2", "--targets", ".*/q_proj/kernel", "--progress", "lines"]
    flags += [str(each) for pair in small.items() for each in pair]
    assert main(["finetune", *flags, "--data", str(tmp_path / "data.txt"), "--out", str(tmp_path / "run")]) == 0
    assert "the ranks are given out" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "peft")]) == 0


def test_two_methods_of_one_name_are_an_error(monkeypatch):
    class Other(Rehearsal):
        recipes = jlora.LoRA.recipes

    monkeypatch.setattr(jlora.methods, "Rehearsal", Other)
    with pytest.raises(ValueError, match="name 'lora' is that of Other and of another method"):
        catalog.recipes()


def test_no_file_of_the_job_names_a_method():
    classes = set(catalog.methods()) - {"Full"}  # which a head gets
    names = set(catalog.recipes()) - {"rows", "dropout"}  # which data has too, and a setting
    found = []
    for path in sorted((Path(jlora.__file__).parent / "training").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in names:
                found.append((path.name, node.value))
            if isinstance(node, ast.Attribute | ast.Name) and getattr(node, "attr", getattr(node, "id", "")) in classes:
                found.append((path.name, ast.unparse(node)))
    assert found == [("told.py", told.DEFAULT)]
