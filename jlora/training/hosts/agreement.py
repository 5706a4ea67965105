"""What all processes of a run must have in common, compared before the first step.

Each of them trains on what it reads itself. Where that differs they would train a mixture, or wait for one another for ever,
and nobody would be told. So each tells what it stands on, process 0 compares, and all refuse what differs, by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jlora.training import folder
from jlora.training.data.dataset import Data
from jlora.training.data.tokens import Codec
from jlora.training.errors import DisagreementError, FolderError, SettingError
from jlora.training.hosts import processes
from jlora.training.hosts.versions import environment
from jlora.training.settings.fields import Settings

# Settings that may differ: paths, since what lies there is compared, and what a process prints.
_OWN = ("model", "data", "validation", "adapter", "out", "progress")
# Seconds in which a file that process 0 writes must be seen by all. File systems of networks show a new name at once, or after
# the few seconds that they keep the listing of a folder.
_SEEN_WITHIN = 10.0


class Part(NamedTuple):
    """Something that all must have in common: what is said of a process that has another value, and the value."""

    said: str
    value: str


def check_start(asked: Settings) -> None:
    """Everything that can be known before a file is read: versions, the environment, the output folder.

    Raises:
        DisagreementError: a ValueError, for another environment.
        SettingError: a ValueError, if not all are to resume.
        FolderError: an OSError, if the folder can't be used, or is not the same for all.
    """
    if processes.several():
        check_parts([Part(f"has another {name}", value) for name, value in environment().items()])
        _check_settings({"resume": asked.resume})
    processes.by_first(lambda: folder.check_free(asked.out, asked.resume))
    if processes.several():
        check_folder(asked.out)


def check_settings(settings: Settings) -> None:
    """All have the same (resolved) settings; only paths may differ, and how progress is shown.

    Raises:
        SettingError: with the values in two processes.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    _check_settings({name: value for name, value in values.items() if name not in _OWN})


def check_data(data: Data, codec: Codec, config: dict[str, Any]) -> None:
    """All have read the same data, with the same tokenizer and template.

    Raises:
        DisagreementError: if not.
    """
    if processes.several():
        check_parts(_parts(data, codec, config))


def check_base(directory: Path, fingerprint: str) -> None:
    """All have read the same weights.

    Raises:
        DisagreementError: if not.
    """
    check_parts([Part(f"reads other weights from {directory}", f"fingerprint {fingerprint}")])


def check_adapter(adapter: str | None, digest: str | None) -> None:
    """All go on from the same adapters.

    Raises:
        DisagreementError: if not.
    """
    check_parts([Part(f"reads other adapters from {adapter}", f"sha256 {digest}")])


def _parts(data: Data, codec: Codec, config: dict[str, Any]) -> list[Part]:
    """Causes before what follows from them."""
    template = {} if data.template is None else data.template.texts()
    return [
        Part(f"reads another config.json in {codec.directory}", _sha(json.dumps(config, sort_keys=True))),
        Part(f"reads another tokenizer in {codec.directory}", _sha(codec.tokenizer.to_str())),
        Part("has another chat template", _sha(json.dumps(template, sort_keys=True))),
        Part(f"reads other rows from {data.source}", f"{len(data.train):,} to train on, sha256 {data.digest()[:16]}"),
        Part(
            f"reads other rows to validate on, beside {data.source}",
            f"{len(data.validation):,}, sha256 {data.validation_digest()[:16]}",
        ),
    ]


def _sha(text: str) -> str:
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def check_parts(parts: Sequence[Part]) -> None:
    """All have these in common.

    Raises:
        DisagreementError: with the first part in which a process differs from process 0.
    """
    found = processes.judged(list(parts), _difference)
    if found is not None:
        number, said, theirs, ours = found
        raise DisagreementError(
            f"process {number} {said}: {theirs} where process 0 has {ours}; all processes must have the same"
        )


def _difference(everyone: Sequence[Sequence[Part]]) -> tuple[int, str, str, str] | None:
    """The first difference from process 0: the process, what is said of it, its value and that of process 0."""
    for number, parts in enumerate(everyone):
        for ours, theirs in zip(everyone[0], parts):
            if theirs.value != ours.value:
                return number, theirs.said, theirs.value, ours.value
    return None


def _check_settings(values: dict[str, Any]) -> None:
    """As `check_parts`, for settings, which have names of their own."""
    parts = [Part(name, repr(value)) for name, value in values.items()]
    found = processes.judged(parts, _difference)
    if found is not None:
        number, name, theirs, ours = found
        raise SettingError(
            name, f"is {theirs} in process {number} and {ours} in process 0: all processes must be given the same"
        )


def check_folder(out: str | Path) -> None:
    """What process 0 writes to the output folder is seen by all.

    Raises:
        FolderError: if not, with the process.
    """
    with contextlib.ExitStack() as stack:
        sign = processes.by_first(lambda: stack.enter_context(folder.sign(out)))
        seen = _appears(Path(out) / sign, _SEEN_WITHIN)
        blind = processes.judged((seen, str(Path(out).absolute())), _blind)
    if blind is not None:
        number, theirs, ours = blind
        raise FolderError(
            f"process {number} does not see in {theirs} what process 0 wrote to {ours}: --out must be in a file system that "
            "all hosts share"
        )


def _blind(everyone: Sequence[tuple[bool, str]]) -> tuple[int, str, str] | None:
    """The first process that does not see the sign, its folder and that of process 0."""
    for number, (seen, place) in enumerate(everyone):
        if not seen:
            return number, place, everyone[0][1]
    return None


def _appears(path: Path, seconds: float) -> bool:
    """Whether a file is there, at the latest after so many seconds."""
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
