"""`--adapter`: a run goes on from saved adapters of any format, with exactly their values."""

import dataclasses
import json
import shutil
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from little_data import sentences
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models
from jlora.disk import folders
from jlora.training import finetune as finetune_by_names
from jlora.training.cli import main
from jlora.training.data.dataset import load_data
from jlora.training.errors import CheckpointError, SettingError
from jlora.training.job import finetune
from jlora.training.model.subject import load_subject, open_codec
from jlora.training.run.continued import Source, notes_on, read_adapters, source_of
from jlora.training.run.record import read_settings
from jlora.training.settings.configuration import gather
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings
from jlora.training.sweep.job import sweep

pytestmark = pytest.mark.once
SMALL = Settings(
    steps=4,
    batch=8,
    max_length=16,
    learning_rate=1e-2,
    schedule="constant",
    warmup=0,
    clip=0.0,
    max_validation_rows=1,
    checkpoint_every=2,
    evaluate_every=2,
    sample_tokens=0,
    progress="none",
)
LORA = {"rank": 2, "alpha": 6.0, "targets": ".*/(q|v)_proj/kernel"}


def quiet(text):
    """Takes the lines that the job prints."""


class Labelled:
    """Data of two labels that are no chats."""

    labels, template = ["no", "yes"], None


class Chats:
    """Data of chats that one template writes."""

    labels = ()

    class template:
        texts = staticmethod(lambda: {"default": "b"})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return dataclasses.replace(SMALL, data=sentences(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def first(small, tmp_path_factory):
    """A finished run of new adapters, and a folder in PEFT's format with them."""
    out = tmp_path_factory.mktemp("first")
    result = finetune(dataclasses.replace(small, out=str(out / "run"), **LORA), quiet)
    model, _ = models.load(models.STORIES260K)
    jlora.save_peft(out / "peft", result.adapted, models.peft_names(model))
    jlora.save(out / "saved", result.adapted)
    return result


def folder_of(first, kind):
    return str(first.out.parent / kind)


def next_run(small, first, kind, out, **changes):
    return dataclasses.replace(small, adapter=folder_of(first, kind), out=str(out), **changes)


@pytest.fixture(scope="module")
def wanted(small, first):
    """The adapters after one more step from those of the first run, with the products of their factors formed by hand."""
    settings = resolve(small)
    codec, config = open_codec(settings)
    subject, data = load_subject(settings, codec, config), load_data(settings, codec, datetime.now())
    batch = jax.tree.map(jnp.asarray, next(data.training_batches(settings.batch, settings.seed)))

    def loss(trained):
        params = jax.tree.map(lambda leaf: leaf, subject.params)
        for name, site in trained["layers"]["self_attn"].items():
            kernel, arrays = params["layers"]["self_attn"][name]["kernel"], site["kernel"]
            change = jnp.einsum("lir,lro->lio", arrays["a"], arrays["b"]) * (LORA["alpha"] / LORA["rank"])
            params["layers"]["self_attn"][name]["kernel"] = kernel + change
        losses = optax.softmax_cross_entropy_with_integer_labels(subject.forward(params, batch), batch["targets"])
        return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])

    grads = jax.jit(jax.grad(loss))(first.adapted.params)
    # AdamW's first step from moments of zero.
    return jax.tree.map(
        lambda x, g: x - settings.learning_rate * g / (abs(g) + 1e-8), first.adapted.params, grads
    ), grads


@pytest.fixture(scope="module", params=["run", "peft"])
def next_of(request, small, first, tmp_path_factory):
    """A run of one step from a copy of a folder, and what it printed; a folder of PEFT's own has no manifest of jlora's."""
    out, said = tmp_path_factory.mktemp("next"), []
    without = shutil.ignore_patterns("jlora_manifest.json", "checkpoints")
    adapter = shutil.copytree(folder_of(first, request.param), out / request.param, ignore=without)
    return finetune(dataclasses.replace(small, adapter=str(adapter), out=str(out / "next"), steps=1), said.append), said


