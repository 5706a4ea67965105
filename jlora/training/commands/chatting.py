"""`jlora chat`: a conversation in the terminal, with the adapters of several runs to switch between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jlora
from jlora.training.commands.runs import Run
from jlora.training.commands.writing import Writer, needed_template
from jlora.training.errors import CheckpointError, nearest
from jlora.training.run.record import ADAPTERS, read_settings

BASE = "base"
HELP = """/adapter NAME  answer with these adapters from now on (/adapter alone lists them; base is none)
/system TEXT   begin anew, with this system message
/new           begin anew
/undo          take the last turn back
/help          this list
/exit          leave (Ctrl-D does too)"""


def adapters_of(runs: Sequence[str], first: Run) -> dict[str, jlora.Adapted | None]:
    """The adapters of some runs on the base of the first one, by the names of their folders; and `base` for none.

    Raises:
        CheckpointError: a ValueError, for a run that is not finished, a classifier, or two of one name.
        ValueError: for adapters of another base.
    """
    found: dict[str, jlora.Adapted | None] = {}
    for run in runs:
        name = Path(run).resolve().name
        if name in found or name == BASE:
            raise CheckpointError(f"{run}: its folder is called {name}, as another one or the base is: rename it")
        if read_settings(run)["labels"]:
            raise CheckpointError(f"{run} is a classifier: it cannot write")
        if not (Path(run) / ADAPTERS).is_dir():
            raise CheckpointError(f"{run} has no adapters: the run is not finished")
        found[name] = first.adapted if not found else jlora.load(Path(run) / ADAPTERS, first.subject.params)
    return found | {BASE: None}


class Conversation:
    """The turns of a conversation, and the commands between them.

    Args:
        writer: writes the answers.
        show: takes text as it is written, in pieces.
    """

    def __init__(self, writer: Writer, show: Callable[[str], None]):
        self.writer, self._show = writer, show
        self._template = needed_template(writer.run)
        self.messages: list[dict[str, Any]] = []

    def turn(self, line: str) -> bool:
        """Do what a line says; whether the conversation goes on.

        Raises:
            ValueError: if the chat template refuses the messages.
        """
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self._answer(line)
            return True
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return False
        commands = {"/adapter": self._switch, "/system": self._system, "/new": self._new, "/undo": self._undo}
        if word in commands:
            self._show(f"{commands[word](rest.strip())}\n")
        else:
            near = nearest(word, (*commands, "/exit", "/help"))
            self._show(
                f"{HELP}\n" if word == "/help" else f"there is no {word}{f'; did you mean {near}?' if near else ''}\n"
            )
        return True

    def _answer(self, text: str) -> None:
        asked = [*self.messages, {"role": "user", "content": text}]
        written = ""
        for piece in self.writer.reply(asked, self._template):
            written += piece
            self._show(piece)
        self._show("\n")
        # Kept when it is whole: after Ctrl-C the turn can be asked again.
        self.messages = [*asked, {"role": "assistant", "content": written.strip()}]

    def _switch(self, name: str) -> str:
        known = list(self.writer.adapters)
        if not name:
            return "\n".join(f"{'*' if each == self.writer.current else ' '} {each}" for each in known)
        if name not in known:
            near = nearest(name, known)
            return (
                f"there are no adapters {name}; {f'did you mean {near}?' if near else 'there are ' + ', '.join(known)}"
            )
        self.writer.current = name
        return f"answers by {name}"

    def _system(self, text: str) -> str:
        self.messages = [{"role": "system", "content": text}] if text else []
        return "a new conversation, with that system message" if text else "a new conversation"

    def _new(self, _: str) -> str:
        self.messages = [each for each in self.messages[:1] if each["role"] == "system"]
        return "a new conversation"

    def _undo(self, _: str) -> str:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return "there is no turn to take back"
        self.messages = self.messages[:-2]
        return "the last turn is taken back"
