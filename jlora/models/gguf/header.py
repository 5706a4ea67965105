"""The header of a GGUF file: its metadata, and where its tensors lie; every count is held against the file's size.

Layout (little-endian): magic, version, number of tensors, number of keys; the keys with their types and values; for each
tensor its name, shape (fastest axis first), type and offset; then, at a multiple of `general.alignment`, the data.
Source: the specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import struct
from typing import Any, BinaryIO

from jlora.disk.json_files import shown

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
# No header comes near this many bytes: a vocabulary of 256,000 tokens with its merges takes some 20 MB.
_LARGEST = 2**28


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file.

    Attributes:
        shape: as torch counts it, the slowest axis first.
        kind: name of its type, such as `Q4_1`.
        offset: from the start of the file.
        size: in bytes.
    """

    shape: tuple[int, ...]
    kind: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Header:
    """What a GGUF file says of itself; each reading is its own, so that what is made of it can be kept.

    Attributes:
        path: the file.
        values: its metadata by key.
        tensors: its tensors by name.
    """

    path: str
    values: dict[str, Any]
    tensors: dict[str, Place]


def is_gguf(model: str | os.PathLike) -> bool:
    """Whether a path is that of a GGUF file, by its ending."""
    return os.fspath(model).endswith(".gguf")


def read_header(path: str | os.PathLike) -> Header:
    """The header of a file; read once as long as the file stays the same.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the library `gguf` is missing.
        ValueError: the file is damaged, or holds a type that is not known.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    found = os.stat(path)
    return _read(os.path.abspath(path), path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4)
def _read(place: str, path: str, changed: int, size: int) -> Header:
    try:
        with open(place, "rb") as file:
            return _Reader(file, size).header(path)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path}: not a whole GGUF file ({error}); copy it again.") from error


class _Reader:
    """Reads on, and refuses to read beyond the end."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left, self.size = file, min(size, _LARGEST), size

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"{count} bytes are wanted where {self.left} are left for its header")
        self.left -= count
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _LIST:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                one = struct.calcsize("<" + _SCALARS[inner])
                raw = self.take(count * one)
                return list(struct.unpack(f"<{count}{_SCALARS[inner]}", raw))
            if inner != _TEXT:
                raise ValueError(f"a list of the type {inner}")
            if count * 8 > self.left:
                raise ValueError(f"a list of {count} texts where {self.left} bytes are left")
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of the type {kind}")
        return self.number(_SCALARS[kind])

    def header(self, path: str) -> Header:
        if (magic := self.take(4)) != MAGIC:
            raise ValueError(f"it begins with {magic!r}, not {MAGIC!r}")
        if (version := self.number("I")) not in VERSIONS:
            raise ValueError(f"it is of version {version}, wanted {' or '.join(map(str, VERSIONS))}, little-endian")
        tensors, keys = self.number("Q"), self.number("Q")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text()
            if key in values:
                raise ValueError(f"two values for {key[:100]!r}")
            values[key] = self.value(self.number("I"))
        return Header(path, values, self.places(tensors, values.get("general.alignment", ALIGNMENT)))

    def places(self, count: int, alignment: Any) -> dict[str, Place]:
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its alignment is {shown(alignment)}")
        told = {}
        for _ in range(count):
            name, axes = self.text(), self.number("I")
            if name in told:
                raise ValueError(f"two tensors are called {name[:100]!r}")
            if not 1 <= axes <= 8:
                raise ValueError(f"tensor {name[:100]!r} has {axes} axes")
            told[name] = [self.number("Q") for _ in range(axes)], self.number("I"), self.number("Q")
        start = -(-self.file.tell() // alignment) * alignment
        return {name: self.place(name, start, *each) for name, each in told.items()}

    def place(self, name: str, start: int, sizes: list[int], kind: int, offset: int) -> Place:
        types, blocks = _types()
        if kind not in types:
            raise ValueError(f"tensor {name[:100]!r} has the type {kind}, which the library gguf does not know")
        length, size = blocks[types[kind]]
        if sizes[0] % length:
            raise ValueError(
                f"tensor {name[:100]!r} has rows of {sizes[0]}, which blocks of {length} ({types[kind]}) don't divide"
            )
        size = math.prod(sizes) // length * size
        if start + offset + size > self.size:
            raise ValueError(f"the data of tensor {name[:100]!r} would end beyond the end of the file")
        return Place(tuple(reversed(sizes)), types[kind], start + offset, size)


@functools.cache
def _types() -> tuple[dict[int, str], dict[str, tuple[int, int]]]:
    """The names of types by number, and by name how many values a block has and in how many bytes."""
    constants = library()
    sizes = {kind.name: each for kind, each in constants.GGML_QUANT_SIZES.items()}
    return {kind.value: kind.name for kind in constants.GGML_QUANT_SIZES}, sizes


def library() -> Any:
    """The library `gguf`.

    Raises:
        ModuleNotFoundError: it is missing, with what to do.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a GGUF file is read by the library gguf: pip install 'jlora[gguf]' (or pip install gguf)"
        ) from error
    return gguf
