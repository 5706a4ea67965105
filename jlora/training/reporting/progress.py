"""What a run says while it goes: a bar where somebody watches, lines otherwise."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

# Below these many columns a bar's line has no room for the times, and then for the bar itself.
_ROOM_FOR_TIMES, _ROOM_FOR_BAR = 100, 60
_WIDE = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_NARROW = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
_NARROWEST = "{desc}{n_fmt}/{total_fmt}{postfix}"


class _Bar(tqdm):
    """A bar whose line says most important things first where the terminal is narrow."""

    @property
    def format_dict(self) -> Any:
        values = super().format_dict
        columns = values["ncols"] or _ROOM_FOR_TIMES
        form = _WIDE if columns >= _ROOM_FOR_TIMES else _NARROW if columns >= _ROOM_FOR_BAR else _NARROWEST
        return {**values, "bar_format": form}


class Progress:
    """Shows the loss and the speed of a run.

    Args:
        kind: `bar`, `lines`, `none`, or `auto`. In a file, where a bar would be one line written over itself, it is lines.
        done: steps done already.
        steps: steps of the whole run.
    """

    def __init__(self, kind: str, done: int, steps: int):
        if kind in ("auto", "bar"):
            kind = "bar" if sys.stderr.isatty() else "lines"
        self.kind, self.steps = kind, steps
        self._every = max(1, steps // 10)
        self._bar: Any = None
        if kind == "bar":
            self._bar = _Bar(total=steps, initial=done, unit="step", dynamic_ncols=True)

    def compiling(self) -> None:
        """The first step is on its way, whose program is compiled before."""
        if self._bar is not None:
            self._bar.set_description_str("compiling … ")
        else:
            self.say("compiling the training step …")

    def step(self, step: int, loss: float, tokens: float, predictions: float, rows: bool) -> None:
        """A step is done.

        Args:
            step: its number.
            loss: its loss.
            tokens: how many the model reads in a second.
            predictions: how many of them carry loss, or rows.
            rows: whether they are rows.
        """
        speed = f"{tokens:,.0f} tokens/s"
        if rows:
            speed = f"{predictions:,.0f} rows/s, {speed}"
        elif round(predictions) < round(tokens):
            speed = f"{speed}, {predictions:,.0f} of answers"
        if self._bar is not None:
            self._bar.set_description_str("", refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed}")
        elif self.kind == "lines" and (step % self._every == 0 or step == self.steps):
            self.say(f"step {step}/{self.steps}: loss {loss:.4f}, {speed}")

    def say(self, text: str) -> None:
        """A line of text, above the bar."""
        if self.kind == "none":
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
