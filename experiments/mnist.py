"""MNIST as arrays: images `[rows, 28, 28, 1]` of mean 0 and deviation 1 over the training set, and digits `[rows]`."""

import gzip
import math
from pathlib import Path

import numpy as np

#: Mean and deviation of the training set's pixels, of 0 to 1.
MEAN, DEVIATION = 0.1307, 0.3081


def load(data: Path, most: int | None = None) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images and digits to train on, and to judge by; the first `most` of either.

    Raises:
        FileNotFoundError: where the files are not in `data/mnist`.
    """
    return _part(data / "mnist", "train", most), _part(data / "mnist", "t10k", most)


def _part(folder: Path, name: str, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    images = _array(folder / f"{name}-images-idx3-ubyte.gz")[:most, ..., None]
    scaled = (images.astype(np.float32) / 255 - MEAN) / DEVIATION
    return scaled, _array(folder / f"{name}-labels-idx1-ubyte.gz")[:most].astype(np.int32)


def _array(path: Path) -> np.ndarray:
    """The bytes of an IDX file: a magic number with the number of axes, their sizes, and the values."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if content[:3] != b"\0\0\x08" or values.size != math.prod(shape):
        raise ValueError(f"{path}: wanted an IDX file of bytes, shape {shape}, got {values.size} of them")
    return values.reshape(shape)
