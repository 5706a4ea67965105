"""What a run says while it goes: a bar where somebody watches, lines otherwise."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Progress:
    """Shows the loss and the speed of a run.

    Args:
        kind: `bar`, `lines`, `none`, or `auto`: a bar on a terminal, lines elsewhere.
        done: steps done already.
        steps: steps of the whole run.
    """

    def __init__(self, kind: str, done: int, steps: int):
        if kind == "auto":
            kind = "bar" if sys.stderr.isatty() else "lines"
        self.kind, self.steps = kind, steps
        self._every = max(1, steps // 10)
        self._bar: Any = None
        if kind == "bar":
            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)

    def step(self, step: int, loss: float, tokens_per_second: float, rows: bool) -> None:
        """A step is done; `rows` where speed counts rows, not tokens."""
        unit = "rows/s" if rows else "tokens/s"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} {unit}")
        elif self.kind == "lines" and (step % self._every == 0 or step == self.steps):
            self.say(f"step {step}/{self.steps}: loss {loss:.4f}, {tokens_per_second:,.0f} {unit}")

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
