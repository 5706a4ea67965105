"""What a report shows beside the metrics, gathered when the run has ended."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Rows of the validation that are shown as the worst.
_WORST = 8


@dataclasses.dataclass(frozen=True)
class Worst:
    """A row of the validation that the model gets wrong, or nearly.

    Attributes:
        text: of the row.
        label: its label.
        predicted: the one that the model gives it.
        loss: in nats.
    """

    text: str
    label: str
    predicted: str
    loss: float


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a report shows beside the metrics.

    Attributes:
        texts: samples: `prompt`, `before`, `after`, and `wanted` where the data has an answer.
        labels: names of the labels of a classifier.
        confusion: `[labels, labels]`, validation rows of each label by the one that was predicted; None for language models.
        worst: the rows of the largest loss, the worst first.
    """

    texts: Sequence[dict[str, str]] = ()
    labels: Sequence[str] = ()
    confusion: np.ndarray | None = None
    worst: Sequence[Worst] = ()


def of_rows(
    losses: np.ndarray, predicted: np.ndarray, right: np.ndarray, labels: Sequence[str], texts: Any
) -> tuple[np.ndarray, list[Worst]]:
    """The confusion matrix of rows, and the worst of them.

    Args:
        losses: `[rows]`, in nats.
        predicted: `[rows]`, indices of the labels that the model gives.
        right: `[rows]`, indices of the rows' own.
        labels: their names.
        texts: gives the text of a row by its number.
    """
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, (right, predicted), 1)
    order = np.argsort(-losses, kind="stable")[:_WORST]
    worst = [Worst(texts(int(i)), labels[int(right[i])], labels[int(predicted[i])], float(losses[i])) for i in order]
    return confusion, worst


def sample_lines(text: dict[str, str]) -> list[str]:
    """A sample as the terminal shows it, what there is of it so far; what a terminal would obey is written out.

    Args:
        text: `prompt`, `before` and, where there are, `after` and `wanted`.
    """
    lines = []
    for name in ("prompt", "before", "after", "wanted"):
        for number, line in enumerate(text[name].strip().splitlines() or [""] if name in text else ()):
            start = "" if number else f"{name}:"
            lines.append(f"{start:<7} {line if line.isprintable() else repr(line)[1:-1]}".rstrip())
    return lines


def peak_memory() -> tuple[int, str]:
    """The most bytes that the run has had, with whose they are: a device's where it tells, or this process's."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        return max(peaks), "most memory in use on a device"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "most memory of the process, programs included"


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
