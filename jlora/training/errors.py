"""The errors that a user of the job can cause; each message is one clear sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that looks most like this one, for "did you mean"; None if none does."""
    return next(iter(difflib.get_close_matches(word, list(known), 1)), None)


class SettingError(ValueError):
    """A setting has a wrong value, or contradicts another.

    Attributes:
        setting: the field of `Settings`.
        complaint: what is wrong with it; the message without the setting's name.
    """

    def __init__(self, setting: str, complaint: str, name: str | None = None):
        super().__init__(f"{name or setting} {complaint}")
        self.setting = setting
        self.complaint = complaint

    def renamed(self, name: str) -> SettingError:
        """The same error under the name that the user wrote, such as `--rank` or `rank in run.toml`."""
        return SettingError(self.setting, self.complaint, name)


class DataError(ValueError):
    """A row of the data cannot be used; the message begins with `file:line:`."""

    def __init__(self, path, line: int | None, complaint: str):
        super().__init__(f"{path}:{line}: {complaint}" if line is not None else f"{path}: {complaint}")


class EmptyRow(DataError):
    """A row has a blank text where there must be one."""


class DivergenceError(ValueError):
    """The training diverged; the message says at which step, and what to do."""


class FolderError(OSError):
    """The output folder cannot be used: it is not empty, in use, or holds another run."""


class CheckpointError(ValueError):
    """A run cannot be resumed from what its output folder holds."""


class DisagreementError(ValueError):
    """The processes of one run do not stand on the same; the message says which process, and what differs."""


class LostError(OSError):
    """Another process of the same run gave up, with its words, or died without one.

    Attributes:
        died: whether it died.
        code: the exit code that tells so: 2 where there is something to put right, 5 where a process died.
    """

    def __init__(self, process: int, words: str | None = None):
        what = f"gave up: {words}" if words is not None else "died; start all processes again with --resume"
        super().__init__(f"process {process} {what}")
        self.died = words is None
        self.code = 5 if self.died else 2


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, with all that it had done saved; the message says how it goes on.

    Attributes:
        code: the exit code that tells so.
    """

    code = 4

    def __init__(self, out: str | Path, step: int | None, several: bool = False):
        where = "" if step is None else f" after step {step}"
        goes_on = f"jlora finetune --out {out} --resume goes on"
        if several:
            goes_on = f"the same commands with --resume go on with the run in {out}"
        super().__init__(f"stopped{where}; {goes_on}")
