"""The list of mutations does not rot: each still fits its file, compiles, and names tests that there are."""

import functools
import re
import signal
from pathlib import Path

import pytest

from mutations import run
from mutations.catalogue import MUTATIONS
from mutations.mutation import Mutation

TOP = Path(__file__).parents[2]


@functools.cache
def text_of(file: str) -> str:
    return (TOP / file).read_text(encoding="utf-8")


@functools.cache
def names_in(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", text_of(file), re.MULTILINE))


def test_every_mutation_fits_its_file_and_compiles():
    for mutation in MUTATIONS:
        compile(mutation.applied(text_of(mutation.file)), mutation.file, "exec", dont_inherit=True, optimize=0)


def test_every_mutation_names_tests_that_there_are():
    for mutation in MUTATIONS:
        assert mutation.tests, mutation.name
        for test in mutation.tests:
            file, _, name = test.partition("::")
            assert (TOP / file).is_file(), f"{mutation.name!r}: no file {file}"
            assert not name or name.partition("[")[0] in names_in(file), f"{mutation.name!r}: no test {test}"


def test_names_are_told_apart():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize(("old", "count"), [("a", 2), ("c", 0)])
def test_a_text_that_does_not_stand_there_once_is_named(old, count):
    with pytest.raises(ValueError, match=rf"'wrong': its text stands {count} times in x.py, wanted once .*'{old}'"):
        Mutation("wrong", "x.py", old, "d", ("tests",)).applied("a b a")


@pytest.mark.parametrize(("red", "word", "exit_code"), [(True, "killed", 0), (False, "survived", 1)])
def test_the_script_says_what_was_killed_and_leaves_nothing_behind(red, word, exit_code, monkeypatch, capsys, tmp_path):
    mutation = next(m for m in MUTATIONS if m.name == "a reverse scan runs forwards")
    seen = []

    class Pytest:
        stopped = False

        def __call__(self, top, tests, *flags, limit=None):
            seen.append((top, mutation.new in (top / mutation.file).read_text(encoding="utf-8"), tuple(tests)))
            return red and "-x" in flags, ""

    monkeypatch.setattr(run, "Pytest", Pytest)
    handler = signal.getsignal(signal.SIGTERM)
    page = tmp_path / "page.md"
    assert run.main(["--only", mutation.name, "--write", str(page)]) == exit_code
    signal.signal(signal.SIGTERM, handler)
    assert [wrong for _, wrong, _ in seen] == [False, True] and seen[1][2] == mutation.tests
    assert not seen[0][0].exists()
    assert f"1/1 {word}" in capsys.readouterr().out
    assert f"| `jlora/core/walk/` | 1 | {1 - exit_code} | {exit_code} | 0 |" in page.read_text(encoding="utf-8")


def test_a_name_that_no_mutation_has_is_told(capsys):
    assert run.main(["--only", "nothing like it"]) == 2
    assert "no mutation is named like 'nothing like it'" in capsys.readouterr().err
