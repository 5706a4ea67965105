"""Several runs of one base as one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jlora
from jlora.training.commands.exchange import write_run
from jlora.training.commands.runs import open_run
from jlora.training.errors import SettingError
from jlora.training.folder import check_new
from jlora.training.run.record import ADAPTERS, read_settings


def combine_runs(
    runs: Sequence[str], weights: Sequence[float], out: str | Path, model: str | None = None, **options: Any
) -> jlora.Adapted:
    """Make a run of the combined adapters of some runs; see `jlora.combine`.

    Args:
        runs: their folders. The model, the settings and the chat template are those of the first.
        weights: one for each run.
        out: the folder to write, which must not exist.
        model: directory of the base, where it is no longer where the first run found it.
        options: of `jlora.combine`.

    Raises:
        SettingError: for another number of weights than of runs.
        ValueError: for classifiers of different labels, adapters of different bases, and what `jlora.combine` refuses.
        FileExistsError: if there is something already.
    """
    out = Path(out)
    check_new(out)
    if len(weights) != len(runs):
        raise SettingError("--weights", f"must be {len(runs)} numbers, one for each run, got {len(weights)}")
    abouts = [read_settings(run) for run in runs]
    if other := [run for run, about in zip(runs, abouts) if about["labels"] != abouts[0]["labels"]]:
        raise ValueError(f"{other[0]} has other labels than {runs[0]}: its head says something else")
    first = open_run(runs[0], model)
    assert first.adapted is not None
    others = [jlora.load(Path(run) / ADAPTERS, first.subject.params) for run in runs[1:]]
    combined = jlora.combine([first.adapted, *others], weights, **options)
    source = {"model": str(first.directory), "combined": [*map(str, runs)], "weights": [*map(float, weights)]}
    settings = {name: abouts[0][name] for name in ("asked", "settings", "labels")}
    about = settings | source | {"combination": {name: value for name, value in options.items() if name != "key"}}
    write_run(out, combined, about, {} if first.template is None else first.template.texts())
    return combined
