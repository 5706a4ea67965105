"""A few accidents to everything that jlora reads from disk: one error that names the file, or what was written."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "damaged_files"
COUNT = 8


@pytest.fixture(scope="module")
def run():
    """The module of the script."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("damaged_files_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def test_accidents_are_refused_by_name_or_do_no_harm(run):
    for name, reader in run.readers.READERS.items():
        trials = list(run.readers.trials(name, COUNT, seed=3))
        assert [trial.words for trial in trials if trial.outcome == "wrong"] == [], name
        counts = Counter(trial.outcome for trial in trials)
        assert counts["refused"] >= COUNT / 3
        assert not (reader.checked and counts["other values"])


def test_what_goes_wrong_is_counted_as_wrong(run):
    def read(error, said=""):
        def raise_it(folder):
            print(said, end="", file=sys.stderr)
            raise error(folder)

        reader = run.readers.Reader(None, "", raise_it, False)
        return run.readers._trial(reader, Path("/model"), None).outcome

    assert read(lambda folder: ValueError(f"{folder}/config.json is damaged")) == "refused"
    assert read(lambda folder: ValueError("it is damaged")) == "wrong"
    assert read(lambda folder: TypeError(f"{folder}/config.json is damaged")) == "wrong"
    assert read(lambda folder: RecursionError(f"{folder}")) == "wrong"
    assert read(lambda folder: ValueError(f"{folder}/config.json is damaged"), "Traceback") == "wrong"
    other = run.readers.Reader(None, "", lambda folder: 2, True)
    assert run.readers._trial(other, Path("/model"), 1).outcome == "wrong"
    assert run.readers._trial(other, Path("/model"), 2).outcome == "equal"


def test_the_script_writes_its_table(run, tmp_path, monkeypatch, capsys):
    arguments = ["--count", "2", "--only", "checkpoint: manifest", "--out", str(tmp_path / "results.md")]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    run.main()
    assert "| checkpoint: manifest | " in (tmp_path / "results.md").read_text()
    assert "(2 accidents each, seed 0, Python" in (tmp_path / "results.md").read_text()
