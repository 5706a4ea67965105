"""Training state on disk: adapters, optimizer, step, random key and data position; never the base.

Orbax writes in the background into `checkpoints/<step>/`. After it has finished, a manifest with the checksum of
every file is put beside them; only then older checkpoints are removed. So a checkpoint without a manifest, or whose
files differ from it, is not whole, and at every moment there is a whole one (once there has been a first).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import orbax.checkpoint as ocp

from jlora.disk.checksums import checksums, difference
from jlora.disk.json_files import read_object
from jlora.training.errors import CheckpointError
from jlora.training.files import write_json
from jlora.training.hosts import processes
from jlora.training.model.loop import State
from jlora.training.run import former_groups

MANIFEST = "manifest.json"
# Bytes that a checkpoint takes beside its arrays, generously.
_OVERHEAD = 2**18
_DAMAGED, _LEAVING = "damaged-", "leaving-"


class Whole(NamedTuple):
    """A checkpoint whose checksums hold, and what is wrong with the later ones."""

    step: int | None
    complaints: list[str]


def _steps(directory: Path) -> list[int]:
    """Steps that have a folder, the latest first."""
    names = os.listdir(directory) if directory.exists() else []
    # As orbax writes them: other digits than 0 to 9 are no number to it, and 007 is not the folder of step 7.
    return sorted((int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name)), reverse=True)


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifests, by its path in the folder."""
    return {name: digest for name, digest in checksums(folder).items() if Path(name).name != MANIFEST}


