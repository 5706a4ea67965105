"""A run that is asked to stop by a signal finishes its step and saves, so that nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from jlora.training import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WORDS = b"\nstopping after this step, with a checkpoint; once more stops at once\n"


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal; the message says how it goes on.

    Attributes:
        code: the exit code that tells the signal: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, out: str | Path, step: int | None, number: int = signal.SIGINT):
        where = "" if step is None else f" after step {step}"
        super().__init__(f"stopped{where}; jlora finetune --out {out} --resume goes on")
        self.code = 128 + number


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], int | None]]:
    """While the context lasts, the first SIGINT or SIGTERM is noted; the next one does what it did before.

    Signals of several processes reach some of them, or at different steps; then, and outside of the main thread, nothing
    is caught.

    Yields:
        A function that returns the signal's number, once there was one.
    """
    asked: list[int] = []
    if processes.several() or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    # What a shell lets a job in the background ignore stays ignored.
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        restore()
        os.write(2, _WORDS)  # not print, which the signal may have interrupted

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: asked[0] if asked else None
    finally:
        restore()
