"""The study of what models lose by each code, on a few stories."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import jlora

RUN = Path(__file__).parents[2] / "experiments" / "quantization" / "run.py"
pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("quantization_study", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_finer_code_loses_less_of_weights_and_of_the_loss(study, data, monkeypatch):
    monkeypatch.setattr(study, "CODES", (jlora.Int8(), jlora.NF2()))
    plain, fine, coarse = study.measure(*study.stories(data, 3), [r".*/down_proj/kernel"])
    assert plain[:3] == ("float32", 32.0, 0.0) and [row[0] for row in (fine, coarse)] == ["Int8()", "NF2()"]
    assert (fine[1], coarse[1]) == (8.5, 2.5)
    assert fine[2] < 0.01 < 0.3 < coarse[2]
    assert abs(fine[3] - plain[3]) < 0.02 < 1 < coarse[3] - plain[3]


def test_equal_values_share_the_mean_of_their_ranks(study):
    np.testing.assert_array_equal(study.ranked(np.array([3.0, 1.0, 3.0, 7.0])), [2.5, 1.0, 2.5, 4.0])
