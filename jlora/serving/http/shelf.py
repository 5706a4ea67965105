"""What `model` may name: the base, and the adapters that come and go."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jlora.serving.http.refusals import Refused, bad
from jlora.serving.http.voice import Chat, Voice
from jlora.serving.request import UnknownAdapter
from jlora.serving.store import AdapterStore

_LONGEST_NAME = 200
_FEW = 100


@dataclass(frozen=True, eq=False)
class Entry:
    """What a name stands for.

    Attributes:
        name: as `model` has it.
        adapter: its name in the store; None for the base.
        chat: how chats become tokens; None where they can't.
        virtual: tokens that the adapter puts in front of a text.
        created: when it came, in seconds since 1970.
    """

    name: str
    adapter: str | None
    chat: Chat | None
    virtual: int = 0
    created: int = field(default_factory=lambda: int(time.time()))


class Shelf:
    """The names that calls may use. An adapter is on it when it can be used, and off it before it is removed.

    Its methods are for the thread of the event loop, so that a name means one thing from a look-up to the submission after it.
    """

    def __init__(self, base: str, store: AdapterStore, voice: Voice, roots: Sequence[Path] = ()):
        """Args: name of the base; the adapters; the model's words; folders in which those lie that may be loaded by a call."""
        self._store, self._voice = store, voice
        self._roots = tuple(root.resolve() for root in roots)
        self._entries = {base: Entry(base, None, voice.chat(None))}
        self._busy: set[str] = set()
        self.base = base

    def put(self, name: str, folder: str | Path) -> None:
        """Adds an adapter before there are calls.

        Raises:
            ValueError: for a name that is taken, and as `AdapterStore.add`.
            OSError: for a folder that is not there.
        """
        if name in self._entries:
            raise ValueError(f"two of what is served are called {name!r}: name one of them otherwise")
        self._entries[name] = self._read(name, Path(folder))

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All of them, the base first."""
        return tuple(self._entries.values())

    def find(self, name: str) -> Entry:
        """What a name stands for.

        Raises:
            Refused: 404, where it stands for nothing.
        """
        if name not in self._entries:
            # With long names, or thousands of them, the search would hold up all other calls.
            few = len(name) <= _LONGEST_NAME and len(self._entries) <= _FEW
            near = difflib.get_close_matches(name, self._entries, 1) if few else []
            hint = f"; did you mean {near[0]!r}?" if near else "; GET /v1/models lists what there is"
            raise Refused(404, f"there is no model {name[:_LONGEST_NAME]!r}{hint}", "model_not_found", "model")
        return self._entries[name]

    def holds(self, entry: Entry) -> bool:
        """Whether its name still stands for this one."""
        return self._entries.get(entry.name) is entry

    async def load(self, name: str, path: str) -> None:
        """Adds an adapter while calls are answered.

        Raises:
            Refused: for a name that is taken, a folder elsewhere, and what the store refuses.
        """
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise bad("lora_name", f"must be a name of 1 to {_LONGEST_NAME} printable characters")
        if name in self._entries or name in self._busy:
            raise bad("lora_name", f"{name!r} is there already: unload it first", "name_taken")
        folder = self._allowed(path)
        self._busy.add(name)
        # Goes on to its end though the client may vanish: a half-loaded adapter is none.
        await asyncio.shield(asyncio.ensure_future(self._load(name, folder)))

    async def _load(self, name: str, folder: Path) -> None:
        try:
            self._entries[name] = await asyncio.to_thread(self._read, name, folder)
        except (ValueError, TypeError, OSError) as error:
            raise bad("lora_path", f"can't be loaded: {error}", "adapter_refused") from error
        finally:
            self._busy.discard(name)

    async def unload(self, name: str) -> None:
        """Takes an adapter away; calls that began with it end with it.

        Raises:
            Refused: where there is none of that name.
        """
        if name == self.base:
            raise bad("lora_name", f"{name!r} is the base, which stays")
        if name not in self._entries:
            raise Refused(404, f"there is no adapter {name[:_LONGEST_NAME]!r}", "model_not_found", "lora_name")
        del self._entries[name]
        self._busy.add(name)
        await asyncio.shield(asyncio.ensure_future(self._unload(name)))

    async def _unload(self, name: str) -> None:
        try:
            await asyncio.to_thread(self._store.remove, name)
        except UnknownAdapter as error:
            raise Refused(404, f"there is no adapter {name!r}", "model_not_found", "lora_name") from error
        finally:
            self._busy.discard(name)

    def _read(self, name: str, folder: Path) -> Entry:
        # First what may be refused without a trace in the store.
        chat = self._voice.chat(str(folder))
        self._store.add(name, folder)
        return Entry(name, name, chat, self._store.get(name).virtual)

    def _allowed(self, path: str) -> Path:
        """The folder that a call names, within those that the server was started with."""
        try:
            for root in self._roots:
                folder = (root / path).resolve()
                if folder.is_relative_to(root) and folder.is_dir():
                    return folder
        except (OSError, ValueError, RuntimeError):  # a null in the name, a name too long, links in a circle
            pass
        where = ", ".join(map(str, self._roots)) or "none, since the server was started without --adapters"
        raise Refused(
            403,
            f"lora_path must be a folder in one that the server was started with ({where})",
            "path_refused",
            "lora_path",
        )