def test_a_run_goes_on_with_the_values_of_the_folder(next_of, first, wanted):
    result, _ = next_of
    assert result.before == first.after
    assert result.adapted.plan.sites[0].method == jlora.LoRA(rank=2, alpha=6.0)
    values, grads = wanted
    for found, value, grad in zip(*map(jax.tree.leaves, (result.adapted.params, values, grads)), strict=True):
        clear = abs(grad) > 1e-6  # below, what a step is depends on rounding
        assert clear.mean() > 0.9
        np.testing.assert_allclose(found[clear], value[clear], atol=2e-5)


def test_settings_and_report_say_what_it_went_on_from(next_of):
    result, said = next_of
    stored = read_settings(result.out)
    adapter = stored["asked"]["adapter"]
    assert stored["continued"]["adapter"] == adapter and len(stored["continued"]["sha256"]) == 64
    assert stored["settings"]["method"] is None and stored["settings"]["rank"] is None
    assert f"goes on from the adapters in {adapter}" in said
    page = (result.out / "report.html").read_text()
    assert f"going on from the adapters in {Path(adapter).name}" in page and stored["continued"]["sha256"] in page


def test_a_run_is_not_resumed_from_a_changed_folder(next_of, small, first):
    result, _ = next_of
    stored = read_settings(result.out)["asked"]
    resumed = dataclasses.replace(Settings(**stored), resume=True)
    with pytest.raises(
        SettingError, match=r"adapter is '\S+saved', but the run in \S+ was started with '\S+', which must"
    ):
        finetune(dataclasses.replace(resumed, adapter=folder_of(first, "saved")), quiet)
    shutil.rmtree(resumed.adapter)
    params = jax.tree.map(lambda leaf: leaf * (1 + 1e-6), first.adapted.params)
    jlora.save(resumed.adapter, first.adapted.replace(params=params))
    with pytest.raises(CheckpointError, match=r"the adapters in \S+ are not those that the run in \S+next was started"):
        finetune(resumed, quiet)


@pytest.mark.parametrize("kind", ["run", "run/adapters", "saved", "peft"])
def test_each_kind_of_folder_has_the_same_adapters(kind, small, first):
    settings = resolve(dataclasses.replace(small, adapter=folder_of(first, kind)))
    assert source_of(settings).folder == Path(folder_of(first, kind.removesuffix("/adapters")))
    found = read_adapters(load_subject(settings, *open_codec(settings)), settings)
    assert jlora.fingerprint(found.params) == jlora.fingerprint(first.adapted.params)


def test_a_stopped_run_goes_on_to_the_same_bits(small, first, stopped_and_resumed, tmp_path):
    settings = next_run(small, first, "peft", "")
    assert stopped_and_resumed(settings, at=2).before == first.after


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "lora"), ("rank", 4), ("alpha", 8.0), ("dropout", 0.1), ("init", "pissa"), ("targets", ".*"),
        ("links", 2), ("set", {"init": "olora"}), ("spec", {".*": {"method": "LoRA"}}),
    ],
)  # fmt: skip
def test_what_says_how_adapters_are_is_refused_beside_them(name, value):
    with pytest.raises(SettingError, match=f"^{name} can't be given with adapter run, .* got ") as error:
        Settings(adapter="run", **{name: value})
    assert error.value.setting == name
    with pytest.raises(SettingError, match=f"^--{name} can't"):
        gather({"adapter": "run", name: value}).settings()


@pytest.mark.parametrize("name", ["rank", "alpha", "init"])
def test_what_adapters_have_is_not_swept(name):
    with pytest.raises(SettingError, match=f"sweep {name} can't be given with adapter run"):
        Settings(adapter="run", sweep={name: ["2", "4"]})


