"""Tensors by name, of whatever files hold them; each is read when asked for."""

from __future__ import annotations

import abc
import contextlib

import ml_dtypes
import numpy as np

from jlora.core.protocol.code import Code

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Tensors(contextlib.AbstractContextManager):
    """The tensors of a model under the names of a Hugging Face checkpoint; use as a context manager.

    Attributes:
        directory: where they come from, for messages.
        source: what holds them, in words.
    """

    directory: str
    source = "its safetensors"

    def __exit__(self, *exception):
        pass

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @property
    @abc.abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors."""

    @abc.abstractmethod
    def file(self, name: str) -> str:
        """Path of the file that holds a tensor."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""

    @abc.abstractmethod
    def kind(self, name: str) -> str:
        """Dtype of a tensor's values as safetensors spell it, such as `BF16`."""

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, from the file's header.

        Raises:
            ValueError: It is not a floating-point number of 16 to 64 bits (a quantized checkpoint).
        """
        kind = self.kind(name)
        if kind not in FLOATS:
            raise ValueError(
                f"{self.file(name)}: tensor {name!r} has dtype {kind}, wanted one of {', '.join(FLOATS)}; dequantize it "
                "first."
            )
        return FLOATS[kind]

    def code(self, name: str) -> Code | None:
        """The code in whose form a tensor is kept; of plain files none."""
        return None

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The tensor itself.

        Raises:
            ValueError: The file is damaged.
        """
