"""What a run says while it goes, on terminals of any width and in files."""

import io
import time

import pytest

from jlora.training import folder
from jlora.training.hosts import processes
from jlora.training.reporting import progress
from jlora.training.reporting.progress import Progress
from jlora.training.reporting.shown import sample_lines
from jlora.training.run import trainer

pytestmark = pytest.mark.once


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, columns):
    """The last line of a bar on a terminal of so many columns, when it compiles and after a step."""
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    made = Progress("auto", 0, 40)
    made._bar.dynamic_ncols, made._bar.ncols, made._bar.mininterval = None, columns, 0
    made.compiling()
    first = terminal.getvalue().split("\r")[-1]
    made.step(10, 2.345678, 3500.0, 2200.0, False)
    last = [line for line in terminal.getvalue().split("\r") if line.strip()][-1]
    made.close()
    return first, last


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (120, "10/40 [00:00<00:00, loss 2.346, 3,500 tokens/s, 2,200 of answers]"),
        (80, "10/40, loss 2.346, 3,500 tokens/s, 2,200 of answers"),
        (34, "10/40, loss 2.346"),
    ],
)
def test_a_bar_begins_with_the_compilation_and_fits_its_terminal(monkeypatch, columns, wanted):
    first, last = shown(monkeypatch, columns)
    assert first.startswith("compiling … ") and "0/40" in first
    assert wanted.partition(" [")[0] in last and "compiling" not in last
    assert ("|" in last) == (columns > 60) and max(len(first), len(last)) <= columns


def test_a_file_gets_lines_also_where_a_bar_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    made = Progress("bar", 0, 20)
    made.compiling()
    made.step(2, 1.5, 350.0, 350.0, False)
    made.step(4, 1.25, 350.0, 10.0, True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "compiling the training step …",
        "step 2/20: loss 1.5000, 350 tokens/s",
        "step 4/20: loss 1.2500, 10 rows/s, 350 tokens/s",
    ]


def test_slow_steps_are_told_one_by_one_and_quick_ones_ten_together(monkeypatch):
    now, long_ago = time.perf_counter(), time.perf_counter() - 60
    assert trainer._to_fetch([1], long_ago) and trainer._to_fetch([1] * 10, now)
    assert not trainer._to_fetch([1] * 9, time.perf_counter())
    monkeypatch.setattr(processes, "several", lambda: True)
    assert not trainer._to_fetch([1], long_ago) and trainer._to_fetch([1] * 10, now)


def test_a_sample_is_shown_line_by_line_and_does_nothing_to_the_terminal():
    text = {"prompt": "user\nTwo and two?\n", "wanted": "4", "before": "Let's\x1b[2J see\n\nnow", "after": ""}
    assert sample_lines(text) == [
        "prompt: user",
        "        Two and two?",
        "before: Let's\\x1b[2J see",
        "",
        "        now",
        "after:",
        "wanted: 4",
    ]


def test_what_lies_in_a_folder_is_told_in_a_column(tmp_path):
    for name in ("adapters", "chat_template.jinja"):
        (tmp_path / name).touch()
    first, second = folder.listing(tmp_path)
    assert (
        first.index("the trained adapters") == second.index("the template that chats") == len("  chat_template.jinja ")
    )