def test_adapters_of_another_base_are_refused(small, first, tmp_path):
    shutil.copytree(models.STORIES260K, tmp_path / "other")
    (file,) = (tmp_path / "other").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.asarray(1.5, tensors["model.norm.weight"].dtype)
    save_file(tensors, file, {"format": "pt"})
    settings = next_run(small, first, "run", tmp_path / "next", model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="was made for another base: fingerprint"):
        finetune(settings, quiet)
    assert not (tmp_path / "next").exists()


def test_folders_without_adapters_are_refused_before_data_are_read(first, tmp_path):
    def refused(adapter, error, match, **changes):
        with pytest.raises(error, match=match):
            finetune(Settings(adapter=str(adapter), data="nowhere.txt", out=str(tmp_path / "next"), **changes), quiet)

    refused(tmp_path / "none", FileNotFoundError, "none: no such folder")
    refused(tmp_path, ValueError, "holds no adapters: wanted one of the files jlora.json, adapter_config.json")
    refused(first.out, SettingError, "of --task lm, and this one is of --task classify", task="classify")
    shutil.copytree(first.out, tmp_path / "run", ignore=shutil.ignore_patterns("adapters"))
    (tmp_path / "run" / "results.json").unlink()
    refused(tmp_path / "run", CheckpointError, "the run is not finished; go on with jlora finetune --out")
    stored = json.loads((tmp_path / "run" / "settings.json").read_text())
    stored["settings"]["seeds"] = 2
    (tmp_path / "run" / "settings.json").write_text(json.dumps(stored))
    refused(tmp_path / "run", CheckpointError, "holds a sweep: name one of its runs")


@pytest.mark.parametrize(
    "method",
    [jlora.AdaLoRA(4, 2, steps=10), jlora.DoRA(jlora.SoRA(4, steps=10)), jlora.Chain(jlora.LoRA(2), steps=4, links=2)],
    ids=lambda method: type(method).__name__,
)
def test_methods_that_follow_the_steps_of_their_run_are_refused(method, small, tmp_path):
    model, params = models.load(models.STORIES260K)
    shape = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    sites = jlora.sites(lambda params, x: model.apply({"params": params}, x), params, shape)
    jlora.save(tmp_path / "saved", jlora.adapterize(params, {".*/q_proj/kernel": method}, sites=sites))
    settings = resolve(dataclasses.replace(small, adapter=str(tmp_path / "saved")))
    with pytest.raises(SettingError, match=r"adapter \S+saved has .* which follows the steps of the run"):
        read_adapters(load_subject(settings, *open_codec(settings)), settings)
    if isinstance(method, jlora.DoRA):
        return
    plain = jlora.combine([folders.read(tmp_path / "saved", params)], [1.0])
    assert type(plain.plan.sites[0].method) is jlora.LoRA  # as the message proposes


@pytest.mark.parametrize("kind", ["run", "peft"])
def test_inspect_and_plan_show_the_adapters(kind, first, capsys):
    capsys.readouterr()
    assert main(["inspect", "--adapter", folder_of(first, kind)]) == 0
    shown = capsys.readouterr().out
    assert "layers/self_attn/q_proj/kernel" in shown and "LoRA(rank=2, alpha=6.0)" in shown
    trained = f"trained {first.record['trained_values']:,} of"
    assert trained in shown and "k_proj" not in shown.split("what would be trained")[1]
    assert main(["plan", "--device", "v5e", "--adapter", folder_of(first, kind), "--mesh", "fsdp=2"]) == 0
    assert trained in capsys.readouterr().out


@pytest.mark.long
def test_runs_of_a_sweep_go_on_from_the_same_adapters(small, first, tmp_path):
    settings = next_run(small, first, "peft", tmp_path / "sweep", steps=2, evaluate_every=1, learning_rate=None)
    result = sweep(dataclasses.replace(settings, sweep={"learning_rate": [1e-3, 1e-2]}), quiet)
    assert len(result.runs) == 2
    for run in result.runs:
        assert run.record["before"]["loss"] == pytest.approx(first.after["loss"], rel=1e-5)
        stored = read_settings(tmp_path / "sweep" / "runs" / run.name)
        assert stored["continued"] == read_settings(tmp_path / "sweep")["continued"]
        assert run.record["after"]["loss"] < run.record["before"]["loss"]


