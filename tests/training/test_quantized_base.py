"""A base that is kept as a code, by `--quantize` or by its files: the run records it, and all that opens the run has it so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from little_data import sentences

import jlora
from jlora import models
from jlora.stored import NF4
from jlora.training.commands.actions import _inspected
from jlora.training.commands.runs import evaluate_file, open_run, write_merged
from jlora.training.errors import SettingError
from jlora.training.job import finetune
from jlora.training.model.prepared import prepared
from jlora.training.model.samples import runnable
from jlora.training.model.selection import make_spec, trace_sites
from jlora.training.model.subject import load_subject, memory, open_codec
from jlora.training.run.record import read_settings
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once

NARROW = {r".*/down_proj/kernel": None, jlora.ALL_LINEAR: NF4(double=True)}
REFUSED = "--quantize nf4 leaves layers/mlp/down_proj/kernel as it is: block 64 must divide the 172 rows of the 172 x 64 matrix"


def settings_of(folder, **changes):
    return Settings(
        **{
            "steps": 2, "batch": 4, "max_length": 16, "rank": 2, "targets": ".*/(q|down)_proj/kernel", "sample_tokens": 4,
            "progress": "none", "data": sentences(folder), "quantize": "nf4", "out": str(folder / "run"), **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("quantized")
    lines = []
    result = finetune(settings_of(folder), lines.append)
    return result, "\n".join(lines), folder


@pytest.mark.long
def test_the_run_says_bits_and_bytes_and_what_is_left_out(run):
    result, said, folder = run
    assert "float32 (as in its files), linear weights as NF4(double=True), 0.44 MB" in said
    assert "6 leaves kept as NF4(double=True): 171,520 values of 4.136 bits, 0.1 MB" in said
    assert f"note  {REFUSED}\n" in said
    about = read_settings(folder / "run")
    assert (about["settings"]["quantize"], REFUSED in about["notes"]) == ("nf4", True)
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.long
def test_a_run_on_a_quantized_base_ends_within_two_percent_of_the_plain_one(tmp_path):
    """As the default job does, whose figures are in docs/quantization.md."""
    losses = {}
    for code in (None, "nf4"):
        asked = settings_of(
            tmp_path, quantize=code, steps=30, batch=8, rank=8, targets=None, out=str(tmp_path / str(code))
        )
        found = finetune(asked, lambda text: None)
        losses[code] = found.after["loss"]
        assert found.after["loss"] < 0.9 * found.before["loss"]
    assert losses["nf4"] < 1.02 * losses[None], losses


@pytest.mark.long
def test_what_opens_the_run_has_the_base_that_it_trained_on(run, tmp_path):
    _, _, folder = run
    opened = open_run(folder / "run")
    _, wanted = models.load(models.STORIES260K, quantize=NARROW)
    assert jax.tree.structure(opened.subject.params) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, opened.subject.params, wanted)
    data = sentences(tmp_path)
    trained, base = (evaluate_file(opened, data, 8, base=base)["loss"] for base in (False, True))
    apply, params = runnable(opened.subject.model.apply, opened.adapted)
    assert params is opened.adapted  # no decoded base is formed to write text
    assert len(models.generate(apply, params, [[1, 2]], max_new_tokens=4)) == 1
    write_merged(opened, tmp_path / "merged")
    merged = dataclasses.replace(opened.settings, model=str(tmp_path / "merged"), quantize=None)
    subject = load_subject(merged, *open_codec(merged))
    plain = dataclasses.replace(opened, subject=subject, adapted=jlora.adapterize(subject.params, {}))
    assert abs(evaluate_file(plain, data, 8)["loss"] - trained) < 1e-5 < abs(base - trained)


@pytest.mark.once
def test_a_start_from_a_residual_is_of_what_the_base_lost(tmp_path):
    settings = settings_of(tmp_path, method="lora", init="residual", task="classify")
    subject = load_subject(settings, *open_codec(settings)).with_head(["yes", "no"])
    sites = trace_sites(subject, settings)
    spec = make_spec(subject, settings)
    found = prepared(spec, subject, settings, sites, None, None, jax.random.key(0))
    adapted = jlora.adapterize(subject.params, spec, sites=sites, prepared=found)
    kernel = lambda tree: tree["layers"]["self_attn"]["q_proj"]["kernel"]
    _, plain = models.load(models.STORIES260K, drop_heads=True)
    trees = plain, jlora.merge(adapted)["backbone"], jlora.dequantize(subject.params)["backbone"]
    for w, merged, base in zip(*(np.asarray(kernel(tree)) for tree in trees)):
        u, s, v = np.linalg.svd(w - base)
        np.testing.assert_allclose(merged - base, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)


@pytest.mark.long
def test_a_run_goes_on_with_the_same_base_alone(run):
    _, _, folder = run
    asked = dataclasses.replace(settings_of(folder), resume=True)
    assert finetune(asked, lambda text: None).record["resumed_at"] == 2
    with pytest.raises(SettingError, match="is 'int8', but the run in .* was started with 'nf4', which must stay"):
        finetune(dataclasses.replace(asked, quantize="int8"), lambda text: None)


def test_the_subject_of_a_job_is_encoded_and_says_what_is_not():
    asked = Settings(quantize="nf4")
    subject = load_subject(asked, *open_codec(asked))
    _, wanted = models.load(models.STORIES260K, quantize=NARROW)
    assert jax.tree.structure(subject.params) == jax.tree.structure(wanted)
    assert subject.notes == (REFUSED,)
    assert memory(subject, asked) == "float32 (as in its files), linear weights as NF4(double=True), 0.44 MB"
    adapted = jlora.adapterize(subject.params, {r".*/q_proj/kernel": jlora.LoRA(2)})
    assert runnable(subject.model.apply, adapted)[1] is adapted  # no decoded base is formed to write text


@pytest.mark.once
def test_a_method_that_trains_the_weight_itself_is_refused_by_the_leaf(tmp_path):
    asked = settings_of(tmp_path, method="full", rank=None, targets=None)
    with pytest.raises(ValueError, match=r"gate_proj/kernel is kept as NF4.*, and Full\(\) trains the leaf itself"):
        finetune(asked, lambda text: None)


def test_a_model_of_bitsandbytes_is_a_base_as_it_is(tmp_path):
    model, params = models.load(models.STORIES260K, quantize=NARROW)
    models.save(tmp_path / "bnb", model, params, models.STORIES260K, format="bitsandbytes")
    asked = settings_of(tmp_path, model=str(tmp_path / "bnb"), quantize=None)
    subject = load_subject(asked, *open_codec(asked))
    jax.tree.map(np.testing.assert_array_equal, subject.params, params)
    assert memory(subject, asked) == "float32 (as in its files), linear weights as NF4(double=True), 0.44 MB"
    twice = dataclasses.replace(asked, quantize="nf4")
    with pytest.raises(SettingError, match="nf4: .*bnb is quantized already"):
        load_subject(twice, *open_codec(twice))
    assert "6 leaves kept as NF4(double=True)" in _inspected(resolve(asked))


@pytest.mark.once
def test_a_classifier_has_a_quantized_backbone_and_a_plain_head(tmp_path):
    asked = settings_of(tmp_path, quantize="int8", task="classify", dtype="bfloat16")
    subject = load_subject(asked, *open_codec(asked)).with_head(["a", "b"])
    assert subject.params["classifier"]["kernel"].dtype == jnp.float32
    leaf = subject.params["backbone"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert isinstance(leaf, jlora.Stored) and leaf.dtype == jnp.bfloat16
    assert "linear weights as Int8(), 0.31 MB" in memory(subject, asked)


@pytest.mark.once
def test_inspect_tells_of_codes_and_reads_no_weights(monkeypatch):
    monkeypatch.setattr(models, "load", None)
    assert "6 leaves kept as NF4(double=True): 171,520 values of 4.136 bits" in _inspected(
        resolve(Settings(quantize="nf4"))
    )
