"""Methods that look at data, in the job: PRILoRA's inputs, GeLoRA's dimensions, ALoRA's held-out batch, starts; with a stop."""

import dataclasses
from datetime import datetime

import jax
import numpy as np
import pytest
from little_data import sentences

import jlora
from jlora.training.cli import main
from jlora.training.data.dataset import load_data
from jlora.training.hosts.placement import make_mesh
from jlora.training.job import finetune
from jlora.training.model import measured
from jlora.training.model.prepared import prepared
from jlora.training.model.selection import trace_sites
from jlora.training.model.subject import load_subject, open_codec
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

SETTINGS = Settings(
    steps=12, batch=4, accumulate=2, max_length=16, rank=2, targets=".*/(q|v)_proj/kernel", checkpoint_every=2,
    evaluate_every=6, learning_rate=3e-2, sample_tokens=0, progress="none",
)  # fmt: skip


def silent(text):
    pass


@pytest.mark.long
@pytest.mark.parametrize("method", ["prilora", "gelora", "alora"])
def test_a_run_stopped_in_the_middle_ends_with_the_same_bits(method, stopped_and_resumed, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "_ROWS", 16)
    result = stopped_and_resumed(dataclasses.replace(SETTINGS, method=method, data=sentences(tmp_path)), at=6)
    gates = [
        np.asarray(result.adapted.frozen["layers"]["self_attn"][name]["kernel"]["gate"])
        for name in ("q_proj", "v_proj")
    ]
    ranks = np.stack([(gate != 0).sum(-1) for gate in gates])
    layers = ranks.shape[1]
    assert ranks.sum() == 2 * layers * 2, "the mean rank is --rank"
    kernels = [result.adapted.params["layers"]["self_attn"][name]["kernel"] for name in ("q_proj", "v_proj")]
    if method == "prilora":
        assert np.array_equal(ranks[0], ranks[1]) and (ranks[0, 0], ranks[0, -1]) == (1, 3)
        # Every step prunes in a run as short as this one, so that half of each used column is zero at its end.
        zeros = [(np.asarray(kernel["a"])[0, :, 0] == 0).mean() for kernel in kernels]
        assert zeros == [0.5, 0.5]
    if method == "gelora":
        assert np.array_equal(ranks[0], ranks[1]) and ranks.min() >= 1
    if method == "alora":
        assert np.ptp(ranks) > 0, "eight rounds moved nothing"
        assert all(not np.asarray(k["b"])[gate == 0].any() for k, gate in zip(kernels, gates))


@pytest.mark.long
def test_a_run_with_masks_by_gradients_ends_with_the_same_bits_after_a_stop(stopped_and_resumed, tmp_path):
    given = {"method": "shira", "set": {"mask": "snip"}, "data": sentences(tmp_path)}
    result = stopped_and_resumed(dataclasses.replace(SETTINGS, steps=6, **given))
    index = np.asarray(result.adapted.frozen["layers"]["self_attn"]["q_proj"]["kernel"]["index"])
    assert index.shape == (5, 2 * (64 + 64)) and np.all(np.diff(index) > 0)


@pytest.mark.long
@pytest.mark.parametrize("options", [{"method": "eva"}, {"method": "dora", "init": "corda_kpm"}], ids=str)
def test_a_run_that_starts_from_data_ends_with_the_same_bits_after_a_stop(options, stopped_and_resumed):
    result = stopped_and_resumed(dataclasses.replace(SETTINGS, steps=6, **options))
    fields = result.adapted.frozen["layers"]["self_attn"]["q_proj"]["kernel"]
    assert ("gate" if options["method"] == "eva" else "a0") in fields
    if options["method"] == "eva":
        assert sum(jlora.ranks(result.adapted).values()) == 2 * 2 * 5


@pytest.mark.parametrize("flags", [["--method", "eva"], ["--init", "corda"], ["--init", "lora_ga_unit"]], ids=str)
def test_inspect_shows_starts_from_data_without_data(flags, capsys):
    assert main(["inspect", "--rank", "3", *flags]) == 0
    assert ("EVA(rank=3" if "eva" in flags else f"init={flags[1]}") in capsys.readouterr().out


class Mean(jlora.LoRA):
    """Keeps the mean of the inputs."""

    @property
    def needs(self):
        return frozenset({"mean"})

    def start(self, key, w, site, **statistics):
        return jlora.Start(statistics)


@pytest.mark.long
def test_inputs_of_a_run_are_those_of_its_first_eight_batches_without_padding(tmp_path):
    settings = resolve(dataclasses.replace(SETTINGS, method="lora", init="eva", data=sentences(tmp_path), accumulate=2))
    codec, config = open_codec(settings)
    data, mesh = load_data(settings, codec, datetime.now()), make_mesh({})
    subject = load_subject(settings, codec, config)
    sites = trace_sites(subject, settings)
    found = prepared({".*/q_proj/kernel": Mean()}, subject, settings, sites, data, mesh, jax.random.key(0))
    (start,) = found.starts.values()
    batches = data.training_batches(settings.batch, settings.seed)
    watched, rows, padded = jlora.watch(subject.params, ".*/q_proj/kernel", sites), [], 0
    for batch in (next(batches) for _ in range(8)):
        _, seen = jax.jit(jlora.observe(subject.forward, lambda x: x))(watched, batch)
        rows.append(np.asarray(seen["layers"]["self_attn"]["q_proj"]["kernel"])[:, batch["segment_ids"] > 0])
        padded += (batch["segment_ids"] == 0).sum()
    assert padded
    np.testing.assert_allclose(start.params["mean"], np.concatenate(rows, 1).mean(1), rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_a_table_without_ranks_takes_those_of_the_paper(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "_ROWS", 16)
    gelora = {"method": "GeLoRA", "alpha": 4}
    spec = {
        ".*/q_proj/kernel": {"method": "DoRA", "inner": gelora},
        ".*/v_proj/kernel": {"method": "LoRA", "rank": 2},
    }
    given = {"data": sentences(tmp_path), "spec": spec, "rank": None, "targets": None}
    settings = dataclasses.replace(SETTINGS, steps=2, **given, out=str(tmp_path / "run"))
    methods = {site.path: site.method for site in finetune(settings, silent).adapted.plan.sites}
    gelora = next(method.inner for path, method in methods.items() if "q_proj" in path)
    assert isinstance(gelora.ranks, tuple) and len(gelora.ranks) == 5 and min(gelora.ranks) >= 1 and gelora.alpha == 4
    assert jlora.LoRA(2) in methods.values()


def test_a_row_s_point_is_the_mean_over_its_tokens_without_padding():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    batch = {"segment_ids": np.array([[1, 1, 0], [2, 0, 0]])}
    found = measured._mean_of_tokens(x, batch)
    np.testing.assert_allclose(found, [x[0, :2].mean(0), x[1, 0]], rtol=1e-6)
    np.testing.assert_array_equal(measured._mean_of_tokens(x[:, 0], batch), x[:, 0])
