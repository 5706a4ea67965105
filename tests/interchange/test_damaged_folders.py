"""Folders damaged at random are refused by file, in one line, or are what was saved; `experiments/damaged_files` does more."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments" / "damaged_files"))
import peft_folders

pytestmark = pytest.mark.once


@pytest.mark.parametrize("count, seed", [(80, 0), pytest.param(3000, 10_000, marks=pytest.mark.long)])
def test_a_damaged_folder_is_refused_by_name_or_is_what_was_saved(count, seed, tmp_path):
    outcomes, faults = peft_folders.run(count, seed, tmp_path)
    assert not faults
    assert sum(outcomes.values()) == count
    kinds = {outcome.split()[0] for outcome in outcomes}
    assert kinds == {"refused", "read"}
