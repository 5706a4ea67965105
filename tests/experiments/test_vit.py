"""The script that trains a Vision Transformer on MNIST writes a folder that is read again, of digits as of turns."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from jlora import models

pytestmark = [pytest.mark.once, pytest.mark.long]

FOLDER = Path(__file__).parents[2] / "experiments"


def script():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("vit_train", FOLDER / "vit" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_model_of_digits_is_written_and_read_again(tmp_path, capsys):
    train = script()
    arguments = ["--steps", "3", "--most", "200", "--out", str(tmp_path / "out")]
    train.main(arguments)
    told = capsys.readouterr().out
    assert told.startswith("digits: 3 steps of 128 images") and "of 200 test images right, as read again from" in told
    model, params = models.load(tmp_path / "out")
    assert (model.config.num_labels, model.config.image_shape) == (10, (28, 28, 1))
    assert set(params) == {"classifier", "embeddings", "layernorm", "layers"}
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert "is there already" in capsys.readouterr().err


def test_turns_are_to_the_left_by_quarters_and_take_the_image_with_them():
    image = np.arange(9.0).reshape(1, 3, 3, 1)
    every = script().turned(np.repeat(image, 4, 0), np.arange(4))
    for quarter in range(4):
        np.testing.assert_array_equal(every[quarter, ..., 0], np.rot90(image[0, ..., 0], quarter))


def test_images_are_those_of_the_files_and_of_mean_0_and_deviation_1():
    script()
    import mnist
    import tasks

    (images, digits), _ = mnist.load(tasks.DATA)
    assert images.shape == (60000, 28, 28, 1)
    assert digits[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as every reader of MNIST knows them
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3
