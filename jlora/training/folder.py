"""The output folder of a run: claimed by one process, and never written over. `CONTENT` says what lies in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from jlora.training.errors import FolderError

LOCK = "lock"
# A file by which the processes of a run know that they see the same folder.
_SIGN = ".seen_by_all_"
CONTENT = {
    "adapters": "the trained adapters",
    "report.html": "the report, one file",
    "loss.png": "the plot",
    "metrics.jsonl": "one line a step, one a validation",
    "results.json": "the result in numbers",
    "samples.json": "the texts before and after",
    "chat_template.jinja": "the template that chats were written with: the model must be served with it",
    "settings.json": "what was asked for, and what it stands on",
    "sweep.html": "the runs of a sweep compared, one file",
    "sweep.png": "their losses",
    "runs": "a folder for each run of a sweep, as jlora merge, eval and export take it",
    "tensorboard": "curves for TensorBoard (--report-to)",
    "wandb": "what Weights & Biases was told (--report-to)",
    "trackers.json": "under which numbers services know the run (--report-to)",
    "checkpoints": "training state, to resume from",
}


def check_new(out: str | Path) -> None:
    """Fail where something would be written over; an empty folder is as good as none.

    Raises:
        FileExistsError: if there is something already.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; choose a new folder")


def content(out: Path, *soon: str) -> dict[str, str]:
    """What lies in a run's folder, or will `soon`, in the words of `CONTENT`."""
    return {name: what for name, what in CONTENT.items() if name in soon or (out / name).exists()}


def listing(out: Path) -> list[str]:
    """The lines in which a run tells at its end what lies in its folder."""
    found = content(out)
    width = max(map(len, found), default=0)
    return [f"  {name:<{width}} {what}" for name, what in found.items()]


def check_free(out: str | Path, resume: bool) -> None:
    """Fail early where `claim` would fail; creates nothing.

    Raises:
        FolderError: if the folder is in use, or has content and is not to be resumed, or has none and is.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FolderError(f"{out} is a file; --out must be a folder")
    holder = _holder(out / LOCK)
    if holder is not None:
        raise FolderError(f"{out} is in use by process {holder}; wait for it, or choose another --out")
    _check_content(out, resume)


def _check_content(out: Path, resume: bool) -> None:
    found = [name for name in os.listdir(out) if name != LOCK and not name.startswith(_SIGN)] if out.exists() else []
    if found and not resume:
        way = ", or go on with its run by --resume" if "settings.json" in found else ""
        raise FolderError(f"{out} is not empty; choose another --out{way}")
    if resume and "settings.json" not in found:
        way = "choose another --out" if found else "leave --resume out to start one"
        raise FolderError(f"{out} holds no run to resume (no settings.json); {way}")


@contextlib.contextmanager
def claim(out: str | Path, resume: bool) -> Iterator[Path]:
    """Hold the folder for this process while the context lasts; the system lets go of it even after SIGKILL.

    Raises:
        FolderError: as `check_free`.
    """
    check_free(out, resume)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderError(f"{out} is in use by process {_read(out / LOCK)}; choose another --out") from error
        _check_content(out, resume)  # again: another process may have been quicker
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield out
    finally:
        os.close(handle)


@contextlib.contextmanager
def sign(out: str | Path) -> Iterator[str]:
    """The name of a new file in the folder, which is made, while the context lasts; a folder that stays empty goes again."""
    out = Path(out)
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    name = f"{_SIGN}{secrets.token_hex(16)}"
    (out / name).touch()
    try:
        yield name
    finally:
        (out / name).unlink()
        with contextlib.suppress(OSError):  # another run's by now
            if made:
                out.rmdir()


def _holder(lock: Path) -> str | None:
    """The process that holds the lock, or None."""
    try:
        handle = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(lock)
    finally:
        os.close(handle)
    return None


def _read(lock: Path) -> str:
    return lock.read_text(encoding="utf-8", errors="replace").strip() or "(just starting)"
