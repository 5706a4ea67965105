"""`metrics.jsonl`: one line for every step and every validation, without gaps or doubles after a resume."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora.disk.json_files import shown
from jlora.training.files import write_whole

Record = dict[str, Any]


class Metrics:
    """The metrics file of a run.

    Lines have `step` and `kind`: `train` (`loss`, `learning_rate`, `gradient_norm`, `weight`: the predictions that carried
    loss, `tokens`: all that the model read, and `per_second`: predictions in a second) or `validation` (`loss`; `perplexity`,
    or `accuracy`, `f1` and `matthews`; what the model's answers have, such as `exact_match`; `weight`).
    """

    def __init__(
        self, path: str | Path, resume_at: int | None = None, listener: Callable[[Record], None] | None = None
    ):
        """Open the file; with `resume_at`, lines of later steps and a half-written last line are removed first.

        Args:
            path: the file.
            resume_at: the step that the run goes on from.
            listener: called with every new line.

        Raises:
            ValueError: if lines up to that step are missing.
        """
        self.path = Path(path)
        self.records: list[Record] = []
        if resume_at is not None and self.path.exists():
            self.records = [record for record in read_metrics(self.path) if record["step"] <= resume_at]
            write_whole(self.path, "".join(map(_line, self.records)))
        steps = [record["step"] for record in self.of("train")]
        if steps != list(range(1, (resume_at or 0) + 1)):
            raise ValueError(f"{self.path} lacks some of the first {resume_at} steps; the run cannot be resumed")
        self._listener = listener
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (held as long as the run)

    def write(self, step: int, kind: str, **values: float) -> None:
        """Add a line."""
        record = {"step": step, "kind": kind, **values}
        self.records.append(record)
        self._file.write(_line(record))
        if self._listener is not None:
            self._listener(dict(record))

    def of(self, kind: str) -> list[Record]:
        """The records of one kind."""
        return [record for record in self.records if record["kind"] == kind]

    def last(self, kind: str, count: int) -> list[Record]:
        """The last records of one kind, `count` at most, in order."""
        found = (record for record in reversed(self.records) if record["kind"] == kind)
        return list(itertools.islice(found, count))[::-1]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics file; a half-written last line is left out.

    Raises:
        ValueError: if a whole line is no record, naming file and line.
    """
    records = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            records.append(_record(line, f"{path}:{number}"))
    return records


def _record(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: the line is damaged ({error})") from error
    if not isinstance(record, dict) or type(record.get("step")) is not int or not isinstance(record.get("kind"), str):
        raise ValueError(f"{place}: the line is damaged: wanted an object with step and kind, got {shown(record)}")
    return record
