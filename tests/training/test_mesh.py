"""The job on a mesh of virtual devices: the same training to tolerance, and errors with numbers where it does not fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from little_data import sentences

from jlora.training.errors import SettingError
from jlora.training.hosts.placement import check_batch, make_mesh, mesh_of, rows_of_batch, weight_spec
from jlora.training.job import finetune
from jlora.training.reporting.metrics import read_metrics
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.releases

SMALL = Settings(
    steps=4,
    batch=8,
    accumulate=2,
    max_length=16,
    rank=2,
    targets=".*/(q_proj|down_proj)/kernel",
    learning_rate=3e-2,
    checkpoint_every=2,
    evaluate_every=4,
    sample_tokens=0,
    progress="none",
)


def quiet(text):
    """Takes the lines that the job prints."""


def settings(out, **changes):
    return dataclasses.replace(SMALL, out=str(out), data=sentences(out.parent), **changes)


def losses(out):
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("mesh") / "run"
    return finetune(settings(out), quiet)


@pytest.mark.long
def test_a_mesh_changes_nothing_but_where_things_lie(alone, tmp_path):
    result = finetune(settings(tmp_path / "run", mesh="fsdp=2,tensor=2"), quiet)
    np.testing.assert_allclose(losses(result.out), losses(alone.out), rtol=1e-4)
    layer = result.adapted.base["layers"]["self_attn"]["q_proj"]["kernel"]
    assert layer.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert result.adapted.base["layers"]["input_layernorm"]["scale"].sharding.is_fully_replicated
    factors = result.adapted.params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert "tensor" in factors["b"].sharding.spec and "fsdp" in factors["a"].sharding.spec
    assert "tensor" not in factors["a"].sharding.spec and "fsdp" not in factors["b"].sharding.spec
    for one, other in zip(jax.tree.leaves(result.adapted.params), jax.tree.leaves(alone.adapted.params)):
        np.testing.assert_allclose(one, other, atol=2e-3)


@pytest.mark.once
@pytest.mark.long
def test_a_run_resumes_onto_another_mesh(alone, tmp_path, unplugged):
    with unplugged(3):
        finetune(settings(tmp_path / "run"), quiet)
    before = losses(tmp_path / "run")
    mesh = {"mesh": "data=2,tensor=2", "shard": {".*q_proj/kernel": "None,tensor,None"}}
    result = finetune(settings(tmp_path / "run", **mesh, resume=True), quiet)
    assert result.adapted.base["layers"]["self_attn"]["q_proj"]["kernel"].sharding.spec[1] == "tensor"
    assert losses(result.out)[: len(before)] == before
    np.testing.assert_allclose(losses(result.out), losses(alone.out), rtol=1e-4)
    assert json.loads((result.out / "results.json").read_text())["steps"] == 4


@pytest.mark.once
@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=16", "mesh of data=16 needs 16 devices, but there are 8"),
        ("data=3", "mesh cuts the rows in data=3, but batch 8 / accumulate 2 is 4 rows"),
        ("model=5", r"mesh axis model=5 does not divide the 64 of axis 1 of embed_tokens/embedding \(512, 64\)"),
    ],
)
def test_a_mesh_that_does_not_divide_is_an_error_with_the_numbers(tmp_path, mesh, message):
    with pytest.raises(SettingError, match=message):
        finetune(settings(tmp_path / "run", mesh=mesh), quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.once
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"q_proj/kernel": "None"},
            r"shard can't cut the base: 'q_proj/kernel' matches the whole path of no weight.*self_attn/q_proj",
        ),
        (
            {".*": "None,fsdp"},
            r"shard can't cut the base: layers/\S+: .*\(None, 'fsdp'\) has 2 entries.* \(5, 172, 64\) has 3",
        ),
        ({".*norm/scale": "fsdp,None"}, r"axis fsdp=2 does not divide the 5 of axis 0 of \(5, 64\); cut another axis"),
    ],
)
def test_a_rule_that_fits_no_weight_is_refused_before_any_is_read(tmp_path, monkeypatch, rule, message):
    monkeypatch.setattr("jlora.training.job.load_data", None)
    with pytest.raises(SettingError, match=message):
        finetune(settings(tmp_path / "run", mesh="fsdp=2", shard=rule), quiet)


@pytest.mark.once
def test_two_axes_cut_the_last_two_axes_of_a_matrix_and_vectors_and_layers_are_whole():
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    assert weight_spec("layers/up/kernel", (6, 6, 8), mesh) == PartitionSpec(None, "fsdp", "model")
    assert weight_spec("layers/norm/scale", (6, 8), mesh) == weight_spec("b", (8,), mesh) == PartitionSpec()
    assert weight_spec("classifier/kernel", (8, 3), mesh) == PartitionSpec()
    with pytest.raises(
        SettingError, match=r"axis fsdp=2 does not divide the 5 of axis 0 of w/kernel \(5, 8\); say by --sh"
    ):
        weight_spec("w/kernel", (5, 8), mesh)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh needs to know of a device."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


@pytest.mark.once
def test_data_goes_across_slices_and_the_rest_within():
    chips = [Chip(number, number % 2) for number in range(8)]
    mesh = mesh_of({"fsdp": 2, "data": 4}, chips)
    assert mesh.axis_names == ("fsdp", "data") and mesh.devices.shape == (2, 4)
    assert [[chip.slice_index for chip in row] for row in mesh.devices] == [[0, 0, 1, 1]] * 2
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(8))
    with pytest.raises(SettingError, match="mesh lies on 2 slices.*data must be a multiple of 2, got data=1, fsdp=8"):
        mesh_of({"data": 1, "fsdp": 8}, chips)
    with pytest.raises(
        SettingError, match="mesh takes 4 of slice 0, 3 of slice 1: it must take as many devices of each"
    ):
        mesh_of({"data": 7}, chips[:7])


@pytest.mark.once
def test_kernels_back_to_the_models_width_are_cut_the_other_way_round():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    for path in (
        "layers/self_attn/o_proj/kernel",
        "layers_0/mlp/down_proj/kernel",
        "layer_1/attention/output/dense/kernel",
    ):
        assert weight_spec(path, (3, 16, 32), mesh) == PartitionSpec(None, "tensor", "fsdp")
    assert weight_spec("o_proj/kernel", (16, 32), make_mesh({"tensor": 8})) == PartitionSpec("tensor", None)


@pytest.mark.once
def test_fsdp_cuts_the_rows_and_the_weights():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    assert rows_of_batch(mesh, 1).spec == PartitionSpec(None, ("fsdp",))
    assert weight_spec("up/kernel", (3, 16, 32), mesh) == PartitionSpec(None, "fsdp", "tensor")
    with pytest.raises(SettingError, match=r"cuts the rows in fsdp=2, but batch 6 / accumulate 2 is 3 rows"):
        check_batch(mesh, 6, 2)
