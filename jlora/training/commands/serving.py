"""`jlora serve`: a base with the adapters of many folders, over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora import models
from jlora.compose.entry import adapted_of, entry_of
from jlora.compose.kinds import OfKinds
from jlora.compose.slotted import Slotted
from jlora.core.tree.adapted import Adapted
from jlora.disk import folders
from jlora.models.chat_files import read_chat_templates
from jlora.serving.engine import Engine
from jlora.serving.front import layout_of, parted
from jlora.serving.pieces import Pieces
from jlora.serving.store import AdapterStore
from jlora.training.commands.runs import Run
from jlora.training.commands.writing import chat_tokens, way_of
from jlora.training.data import chat
from jlora.training.errors import CheckpointError, SettingError
from jlora.training.model.subject import Subject, load_subject, model_directory, open_codec
from jlora.training.run.record import SETTINGS, read_settings, run_of
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

if TYPE_CHECKING:
    from jlora.serving.http.app import Service

_NEEDED = ("starlette", "uvicorn", "prometheus_client")
_RANK = 16
#: The variable that holds the token, where no file does.
TOKEN = "JLORA_TOKEN"


def check_installed() -> None:
    """What HTTP needs is there.

    Raises:
        SettingError: with the extra to install.
    """
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise SettingError("serve", f"needs the package {name}: pip install 'jlora[serve]'")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a command line names.

    Attributes:
        adapters: folders by name.
        roots: folders in which adapters may be that are loaded later.
        notes: on folders that are left out.
    """

    adapters: dict[str, Path]
    roots: tuple[Path, ...]
    notes: tuple[str, ...]


def find_adapters(runs: Sequence[str], given: Sequence[str]) -> Found:
    """The adapters that a command line names.

    Args:
        runs: folders of runs, each with adapters.
        given: of `--adapters`: folders with adapters in their subfolders, or NAME=FOLDER for one.

    Raises:
        SettingError: for two of one name, and a folder of `--adapters` that is not there.
        CheckpointError: for a folder that was named and holds no adapters, or those of a classifier.
        FileNotFoundError: for one that is not there.
    """
    adapters: dict[str, Path] = {}
    notes: list[str] = []
    roots = []

    def put(name: str, folder: Path, flag: str) -> None:
        if not _can_be_told(name):
            raise SettingError(
                flag, f"{folder}: an adapter's name must be printable, got {name!r}: say --adapters NAME=DIR"
            )
        if name in adapters:
            raise SettingError(
                flag, f"{folder} and {adapters[name]} are both called {name}: say --adapters NAME={folder}"
            )
        adapters[name] = folder

    for run in map(Path, runs):
        _check_adapter(run)
        put(run.resolve().name, run, "RUN")
    for each in given:
        name, equals, path = each.partition("=")
        named = bool(equals) and not Path(each).exists()
        folder = Path(path if named else each)
        if not folder.is_dir():
            raise SettingError("--adapters", f"{folder}: no such folder")
        if named or _is_adapter(folder):
            _check_adapter(folder)
            put(name if named else folder.resolve().name, folder, "--adapters")
            roots.append(folder)
            continue
        roots.append(folder)
        for inner in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
            why = None if _is_adapter(inner) else "holds no adapters"
            why = f"is a {_task(inner)}" if why is None and _task(inner) else why
            why = (
                why
                if _can_be_told(inner.name)
                else "has a name that can't be told in JSON, so --adapters NAME=DIR is wanted"
            )
            if why is None:
                put(inner.name, inner, "--adapters")
            elif not inner.name.startswith("."):
                notes.append(f"{inner if _can_be_told(inner.name) else repr(str(inner))} {why}: left out")
    return Found(adapters, tuple(roots), tuple(notes))


def _can_be_told(name: str) -> bool:
    """Whether a name can stand in answers, in logs and in metrics: a folder's may be of any bytes."""
    return bool(name) and name.isprintable()


def _is_adapter(folder: Path) -> bool:
    try:
        return bool(folders.find(folder))
    except ValueError:
        return False


def _check_adapter(folder: Path) -> None:
    """Refuses a folder that was named as an adapter and is none that can write."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not _is_adapter(folder):
        raise CheckpointError(f"{folder} holds no adapters")
    if task := _task(folder):
        raise CheckpointError(f"{folder} is a {task}: it cannot write")


def _task(folder: Path) -> str | None:
    """What a run is that can't write, or None."""
    run = run_of(folder)
    return "classifier" if (run / SETTINGS).is_file() and read_settings(run)["labels"] else None


