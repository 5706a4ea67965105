"""The processes of one run as one of them sees the others: what they tell, and who of them gave up or died.

All of it goes through the key-value store of JAX's own runtime, which process 0 holds. No program is compiled, texts may have
any length, and whoever waits for a process learns when that one won't come any more.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from jlora import _compat
from jlora.training.errors import DivergenceError, LostError, Stopped

# Seconds between two looks at the others.
_LOOK = 2.0
# Seconds without a sign of life after which a process counts as dead. JAX's runtime ends all processes after 100, with a
# stack trace. A sign can be late where Python's lock is held, which no training does for as long as this; after an error
# in the exchange between devices little doubt is left.
_PATIENCE, _LITTLE_PATIENCE = 40.0, 10.0
# Seconds that this process has, after another one gave up, to end by itself, a checkpoint included that is being written.
# Where that one died or was ended by hand, nothing more can be written either.
_GRACE, _LITTLE_GRACE = 30.0, 1.0
# What all processes meet at the same step, each by itself, and a loss that each sees by itself.
_IN_ALL = (DivergenceError, LostError, Stopped)
# How the errors of XLA's runtime begin where a device did not get what it waited for.
_EXCHANGE = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ")
_BEAT, _DONE, _GAVE_UP, _DEAD = b"beat ", b"done", b"gave up: ", b"dead"
_BY_HAND = "ended by Ctrl-C"
# Every process comes together with the others in the same order, so that all count alike.
_meetings = itertools.count()


class Peers:
    """The other processes, while they are together in one run.

    Attributes:
        number: of this process.
        count: of all.
        lost: why the run can't go on, once another process gave up or died.
    """

    def __init__(self, client: Any, number: int, count: int):
        """Args: JAX's client of the key-value store; the number of this process; how many there are."""
        self.number, self.count, self.lost = number, count, None
        self._client, self._room, self._names = client, f"jlora/{next(_meetings)}", itertools.count()
        self._lock, self._left, self._found = threading.Lock(), threading.Event(), threading.Event()
        self._beats = self._failed = self._said = False
        self._patience = _PATIENCE
        self._seen: dict[int, tuple[bytes, float]] = {}
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def next_name(self) -> str:
        """A name for what is told next: the same in every process."""
        return f"told {next(self._names)}"

    def tell(self, name: str, value: bytes) -> None:
        """Tell the others something, under a name that was not used before."""
        self._client.key_value_set_bytes(f"{self._room}/{name}/{self.number}", value)

    def told(self, name: str, process: int) -> bytes:
        """What a process tells under this name, once it does.

        Raises:
            LostError: an OSError, if a process gave up or died before.
        """
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(f"{self._room}/{name}/{process}", int(1000 * _LOOK))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if self.lost is not None:
                raise self.lost

    def beat(self) -> None:
        """From now on this process gives signs of life, and is given up by the others if they end."""
        self._beats = True

    def leave(self, error: BaseException | None) -> None:
        """Go from the others: because all is done, or because of an error, which they are told.

        Raises:
            LostError: in place of an error in the exchange between devices, if another process is the cause of it.
        """
        reason = error
        if error is not None and _EXCHANGE.match(str(error)):
            self._patience = _LITTLE_PATIENCE
            self._found.wait(_PATIENCE)
            reason = self.lost or error
        with self._lock:
            self._failed = reason is not None
            self._left.set()
            self._say(_DONE if reason is None or isinstance(reason, _IN_ALL) else _GAVE_UP + _words(reason).encode())
        if self._said:
            time.sleep(_GRACE)  # the watching thread has told the reason, and is about to end the process
        if reason is not None and reason is not error:
            raise reason from error

    def _say(self, word: bytes, process: int | None = None) -> None:
        """Sets the state of a process, by default of this one."""
        number = self.number if process is None else process
        self._client.key_value_set_bytes(f"{self._room}/state/{number}", word, True)

    def _watch(self) -> None:
        """Runs in a thread of its own: beats, and looks whether the others do, until this process has left."""
        for beat in itertools.count():
            with self._lock:
                if self._left.is_set():
                    return
                # What goes wrong here is the store itself, with process 0: then JAX's runtime ends this process.
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    if self._beats:
                        self._say(_BEAT + str(beat).encode())
                    self.lost = self._look()
            if self.lost is not None:
                self._found.set()
                self._wait_and_end(self.lost)
                return
            self._left.wait(_LOOK)

    def _look(self) -> LostError | None:
        """Why the run can't go on, if so; a death before an error, which may come from it."""
        states = self._client.key_value_dir_get_bytes(f"{self._room}/state/")
        others = {process: word for key, word in states if (process := int(key.rpartition("/")[2])) != self.number}
        for process, word in others.items():
            if self._is_dead(process, word):
                self._say(_DEAD, process)
                return LostError(process)
        for process, word in others.items():
            if word.startswith(_GAVE_UP):
                return LostError(process, word.removeprefix(_GAVE_UP).decode())
        return None

    def _is_dead(self, process: int, word: bytes) -> bool:
        """Whether a process has shown no sign of life for too long, or another one has seen that."""
        now = time.monotonic()
        before, since = self._seen.get(process, (b"", now))
        if word != before:
            self._seen[process] = (word, now)
        return word == _DEAD or (word == before and word.startswith(_BEAT) and now - since > self._patience)

    def _wait_and_end(self, lost: LostError) -> None:
        """Ends this process if it doesn't end by itself, since it may wait for ever for what the lost one computes.

        After a death nothing can go on: the runtime would wait for the dead process even to shut down, and then end this one by
        a stack trace. So then it ends in any case, the user's own program too.
        """
        told = self._left.wait(_LITTLE_GRACE if lost.died or str(lost).endswith(_BY_HAND) else _GRACE)
        if told and not (lost.died and self._failed):
            return
        if not told:
            self._said = True
            print(f"\njlora: {lost}", file=sys.stderr, flush=True)
        if not lost.died:
            # What gave up waits for this when it ends.
            ending = threading.Thread(target=jax.distributed.shutdown, daemon=True)
            ending.start()
            ending.join(5 * _LOOK)
        else:
            # Time to tell the error, for whoever has it. With process 0 the store ends, from which the others learn the reason.
            time.sleep(3 * _LOOK if self.number == 0 else _LOOK)
        os._exit(lost.code)


def _words(error: BaseException) -> str:
    """What the others are told about an error."""
    if isinstance(error, KeyboardInterrupt):
        return _BY_HAND
    return " ".join(str(error).split()) or type(error).__name__


#: The others, while this process is together with them.
_current: Peers | None = None


def current() -> Peers | None:
    """The other processes, if this one is together with any."""
    return _current


@contextlib.contextmanager
def together() -> Iterator[None]:
    """While the context lasts, the processes of `jax.distributed` look after each other; within another such, nothing.

    An error in one of them ends the context in all: by a LostError where one of them waits for another, and by the end of the
    process, with one sentence, where it waits for a device. So does the death of a process.

    Raises:
        LostError: an OSError, where another process gave up.
    """
    global _current
    client = _compat.coordination_client()
    if jax.process_count() == 1 or _current is not None:
        yield
        return
    if client is None:
        raise OSError("the processes of a run must be joined by jax.distributed.initialize(), and these are not")
    _current = Peers(client, jax.process_index(), jax.process_count())
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        peers, _current = _current, None
        peers.leave(error)
