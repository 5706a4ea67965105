"""Methods that look at data, in the job: PRILoRA's inputs, GeLoRA's dimensions, ALoRA's held-out batch; with a stop."""

import dataclasses

import jax
import numpy as np
import pytest
from little_data import sentences

import jlora
from jlora.training import measured
from jlora.training.job import finetune
from jlora.training.settings import Settings

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