def open_base(found: Found, model: str | None, quantize: str | None) -> Run:
    """The base: as the first run among the adapters was trained on it, or a model alone.

    Args:
        found: the adapters.
        model: its directory, where the user says it.
        quantize: the code of its linear weights, where the user says it.

    Raises:
        CheckpointError: for a run that is damaged.
        ValueError: as `load_subject`.
    """
    runs = (run_of(folder) for folder in found.adapters.values())
    about = next((read_settings(run) for run in runs if (run / SETTINGS).is_file()), None)
    settings = Settings(**about["settings"]) if about else Settings()
    said = {name: value for name, value in (("model", model), ("quantize", quantize)) if value is not None}
    settings = dataclasses.replace(settings, **said)
    settings = settings if about else resolve(settings)
    return Run(settings, load_subject(settings, *open_codec(settings)), None, model_directory(settings))


class RunVoice:
    """The words of a run's base, as training has them: a `jlora.serving.http.voice.Voice`.

    Attributes:
        notes: what a user must know of them.
    """

    def __init__(self, run: Run, template: str | None = None, trusts: bool = False):
        """Args: the base; its chat template, as `--chat-template`; whether templates in adapters' folders may be run.

        The base's template is by default the model's own if it has one. A template is a program, which may write without end:
        so those of adapters are run where they have the text of the base's, or of one of jlora's own, or are trusted.

        Raises:
            ValueError: for a template that is damaged, or needs what the model lacks.
        """
        given: dict[str, Any] = dict.fromkeys(("tokens", "temperature", "top_k", "top_p", "stop", "seed"))
        way, notes = way_of(run, given)
        self.ends, self.stop, self.notes = way.ends, way.stop, notes
        self.temperature, self.top_k, self.top_p = way.temperature, way.top_k, way.top_p
        self._run, self._codec = run, run.subject.codec
        vocabulary = self._codec.tokenizer.get_vocab()
        self.tokens, self._pieces = max(vocabulary.values()) + 1, Pieces(self._codec.tokenizer)
        # Templates keep what they write while they write it.
        self._lock = threading.Lock()
        self._trusts = trusts
        own = template is not None or read_chat_templates(run.directory)
        self._template = chat.template(template or "model", run.directory, vocabulary) if own else None

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to go on with: the begin token, then the text."""
        return self._codec.prompt(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._codec.decode(ids)

    def token(self, id: int) -> tuple[str, bytes]:
        """One token as text and as bytes."""
        return self._pieces.of(id)

    def chat(self, folder: str | None) -> Any:
        """How chats are written for an adapter: by the template that it was trained with, else by the base's."""
        if folder is not None and not self._may_run(run_of(folder)):
            return None
        stored = chat.stored(run_of(folder), self._run.directory) if folder is not None else None
        template = stored or self._template
        if template is None:
            return None

        def tokens(messages: Sequence[dict[str, Any]]) -> list[int]:
            for message in messages:
                if not template.knows(message["role"]):
                    raise ValueError(f"the chat template has no messages of role {message['role']!r}")
            with self._lock:
                return chat_tokens(self._run, messages, template.at(datetime.now()))

        return tokens

    def _may_run(self, run: Path) -> bool:
        """Whether the templates of a run's folder may be run."""
        known = {} if self._template is None else self._template.texts()
        own = read_chat_templates(run).values()
        return self._trusts or all(chat.is_built_in(each.text) or each.text in known.values() for each in own)


def read_token(file: str | None) -> str | None:
    """The token that calls must bring: of a file, or of the environment; None for none.

    Raises:
        SettingError: for one that is empty, or can't stand in a header.
        OSError: for a file that can't be read.
    """
    found = Path(file).read_text(encoding="utf-8").strip() if file is not None else os.environ.get(TOKEN)
    if found is None:
        return None
    if not found or not found.isascii() or not found.isprintable() or " " in found:
        raise SettingError(
            "--token-file" if file is not None else TOKEN, "must hold a token of visible ASCII characters"
        )
    return found


