"""The weights of a GGUF file under the names of a Hugging Face checkpoint, dequantized one tensor at a time."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np

from jlora.models.gguf.config import ROPE_FACTORS, architecture
from jlora.models.gguf.header import Header, Place, library, read_header
from jlora.models.tensors import Tensors

# Types whose values are kept as they are; all others become float32.
_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def raw(header: Header, place: Place, name: str) -> np.ndarray:
    """The values of a tensor of a file, as they lie in it.

    Raises:
        ValueError: the type can't be dequantized, or the file got shorter.
    """
    data = np.fromfile(header.path, np.uint8, place.size, offset=place.offset)
    if len(data) != place.size:
        raise ValueError(f"{header.path}: tensor {name!r} can't be read; copy the file again.")
    if place.kind in _PLAIN:
        return data.view(_PLAIN[place.kind]).reshape(place.shape)
    gguf = library()
    rows = data.reshape(*place.shape[:-1], -1)
    try:
        # Damaged scales overflow; the checks of what was read refuse them by name, and numpy's warnings would say it twice.
        with np.errstate(all="ignore"):
            return gguf.dequantize(rows, gguf.GGMLQuantizationType[place.kind]).reshape(place.shape)
    except NotImplementedError as error:
        raise ValueError(
            f"{header.path}: tensor {name!r} is of the type {place.kind}, which can't be dequantized; supported are plain "
            "numbers and the types of the library gguf, such as Q4_0, Q8_0, Q4_K, Q6_K."
        ) from error


class GgufCheckpoint(Tensors):
    """The tensors of a GGUF file, by the names that they have in a Hugging Face checkpoint.

    Args:
        path: the file.

    Raises:
        ValueError: the file is damaged, or a tensor has no place in its architecture.
    """

    source = "its tensors"

    def __init__(self, path: str | os.PathLike):
        self.directory = os.fspath(path)
        self._header = read_header(path)
        self._family = architecture(self._header)
        self._names: dict[str, str] = {}
        for name in self._header.tensors:
            if name == ROPE_FACTORS:
                continue
            found = self._family.tensor(name)
            if found is None:
                raise ValueError(f"{self.directory}: tensor {name!r} has no place in a {self._family.model_type}.")
            self._names[found] = name

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def file(self, name: str) -> str:
        return self.directory

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name).shape

    def kind(self, name: str) -> str:
        kind = self._place(name).kind
        return kind if kind in _PLAIN else "F32"

    @property
    def kept_as(self) -> list[str]:
        """The types of its tensors, those of the most bytes first."""
        sizes: dict[str, int] = {}
        for place in self._header.tensors.values():
            sizes[place.kind] = sizes.get(place.kind, 0) + place.size
        return sorted(sizes, key=lambda kind: -sizes[kind])

    def read(self, name: str) -> np.ndarray:
        tensor = raw(self._header, self._place(name), self._names[name])
        module = name.rpartition(".")[0]
        if self._family.raised and module.endswith("norm"):
            return tensor - np.asarray(1, tensor.dtype)
        if self._family.turned and module.endswith((".q_proj", ".k_proj")):
            return self._turned_back(tensor, "head_count" if module.endswith(".q_proj") else "head_count_kv")
        return tensor

    def _turned_back(self, tensor: np.ndarray, heads: str) -> np.ndarray:
        """Rows of a head as the halves of its rotary planes: [a0 b0 a1 b1 …] to [a0 a1 … b0 b1 …]."""
        values, prefix = self._header.values, f"{self._header.values['general.architecture']}.attention."
        count = values.get(prefix + heads, values[prefix + "head_count"])
        pairs = tensor.reshape(count, -1, 2, *tensor.shape[1:])
        return np.swapaxes(pairs, 1, 2).reshape(tensor.shape)

    def _place(self, name: str) -> Place:
        return self._header.tensors[self._names[name]]
