"""Reads an adapter folder that may come from a stranger: headers are checked before memory is taken, nothing is unpickled."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.disk.json_files import read_object

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INTEGERS = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
LARGEST_CONFIG = 10_000_000
LARGEST_HEADER = 50_000_000
_KEY = re.compile(r"[\w\-]+(\.[\w\-]+)*")


class AdapterFolder:
    """Settings and tensors of an adapter; tensors are read when asked for.

    Args:
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: where one of the files is missing.
        ValueError: where one is damaged, or not what it should be.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder; an adapter is a folder with {CONFIG} and {TENSORS}")
        if not (self.path / CONFIG).is_file():
            raise FileNotFoundError(
                f"{self.path / CONFIG}: no such file; an adapter is a folder with {CONFIG} and {TENSORS}"
            )
        self.config = read_object(self.path / CONFIG, LARGEST_CONFIG)
        self.file = self.path / TENSORS
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.path}: {TENSORS} is missing{_pickle_advice(self.path)}")
        _check_header(self.file)
        try:
            self._handle = safe_open(self.file, framework="numpy")
            self._slices = {key: self._handle.get_slice(key) for key in self._handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file}: not a whole safetensors file ({error}); copy it again") from None
        if not self._slices:
            raise ValueError(f"{self.file}: holds no tensors; the adapter was not saved whole")
        for key in self._slices:
            if _KEY.fullmatch(key) is None:
                raise ValueError(f"{self.file}: {key[:100]!r} is no name of a tensor; wanted words joined by dots")

    @property
    def keys(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self._slices)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._slices[key].get_shape())

    def check(self, key: str, shape: tuple[int, ...], what: str, kinds: dict[str, np.dtype] = FLOATS) -> None:
        """Refuses a tensor of another shape, or of a dtype that is not read.

        Args:
            key: name of the tensor.
            shape: the shape that it must have.
            what: what it is for, in the message.
            kinds: the dtypes that are read.

        Raises:
            ValueError: naming the file and the tensor.
        """
        if self.shape(key) != shape:
            raise ValueError(f"{self.file}: {key!r} has shape {list(self.shape(key))}, wanted {list(shape)} for {what}")
        if (kind := self._slices[key].get_dtype()) not in kinds:
            raise ValueError(f"{self.file}: {key!r} has dtype {kind}, wanted one of {', '.join(kinds)}")

    def read(self, key: str) -> np.ndarray:
        """A tensor.

        Raises:
            ValueError: where the file is damaged, or the tensor holds NaN or infinity.
        """
        try:
            tensor = self._handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file}: {key!r} can't be read ({error}); copy the file again") from None
        if not (finite := np.isfinite(tensor)).all():
            at = np.unravel_index(int(np.argmin(finite)), tensor.shape)
            raise ValueError(
                f"{self.file}: {key!r} holds {float(tensor[at])} at {[int(n) for n in at]}, and {tensor.size - finite.sum()} "
                f"of its {tensor.size} values are not finite; the training that wrote it diverged, or the file is damaged"
            )
        return tensor

    def read_as(self, key: str, dtype: np.dtype) -> np.ndarray:
        """A tensor in the dtype that adapters of its base have.

        Raises:
            ValueError: for a tensor of a wider dtype, which would lose digits.
        """
        tensor = self.read(key)
        if tensor.dtype.itemsize > dtype.itemsize:
            raise ValueError(f"{self.file}: {key!r} has dtype {tensor.dtype}, more than the {dtype} that its base's adapters "
                             "have; cast one of them")  # fmt: skip
        return tensor.astype(dtype)


def _pickle_advice(path: Path) -> str:
    found = [name for name in PICKLES if (path / name).exists()]
    if not found:
        return ""
    return f"; {found[0]} is a pickle, which can run code and is never read: save it as safetensors with PEFT first"


def brief(value: Any) -> str:
    """A value of a file as a message shows it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_header(path: Path) -> None:
    """Refuses a file whose first eight bytes state a length of the header that the file can't have, or that is too large."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"{path}: not a whole safetensors file (its header is said to have {length} bytes, the file has "
                         f"{size}); copy it again")  # fmt: skip
    if length > LARGEST_HEADER:
        raise ValueError(f"{path}: a header of {length} bytes is too large for an adapter")