def room_for(found: Found, subject: Subject) -> tuple[int, list[Adapted]]:
    """What rows need room for: the largest rank of the adapters, 16 at least, and an adapter of each other method.

    There is room for others to come, of these ranks and methods.

    Raises:
        ValueError: for an adapter of another base, or of a method that no row holds, with its folder.
        OSError: for a file that can't be read.
    """
    names, ranks, like = models.peft_names(subject.model), [_RANK], []
    seen: set[Any] = set()
    for name, folder in found.adapters.items():
        with told_of(folder):
            adapted = adapted_of(folder, subject.params, names, layout_of(subject.model))
            rest, tokens = parted(adapted)
            methods = {keys: site.method for keys, site in entry_of(name, rest, subject.params, names).sites.items()}
        ranks += [method.rank for method in methods.values() if isinstance(method, Slotted)]
        others = {(keys, method) for keys, method in methods.items() if isinstance(method, OfKinds)} | {tokens} - {0}
        if others - seen:
            seen |= others
            like.append(adapted)
    return max(ranks), like


@contextlib.contextmanager
def told_of(folder: Path) -> Iterator[None]:
    """Errors about an adapter begin with its folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def service_of(arguments: argparse.Namespace, say: Callable[[str], None]) -> Service:
    """What `jlora serve` serves, with an engine that is not started.

    Args:
        arguments: of the command line.
        say: takes notes.

    Raises:
        SettingError: for flags that can't be, and what is not installed.
        ValueError: for a model or adapters that can't be served.
        OSError: for files that can't be read.
    """
    from jlora.serving.http.app import Service
    from jlora.serving.http.run import is_local
    from jlora.serving.http.shelf import Shelf

    token, local = read_token(arguments.token_file), is_local(arguments.host)
    found = find_adapters(arguments.runs, arguments.adapters or ())
    base = open_base(found, arguments.model, arguments.quantize)
    if base.settings.task == "classify":
        raise CheckpointError("a classifier cannot write")
    voice, subject = RunVoice(base, arguments.chat_template, arguments.trust_templates), base.subject
    for note in (*subject.notes, *voice.notes, *found.notes, *_warnings(local, token)):
        say(f"note  {note}")
    rank, like = room_for(found, subject)
    rank = arguments.rank or rank
    store = AdapterStore(subject.model, subject.params, slots=arguments.slots, rank=rank, like=like)
    sizes = {"rows": arguments.rows, "length": arguments.length, "queue": arguments.queue}
    sizes["ends"] = max(16, len(voice.ends))
    engine = Engine(subject.model, subject.params, adapters=store, **sizes)
    shelf = Shelf(arguments.served_name or _name_of(base, arguments.model), store, voice, found.roots)
    for name, folder in found.adapters.items():
        with told_of(folder):
            shelf.put(name, folder)
        if shelf.find(name).chat is None and read_chat_templates(run_of(folder)):
            say(
                f"note  {folder} has a chat template of its own, which is run with --trust-templates alone: it answers no chats"
            )
    hosts = ("localhost", "127.0.0.1", "::1", arguments.host) if local and token is None else None
    body, choices = arguments.max_body * 2**20, min(64, arguments.queue)
    return Service(engine, voice, shelf, token, hosts, body, choices)


def serve(arguments: argparse.Namespace) -> None:
    """`jlora serve`, until it is told to end.

    Raises:
        SettingError: for flags that can't be, and what is not installed.
        ValueError, OSError: as `service_of`, and for an address that is taken.
    """
    check_installed()
    from jlora.serving.http import run

    with run.bound(arguments.host, arguments.port) as place:
        service = service_of(arguments, lambda note: print(note, file=sys.stderr))
        service.engine.start()
        host, port = place.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        base, *adapters = (entry.name for entry in service.shelf.entries)
        what = f"{base} with {', '.join(adapters) or 'no adapters yet'}, at {where}"
        run.serve(service, place, lambda text: print(text, flush=True), what)


def _name_of(base: Run, model: str | None) -> str:
    """The name of the base: as the user gave it, or its folder's or file's."""
    directory = base.directory.resolve()
    given = model if model and os.sep not in model and not Path(model).exists() else None
    return given or (directory.stem if directory.is_file() else directory.name)


def _warnings(local: bool, token: str | None) -> list[str]:
    if local or token is not None:
        return []
    return [f"everybody who reaches this machine may ask: --token-file or {TOKEN} lets those in who have a token"]
