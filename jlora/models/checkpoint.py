"""Reading the safetensors files of a Hugging Face directory, one tensor at a time."""

import contextlib
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.disk.json_files import read_object as read_json
from jlora.models.names import modern_name
from jlora.models.tensors import Tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint(Tensors):
    """The tensors of a directory: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Use as a context manager; files are mapped into memory, and a tensor is read when asked for.

    No file outside of the directory is read, whatever the index names, and no link that leads out of it is followed, unless
    asked for. The cache of the Hugging Face Hub, whose `snapshots/<revision>/` holds links to the `blobs/` of the same
    model, counts as one directory.

    Args:
        directory: A Hugging Face model directory. Where it has both, the single file is read, as transformers does.
        follow_links: Follow links that lead out of the directory.

    Raises:
        FileNotFoundError: There is neither, or a shard is missing.
        ValueError: A file is damaged or lies outside of the directory, or the index and the shards disagree.
    """

    def __init__(self, directory: str | os.PathLike, follow_links: bool = False):
        self.directory = os.fspath(directory)
        self._roots = None if follow_links else [*_roots(Path(os.path.realpath(self.directory)))]
        self._stack = contextlib.ExitStack()
        self._places: dict[str, tuple[str, str, Any]] = {}
        with contextlib.ExitStack() as undo:
            undo.callback(self._stack.close)
            if os.path.isfile(os.path.join(self.directory, SINGLE)):
                self._open(SINGLE)
            else:
                self._open_shards()
            undo.pop_all()

    def __exit__(self, *exception):
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._places)

    def file(self, name: str) -> str:
        """Path of the file that holds a tensor."""
        return self._places[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        _, stored, handle = self._places[name]
        return tuple(handle.get_slice(stored).get_shape())

    def kind(self, name: str) -> str:
        """Dtype of a tensor as the file's header spells it, such as `BF16`."""
        _, stored, handle = self._places[name]
        return handle.get_slice(stored).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """The tensor itself.

        Raises:
            ValueError: The file is damaged.
        """
        path, stored, handle = self._places[name]
        try:
            return handle.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: tensor {stored!r} can't be read ({error}); copy the file again.") from error

    def _open_shards(self) -> None:
        index = os.path.join(self.directory, INDEX)
        if not os.path.isfile(index):
            raise FileNotFoundError(
                f"{self.directory}: neither {SINGLE} nor {INDEX}; save weights of another format as safetensors first."
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: key 'weight_map' must be an object from tensors to files.")
        for name, shard in weight_map.items():
            if not _is_inside(shard):
                raise ValueError(
                    f"{index}: says that tensor {name!r} is in {reprlib.repr(shard)}, wanted the name of a file "
                    "in the same directory."
                )
        for shard in sorted(set(weight_map.values())):
            if not os.path.isfile(os.path.join(self.directory, shard)):
                raise FileNotFoundError(
                    f"{os.path.join(self.directory, shard)}: this shard is named in {INDEX} but missing."
                )
            self._open(shard)
        self._compare(index, {modern_name(name): shard for name, shard in weight_map.items()})

    def _compare(self, index: str, weight_map: dict[str, str]) -> None:
        for name, shard in weight_map.items():
            if name not in self._places or self.file(name) != os.path.join(self.directory, shard):
                raise ValueError(
                    f"{index}: says that tensor {name!r} is in {shard}, but it is not there; copy the files again."
                )
        for name in self._places:
            if name not in weight_map:
                raise ValueError(
                    f"{self.file(name)}: tensor {name!r} is not in {INDEX}; the files belong to different models."
                )

    def _open(self, file: str) -> None:
        path = os.path.join(self.directory, file)
        real = Path(os.path.realpath(path))  # `resolve` has a RuntimeError for links in a circle
        if self._roots is not None and not any(real.is_relative_to(root) for root in self._roots):
            raise ValueError(
                f"{path}: links to {real}, outside of the model's directory; copy the file there, or follow such links by "
                "load(..., follow_links=True), jlora finetune --follow-links."
            )
        try:
            handle = self._stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again.") from error
        for stored in handle.keys():  # noqa: SIM118 (the handle is no mapping and can't be iterated)
            name = modern_name(stored)
            if name in self._places:
                raise ValueError(f"{path}: tensor {name!r} is in {self.file(name)} too.")
            self._places[name] = (path, stored, handle)


def _roots(directory: Path) -> Iterator[Path]:
    """The folders that the files of a (real) directory may lie in."""
    yield directory
    for folder in (directory, *directory.parents):
        if folder.parent.name == "snapshots":
            yield folder.parents[1] / "blobs"


def _is_inside(name: Any) -> bool:
    """Whether a name from an index is a plain one below the directory, on any system."""
    if not isinstance(name, str) or not name.isprintable() or name != name.strip() or not name:
        return False
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return not (posix.is_absolute() or windows.anchor or ".." in windows.parts)
