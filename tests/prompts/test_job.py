"""Prompts in the training job: rows of several texts, evaluation, samples, and the way to PEFT."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from little_data import sentences

import jlora
from jlora import models
from jlora.training.cli import main
from jlora.training.commands.runs import Run
from jlora.training.commands.writing import Way, Writer
from jlora.training.data.encode import language_example
from jlora.training.errors import SettingError
from jlora.training.model.answers import make_written
from jlora.training.model.selection import make_spec
from jlora.training.model.subject import abstract_subject, load_subject, open_codec
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once
KEYS = r".*/(k|v)_proj/kernel"
WAY = Way(tokens=6, temperature=0.0, top_k=None, top_p=None, ends=(), stop=(), seed=0)


@pytest.mark.long
def test_a_job_trains_a_prefix_on_packed_rows_and_exports_it(tmp_path, capsys):
    run = tmp_path / "run"
    asked = [
        "--method",
        "prefixtuning",
        *(f"--set={each}" for each in ("tokens=4", "hidden=6", "width=5")),
        "--data",
        sentences(tmp_path),
    ]
    asked += ["--steps", "8", "--batch", "4", "--max-length", "48", "--learning-rate", "0.02", "--sample-tokens", "2"]
    assert main(["finetune", *asked, "--out", str(run)]) == 0
    assert "packed into" in capsys.readouterr().out
    found = json.loads((run / "results.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"] - 0.05
    assert main(["export", str(run), "--to", str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", 4)


@pytest.mark.parametrize("spec", [{"embed_tokens/embedding": jlora.PromptTuning(4)}, {KEYS: jlora.PrefixTuning(4)}])
def test_all_that_the_job_writes_is_written_behind_the_prompt(spec, monkeypatch):
    settings = resolve(Settings(metric="exact_match", seed=3))
    subject = load_subject(settings, *open_codec(settings))
    batch = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    sites = jlora.sites(lambda params, tokens: subject.model.apply({"params": params}, tokens), subject.params, batch)
    adapted = jlora.adapterize(subject.params, spec, sites=sites)
    adapted = adapted.replace(params=jax.tree.map(lambda x: jnp.roll(x, 1, 0) / jnp.std(x), adapted.params))
    prompt, codec = subject.codec.prompt("The function"), subject.codec
    apply = jlora.prompted(jlora.lift(subject.model.apply))
    (wanted,) = models.generate(apply, adapted, [prompt], max_new_tokens=6)
    (plain,) = models.generate(subject.model.apply, subject.params, [prompt], max_new_tokens=6)
    assert wanted != plain, "the prompt changes nothing, so nothing is told apart"
    text = codec.decode([*prompt, *wanted]).removeprefix(codec.decode(prompt))
    writer = Writer(Run(settings, subject, adapted, subject.directory), WAY, {"run": adapted}, "run")
    assert writer.texts([prompt]) == [text] == ["".join(writer.pieces(prompt))]
    tokens = np.array([*prompt, *wanted], np.int32)
    row = language_example(tokens, np.arange(len(tokens)) >= len(prompt))
    seen, generate = [], models.generate
    monkeypatch.setattr(
        models, "generate", lambda *args, **options: seen.append(generate(*args, **options)) or seen[-1]
    )
    make_written(subject, SimpleNamespace(validation=[row]), settings)(adapted)
    assert seen[0][0][: len(wanted)] == wanted


def spec_of(**settings):
    settings = resolve(Settings(**{"method": "prompttuning", "set": {"tokens": 5}, **settings}))
    codec, config = open_codec(settings)
    return make_spec(abstract_subject(settings, codec, config, ("a", "b")), settings)


def test_the_job_puts_prompts_where_tokens_are_looked_up():
    assert [(str(where), str(method)) for where, method in spec_of().items()] == [
        ("embed_tokens/embedding", "PromptTuning(tokens=5)")
    ]
    assert list(spec_of(method="prefixtuning")) == [KEYS]


def test_what_a_prompt_has_no_room_for_is_refused(data):
    with pytest.raises(SettingError, match="max_length of 510 and 5 virtual tokens are more than the 512 positions"):
        spec_of(max_length=510)
    encoder = {"model": str(data / "minilm_l6_v2"), "task": "classify", "data": "rows.jsonl"}
    with pytest.raises(SettingError, match="an encoder's result would be pooled too"):
        spec_of(**encoder)
