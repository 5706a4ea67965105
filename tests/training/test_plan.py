"""`jlora plan`: what is counted is what a run has, and what can't be known is said."""

import dataclasses
import json
import re

import jax
import pytest
from jax.experimental import topologies

import jlora
from jlora.models import STORIES260K
from jlora.training.cli import main
from jlora.training.commands import plan
from jlora.training.commands.chips import CHIPS
from jlora.training.errors import SettingError
from jlora.training.hosts.placement import make_mesh, on_mesh, place_adapters, place_base
from jlora.training.model.selection import make_spec, trace_sites
from jlora.training.model.subject import load_subject, open_codec
from jlora.training.run.schedule import make_optimizer
from jlora.training.settings.axes import mesh_axes
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once

SMALL = Settings(mesh="fsdp=2,tensor=2", batch=8, max_length=16, rank=2)
ARGUMENTS = ["plan", "--device", "v5e", "--mesh", "fsdp=2,tensor=2", "--batch", "8", "--length", "16", "--rank", "2"]


@pytest.fixture
def no_compiler(monkeypatch):
    def missing(**_):
        raise RuntimeError("not installed")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)


@pytest.fixture
def of_cpus(monkeypatch):
    """XLA's compiler for the CPU in the place of a TPU's."""
    monkeypatch.setattr(plan, "described", lambda chip, chips, slices: jax.devices()[:chips])


def on_first_device(tree):
    first = jax.devices()[0]
    return sum(x.data.nbytes for leaf in jax.tree.leaves(tree) for x in leaf.addressable_shards if x.device == first)


@pytest.mark.long
@pytest.mark.parametrize("changes", [{"quantize": "int8", "method": "adalora"}, {"method": "vera"}], ids=str)
def test_the_bytes_that_are_counted_are_those_of_the_run_itself(changes, no_compiler):
    settings = resolve(dataclasses.replace(SMALL, **changes))
    found = plan.make_plan(settings, CHIPS["v5e"], 1)
    codec, config = open_codec(settings)
    subject, mesh = load_subject(settings, codec, config), make_mesh(mesh_axes(settings.mesh))
    subject = dataclasses.replace(subject, params=place_base(subject.params, mesh))
    spec, sites = make_spec(subject, settings), trace_sites(subject, settings)
    adapted = place_adapters(jlora.adapterize(subject.params, spec, sites=sites), mesh)
    state = on_mesh(make_optimizer(adapted, found.settings).init(adapted.params), mesh)
    for planned, real in [
        (found.adapted.base, adapted.base),
        (found.adapted.params, adapted.params),
        (found.adapted.frozen, adapted.frozen),
        (found.state.opt_state, state),
    ]:
        assert plan.bytes_on_chip(planned) == on_first_device(real)
        assert jax.tree.structure(planned) == jax.tree.structure(real)


def test_without_a_compiler_a_config_is_enough_and_what_is_not_counted_is_said(tmp_path, capsys, no_compiler):
    config = json.loads((STORIES260K / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([*ARGUMENTS, "--model", str(tmp_path / "config.json"), "--shard", ".*q_proj/kernel=None,tensor,-"]) == 2
    assert "'.*q_proj/kernel' must say for each axis" in capsys.readouterr().err
    rule = ["--shard", ".*q_proj/kernel=None,fsdp+tensor,None"]
    assert main([*ARGUMENTS, "--model", str(tmp_path / "config.json"), *rule]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "260,032 parameters in bfloat16 (as its config says)" in lines[0]
    assert lines[1] == "mesh fsdp=2 x tensor=2: 4 chips of v5e, 4 of 8 rows of 16 tokens on a chip at once"
    assert "layers/self_attn/q_proj/kernel 5x64x64 bfloat16 -, fsdp+tensor, - 0.010" in lines
    assert "layers/mlp/down_proj/kernel 5x172x64 bfloat16 -, tensor, fsdp 0.028" in lines
    assert "norm/scale 64 bfloat16 whole 0.000" in lines
    assert "weights 0.131 counted" in lines
    assert "in all 0.202 of 16,000: fits so far, the step not counted" in lines
    assert any(
        line.startswith("not counted: no compiler for v5e is found here (RuntimeError: not inst") for line in lines
    )


@pytest.mark.long
def test_with_a_compiler_the_step_of_the_job_is_compiled(of_cpus):
    found = plan.make_plan(resolve(SMALL), CHIPS["v5e"], 1)
    arguments, besides = found.compiled()
    counted = plan.bytes_on_chip((found.adapted, found.state.opt_state))
    batch = 5 * 4 * 4 * 16
    assert 0 <= arguments - counted - batch < 64  # the step's number and the key
    assert besides > 4 * 512 * 16 * 4 / 4  # logits of four rows in float32, over the whole mesh at most
    text, large = plan.report(found)
    assert f"activations, gradients, buffers  {besides / 1e6:>11,.3f}  likewise" in text and not large
    assert "of 16,000: fits\n" in text and "not counted" not in text


def test_what_does_not_fit_ends_in_a_sentence_and_exit_code_3(monkeypatch, capsys, no_compiler):
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=2e5))
    assert main(ARGUMENTS) == 3
    assert capsys.readouterr().err == "jlora plan: does not fit into the memory of v5e\n"


def test_a_compiler_that_finds_no_program_is_quoted(monkeypatch, of_cpus):
    def refuse(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 20G of 15G")

    monkeypatch.setattr(plan.Plan, "compiled", refuse)
    text, large = plan.report(plan.make_plan(resolve(SMALL), CHIPS["v5e"], 1))
    assert (
        large
        and "v5e finds no program that fits: RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Us" in text
    )
    assert "inf  of 16,000: does not fit" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slices", "2"], "--mesh lies on 2 slices, between which only rows are cut.*got fsdp=2, tensor=2"),
        (["--device", "h100", "--mesh", "data=2", "--slices", "2"], "--slices are of TPUs; h100 has none"),
        (["--device", "h100", "--mesh", "data=12"], "--mesh is of 12 GPUs, but those of several hosts come in eights"),
        (["--mesh", "fsdp=6"], "--mesh is of 6 chips a slice, but slices of v5e have 1, 2, 4, 8, … up to 256"),
        (["--mesh", "fsdp=512"], "--mesh is of 512 chips a slice, but slices of v5e have"),
        (["--batch", "3"], "--mesh cuts the rows in fsdp=2, but batch 3 / accumulate 1 is 3 rows"),
        (["--model", "nowhere"], "nowhere/config.json: no such file"),
    ],
)
def test_what_can_not_be_planned_is_one_sentence(arguments, message, capsys, no_compiler):
    assert main([*ARGUMENTS, *arguments]) == 2
    assert re.match(f"jlora plan: {message}", capsys.readouterr().err)


def test_slices_are_as_even_as_powers_of_two_are():
    shapes = {chips: "x".join(map(str, CHIPS["v5e"].shape(chips))) for chips in (1, 2, 4, 8, 256)}
    assert shapes == {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 256: "16x16"}
    assert [CHIPS["v5p"].shape(chips) for chips in (4, 8, 16, 64)] == [(2, 2, 1), (2, 2, 2), (2, 2, 4), (4, 4, 4)]
    with pytest.raises(SettingError, match="of 12 chips a slice"):
        CHIPS["v5p"].shape(12)
