"""The errors that a user of the job can cause; each message is one clear sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
