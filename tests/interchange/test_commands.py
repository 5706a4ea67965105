"""`jlora import`, `export` and `merge`: from PEFT to a run, and back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import models
from jlora.models.merged import MergedLeaf, lazily_merged
from jlora.training.cli import main
from jlora.training.commands.runs import open_run

pytestmark = pytest.mark.once

LORA = jlora.LoRA(rank=4, alpha=6, init="random")


@pytest.fixture(scope="module")
def base():
    return models.load(models.STORIES260K)


@pytest.fixture(scope="module")
def adapted(base):
    model, params = base
    sites = jlora.sites(lambda p, x: model.apply({"params": p}, x), params, jnp.ones((1, 4), int))
    return jlora.adapterize(params, {r".*/(q|down)_proj/kernel": LORA, "norm/scale": jlora.Full()}, sites=sites)


@pytest.fixture(scope="module")
def peft(base, adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    jlora.save_peft(folder, adapted, models.peft_names(base[0]))
    return folder


@pytest.fixture(scope="module")
def run(peft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(["import", str(peft), "--to", str(folder)]) == 0
    return folder


def test_an_imported_adapter_is_a_run_that_goes_out_again_with_the_same_bytes(run, peft, tmp_path, capsys):
    assert sorted(file.name for file in run.iterdir()) == ["adapters", "settings.json"]
    assert main(["export", str(run / "adapters"), "--to", str(tmp_path / "out")]) == 0
    assert "adapter written to" in capsys.readouterr().out
    for file in ("adapter_model.safetensors", "jlora_manifest.json"):
        assert (tmp_path / "out" / file).read_bytes() == (peft / file).read_bytes()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(models.STORIES260K)


@pytest.mark.once
def test_an_adapter_is_imported_onto_the_quantized_base_that_it_was_trained_on(peft, adapted, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["import", str(peft), "--to", str(folder), "--quantize", "nf4"]) == 0
    said = capsys.readouterr().out
    assert "6 leaves kept as NF4(double=True)" in said
    assert "note  --quantize nf4 leaves layers/mlp/down_proj/kernel as it is: block 64 must divide the 172 rows" in said
    opened = open_run(folder).adapted
    jax.tree.map(np.testing.assert_array_equal, opened.params, adapted.params)
    assert isinstance(opened.base["layers"]["self_attn"]["q_proj"]["kernel"], jlora.Stored)


def test_an_imported_adapter_has_no_training_to_go_on_with(run, capsys):
    assert main(["finetune", "--out", str(run), "--resume"]) == 2
    assert f"jlora finetune: {run} holds an adapter imported from" in capsys.readouterr().err


def test_a_run_is_merged_one_leaf_at_a_time_into_a_directory_that_loads(run, adapted, tmp_path, monkeypatch):
    formed = []
    values = MergedLeaf.__array__

    def count(self, *arguments, **options):
        formed.append(self not in self._last)
        array = values(self, *arguments, **options)
        assert len(self._last) == 1
        return array

    monkeypatch.setattr(MergedLeaf, "__array__", count)
    assert main(["merge", str(run), str(tmp_path / "out")]) == 0
    _, params = models.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, jlora.merge(adapted))
    assert sum(formed) == len(adapted.plan.sites)


def test_a_lazy_merge_has_the_shapes_dtypes_and_values_of_a_merge(adapted):
    lazy, merged = lazily_merged(adapted), jlora.merge(adapted)
    leaves = jax.tree.leaves(lazy, is_leaf=lambda leaf: isinstance(leaf, MergedLeaf))
    for leaf, whole in zip(leaves, jax.tree.leaves(merged), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.size) == (whole.shape, whole.dtype, whole.size)
        np.testing.assert_array_equal(np.asarray(leaf), whole)
        np.testing.assert_array_equal(np.asarray(leaf[0]), whole[0])


def test_an_export_for_servers_refuses_what_they_ignore_and_truncates_on_request(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--profile", "serving"]) == 2
    assert "jlora export: norm/scale: Full() is no low-rank adapter" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--svd-rank", "2", "--dtype", "bfloat16"]) == 0
    assert "layers/mlp/down_proj/kernel: truncated, relative residual" in capsys.readouterr().out
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        "bfloat16"
    }


def test_two_runs_become_one_whose_change_is_their_sum(run, adapted, base, tmp_path, capsys):
    command = ["merge-adapters", str(run), str(run), "--weights=1.5,-0.5", "--to", str(tmp_path / "both")]
    assert main(command) == 0
    assert "run written to" in capsys.readouterr().out
    both = jlora.load(tmp_path / "both" / "adapters", base[1])
    ranks = {site.path: getattr(site.method, "rank", None) for site in both.plan.sites}
    assert ranks["layers/self_attn/q_proj/kernel"] == 8 and ranks["norm/scale"] is None
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jlora.merge(both), jlora.merge(adapted))
    about = json.loads((tmp_path / "both" / "settings.json").read_text())
    assert about["combined"] == [str(run)] * 2 and about["weights"] == [1.5, -0.5]
    assert main(["generate", str(tmp_path / "both"), "--prompt", "Once", "--tokens", "2"]) == 0
    capsys.readouterr()
    assert main(command) == 2 and "exists already" in capsys.readouterr().err
    assert main(["finetune", "--out", str(tmp_path / "both"), "--resume"]) == 2
    assert "holds an adapter combined from" in capsys.readouterr().err
    for more, message in {
        "--weights=1": "--weights must be 2 numbers, one for each run, got 1",
        "--density=0.5": "'cat' keeps all entries: leave density out",
    }.items():
        assert main([*command[:-1], str(tmp_path / "third"), more]) == 2 and message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["both"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["import", "nothing", "--to", "out"], "nothing: no such folder; an adapter is a folder with"),
        (["export", "nothing", "--to", "out"], "nothing holds no run"),
        (["import", "{peft}", "--to", "{peft}"], "exists already; choose a new folder"),
        (
            ["import", "{peft}", "--to", "out", "--quantize", "nf5"],
            "quantize must be one of nf4, int8, int4, fp8, nf3, nf2, got 'nf5'",
        ),
    ],
)
def test_what_a_user_got_wrong_is_one_sentence(arguments, message, peft, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(peft=peft) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_model_is_refused_and_nothing_is_written(peft, tmp_path, capsys):
    other = Path(__file__).parents[1] / "models" / "golden" / "llama_yarn"
    assert main(["import", str(peft), "--model", str(other), "--to", str(tmp_path / "run")]) == 2
    assert "jlora import:" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