def complaint(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole.

    Raises:
        PermissionError: if it may not be read, which is no damage.
    """
    try:
        wanted = read_object(folder / MANIFEST)["files"]
        if not isinstance(wanted, dict):
            return f"has a damaged {MANIFEST}"
        wrong = difference(wanted, _checksums(folder))
    except FileNotFoundError:
        return "was not finished"
    except PermissionError:
        raise
    except OSError as error:
        return f"can't be read ({error})"
    except (ValueError, KeyError):
        return f"has a damaged {MANIFEST}"
    return None if wrong is None else f"is damaged: {wrong}"


def find_whole(directory: str | Path) -> Whole:
    """The last whole checkpoint.

    What comes after it is set aside under another name; half-written parts are removed.
    """
    directory = Path(directory)
    complaints = []
    for name in os.listdir(directory) if directory.exists() else []:
        if name.startswith(_LEAVING) or "orbax-checkpoint-tmp" in name:
            shutil.rmtree(directory / name)
    for step in _steps(directory):
        wrong = complaint(directory / str(step))
        if wrong is None:
            return Whole(step, complaints)
        complaints.append(f"the checkpoint of step {step} {wrong}")
        aside = directory / f"{_DAMAGED}{step}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(directory / str(step), aside)
    return Whole(None, complaints)


def last_whole(directory: str | Path) -> int | None:
    """The step of the last whole checkpoint, without touching anything."""
    directory = Path(directory)
    return next((step for step in _steps(directory) if complaint(directory / str(step)) is None), None)


class Checkpoints:
    """Writes and reads the checkpoints of a run."""

    def __init__(self, directory: str | Path, keep: int, fingerprint: str):
        """Args: the folder; how many checkpoints to keep; the fingerprint of the base."""
        self.directory, self.keep, self.fingerprint = Path(directory).resolve(), keep, fingerprint
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        options = ocp.CheckpointManagerOptions(
            create=True,
            enable_async_checkpointing=True,
            # Process 0's sign that a folder is there is numbered from 1 in each run: in a second run of the same processes it
            # would be there before the folder.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, state: State, adapted: Any, position: grain.DatasetIterator, best: int | None = None) -> None:
        """Begin to write the state; errors of an earlier write are raised here or in `close`.

        Args:
            state: the state.
            adapted: the adapters, for what is not trained.
            position: of the data.
            best: a step whose checkpoint is kept too, once this one is whole.
        """
        self.wait()
        # A copy, because the arrays are donated to the next step while the writing goes on.
        arrays = jax.tree.map(lambda leaf: leaf.copy(), _arrays(state, adapted))
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)))
        step = int(state.step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays),
                data=grain.checkpoint.CheckpointSave(position),
                run=ocp.args.JsonSave({"step": step, "base": self.fingerprint}),
            ),
            force=True,
        )
        self._thread = threading.Thread(target=self._complete, args=(best,), name="checkpoint")
        self._thread.start()

    def restore(self, step: int, state: State, adapted: Any, position: grain.DatasetIterator) -> tuple[State, Any]:
        """The state and the `Adapted` of a step, placed as the given ones; the iterator's position is set.

        Raises:
            CheckpointError: if the checkpoint is of another base, or of a former release whose groups of the optimizer can't be
                joined.
            ValueError: by orbax, if its arrays have other names or shapes.
        """
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if run["base"] != self.fingerprint:
            raise CheckpointError(
                f"{self.directory / str(step)} belongs to a base with fingerprint {run['base']}, "
                f"this one has {self.fingerprint}"
            )
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _arrays(state, adapted)
        )
        folder, optimizer = self.directory / str(step), like.get("optimizer", {})
        saved: Any = ocp.StandardCheckpointHandler().metadata(folder / "state")  # pyright: ignore[reportArgumentType]
        wanted = former_groups.alike(saved.get("optimizer", {}), optimizer)
        if optimizer:
            like["optimizer"] = {each: optimizer[name] for name, names in wanted.items() for each in names or [name]}
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), data=grain.checkpoint.CheckpointRestore(position)
            ),
        )["state"]
        if optimizer:
            restored["optimizer"] = former_groups.joined(restored["optimizer"], wanted, str(folder))
        return _unflatten(restored, state, adapted)

    def close(self) -> None:
        """Wait until everything is written, and let go.

        Raises:
            OSError: or another error, if something could not be written.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check_room(self, size: int) -> None:
        """Fails before orbax does, which leaves a half-written folder and much noise behind on a full disk."""
        if shutil.disk_usage(self.directory).free < 2 * size + _OVERHEAD:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))

    def wait(self) -> None:
        """Wait until what was begun is written.

        Raises:
            OSError: or another error, if it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def _complete(self, best: int | None) -> None:
        """Runs in a thread of its own, beside the training: orbax calls nothing back when a checkpoint is whole."""
        try:
            self._manager.wait_until_finished()
            if processes.first():
                self._finish(best)
        except Exception as error:
            self._failure = error

    def _finish(self, best: int | None) -> None:
        """After orbax has finished: manifests for what lacks them, then older checkpoints go."""
        steps = _steps(self.directory)
        for step in steps:
            folder = self.directory / str(step)
            if not (folder / MANIFEST).exists():
                write_json(folder / MANIFEST, {"step": step, "base": self.fingerprint, "files": _checksums(folder)})
        for step in [step for step in steps[self.keep :] if step != best]:
            leaving = self.directory / f"{_LEAVING}{step}"
            os.replace(self.directory / str(step), leaving)
            shutil.rmtree(leaving)


def _arrays(state: State, adapted: Any) -> dict[str, dict[str, jax.Array]]:
    """Everything to save, by plain names: optimizer states hold tuples and classes that need not outlive a release."""
    parts = {"params": state.params, "optimizer": state.opt_state, "frozen": adapted.frozen}
    named = {part: _by_path(tree) for part, tree in parts.items()}
    named["run"] = {"step": state.step, "key": jax.random.key_data(state.key)}
    return {part: leaves for part, leaves in named.items() if leaves}


def _by_path(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _unflatten(arrays: dict[str, dict[str, jax.Array]], state: State, adapted: Any) -> tuple[State, Any]:
    def fill(part: str, tree: Any) -> Any:
        names = list(_by_path(tree))
        return jax.tree.unflatten(jax.tree.structure(tree), [arrays[part][name] for name in names])

    params = fill("params", state.params)
    key = jax.random.wrap_key_data(arrays["run"]["key"])
    new = State(params, fill("optimizer", state.opt_state), arrays["run"]["step"], key)
    return new, adapted.replace(params=params, frozen=fill("frozen", adapted.frozen))
