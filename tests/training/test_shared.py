"""Methods whose leaves share trained arrays, in the job: a stop and a resumed run, `inspect`, an export, a generated text."""

import dataclasses

import jax
import numpy as np
import pytest
from little_data import sentences

from jlora.training.cli import main
from jlora.training.settings.fields import Settings

SETTINGS = Settings(
    steps=8, batch=4, max_length=16, targets=".*/(q|v)_proj/kernel", checkpoint_every=2, evaluate_every=4,
    learning_rate=3e-2, sample_tokens=0, progress="none",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", ["lorta", "vblora"])
def test_a_run_stopped_in_the_middle_ends_with_the_same_bits(name, stopped_and_resumed, tmp_path, capsys):
    given = {"vector_length": 16, "num_vectors": 8} if name == "vblora" else {"heads": 8}
    settings = dataclasses.replace(SETTINGS, method=name, rank=2, set=given, data=sentences(tmp_path))
    result = stopped_and_resumed(settings)
    drawers = result.adapted.params["~shared"]
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(drawers))
    assert result.record["trained_values"] == sum(leaf.size for leaf in jax.tree.leaves(result.adapted.params))
    assert f"~shared/{next(iter(drawers))}" in (tmp_path / "whole" / "report.html").read_text()
    assert main(["export", str(tmp_path / "whole"), "--to", str(tmp_path / "peft")]) == 0
    flags = [part for pair in given.items() for part in ("--set", "=".join(map(str, pair)))]
    assert main(["inspect", "--method", name, "--rank", "2", "--targets", SETTINGS.targets or "", *flags]) == 0
    told = capsys.readouterr().out
    assert "shared by all leaves" in told and f"trained {result.record['trained_values']:,} of" in told