@pytest.mark.long
def test_a_classifier_goes_on_with_its_head(tmp_path):
    rows = [{"text": f"{word} and more", "label": label} for word, label in (("good", "yes"), ("bad", "no")) * 10]
    values = {"task": "classify", "data": rows, "validation": rows, "batch": 4, "steps": 2, "max_length": 8}
    values |= {"progress": "none", "say": quiet}
    first = finetune_by_names(rank=2, out=tmp_path / "first", **values)
    result = finetune_by_names(adapter=tmp_path / "first", out=tmp_path / "next", **values)
    assert result.before == first.after
    said = {"adapter": str(first.out), "out": "", "task": "classify", "data": "rows"}
    assert notes_on(source_of(Settings(**said)), Settings(**said), Labelled) == []
    said["adapter"] = str(shutil.copytree(first.out / "adapters", tmp_path / "bare"))
    (note,) = notes_on(source_of(Settings(**said)), Settings(**said), Labelled)
    assert note.endswith(
        "does not say what labels its head was trained for: it is taken for one of no, yes, in this order"
    )
    other = [row | {"label": {"yes": "true", "no": "false"}[row["label"]]} for row in rows]
    with pytest.raises(SettingError, match="was trained on the labels no, yes, but the data has false, true"):
        finetune_by_names(adapter=first.out, out=tmp_path / "c", **(values | {"data": other, "validation": other}))
    headless = first.adapted.replace(
        params={"backbone": first.adapted.params["backbone"]},
        plan=dataclasses.replace(
            first.adapted.plan, sites=tuple(s for s in first.adapted.plan.sites if s.keys[0] == "backbone")
        ),
    )
    jlora.save(tmp_path / "headless", headless)
    with pytest.raises(SettingError, match="headless has no trained classifier/bias, which --task classify needs"):
        finetune_by_names(adapter=tmp_path / "headless", out=tmp_path / "d", **values)


def test_virtual_tokens_go_on_where_the_model_has_room_for_them(small, tmp_path):
    model, params = models.load(models.STORIES260K)
    shape = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    sites = jlora.sites(lambda params, x: model.apply({"params": params}, x), params, shape)
    adapted = jlora.adapterize(params, {".*/(k|v)_proj/kernel": jlora.PrefixTuning(3)}, sites=sites)
    jlora.save(tmp_path / "saved", adapted)
    jlora.save_peft(tmp_path / "peft", adapted, models.peft_names(model), prefix=models.peft_prefix(model))
    for kind in ("saved", "peft"):
        settings = resolve(dataclasses.replace(small, adapter=str(tmp_path / kind)))
        subject = load_subject(settings, *open_codec(settings))
        found = read_adapters(subject, settings)
        for one, other in zip(*(jax.tree.leaves(each.params) for each in (found, adapted)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
        with pytest.raises(
            SettingError, match="max_length of 512 and 3 virtual tokens are more than the 512 positions"
        ):
            read_adapters(subject, dataclasses.replace(settings, max_length=512))


def test_the_reference_of_preferences_is_told():
    settings = Settings(task="preference", data="pairs.jsonl", adapter="run")
    (note,) = notes_on(Source("run", Path("run"), {"labels": []}), settings, Chats)
    assert note.startswith("the reference is the base without adapters")


def test_another_chat_template_is_told(first, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("a")
    notes = notes_on(Source("run", Path(tmp_path), {"labels": []}), Settings(), Chats)
    assert notes == [f"run was trained on chats of another template, which lies in {tmp_path}"]
    (tmp_path / "chat_template.jinja").write_text("b")
    assert notes_on(Source("run", Path(tmp_path), {"labels": []}), Settings(), Chats) == []
