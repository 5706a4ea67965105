"""A run that is asked to stop by a signal finishes its step and saves, so that nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from jlora.training.hosts import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WORDS = b"\nstopping after this step, with a checkpoint; once more stops at once\n"


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], bool]]:
    """While the context lasts, the first SIGINT or SIGTERM is noted; the next one does what it did before.

    Of several processes all stop after the same step, whichever of them the signal reached: see `processes.preemption`. Outside
    of the main thread, where Python lets nobody catch signals, only that is seen.

    Yields:
        A function that says whether there was one; to be called once a step, in all processes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not processes.several():
        with _noted(_SIGNALS if main else ()) as noted:
            yield lambda: bool(noted)
        return
    preempted = processes.preemption()
    if preempted is None:
        yield lambda: False
        return
    # JAX's runtime has a handler for SIGTERM already, which tells the other processes: Ctrl-C goes that way too.
    with _noted((signal.SIGINT,) if main else (), lambda: signal.raise_signal(signal.SIGTERM)) as noted:
        yield lambda: preempted() and _acknowledged(main, bool(noted))


def _acknowledged(main: bool, told: bool) -> bool:
    """True; from now on SIGTERM ends the process: JAX's handler, which would go on to take it, has done its work."""
    if main:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not told:
        os.write(2, _WORDS)
    return True


@contextlib.contextmanager
def _noted(numbers: tuple[signal.Signals, ...], action: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """The first of these signals that comes while the context lasts: it is told on the terminal, and `action` runs."""
    noted: list[int] = []
    # What a shell lets a job in the background ignore stays ignored.
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        restore()
        os.write(2, _WORDS)  # not print, which the signal may have interrupted
        action()

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()
