"""Whether a run came to something: what its losses and gradients say about it, in words.

Three things end with a complaint (and with exit code 3 on the command line):

- a loss, gradient, weight or validation that is not finite, at once;
- `STUCK` steps in a row whose gradient is exactly 0 although their loss is not, at once: nothing is learned any more;
- at the end, a validation that is worse than the one before the training: a loss that rose by more than one per cent and
  the sampling error of the validation (`loss / sqrt(predictions)`), with an accuracy, if there is one, that did not rise.

A training loss that went far up on its way is a note: the run may still have come to something.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from jlora.training.reporting.metrics import Metrics, Record
from jlora.training.settings.defaults import usual_rate
from jlora.training.settings.fields import Settings

#: Steps in a row with a gradient of exactly 0 that end a run.
STUCK = 10
# A loss below this may have a gradient of exactly 0 because everything is right: softmax rounds to 1.
_ALL_RIGHT = 1e-3
# What a validation may lose to chance, beside its sampling error.
_MARGIN = 0.01


def advice(settings: Settings) -> str:
    """What to try instead: the usual learning rate, or a third of a lower one."""
    rate = settings.learning_rate
    assert rate is not None
    return f"lower --learning-rate from {rate:g} to {min(usual_rate(settings), rate / 3):.2g} or raise --warmup"


def is_stuck(last: Sequence[Record], count: int = STUCK) -> bool:
    """Whether the last `count` steps all had a gradient of exactly 0 at a loss that is none."""
    last = last[-count:]
    return len(last) == count and all(r["gradient_norm"] == 0 and r["loss"] > _ALL_RIGHT for r in last)


def complaint(metrics: Metrics, settings: Settings, after: Record | None = None) -> str | None:
    """What is wrong with a run that went to its end; None if nothing is.

    Args:
        metrics: of the run.
        settings: of the run.
        after: the validation of the adapters that it ends with; the last one by default.
    """
    validation, train = metrics.of("validation"), [record["loss"] for record in metrics.of("train")]
    before, after = validation[0], after or validation[-1]
    if not _is_worse(before, after):
        return None
    found = (
        f"the validation is worse than before the training: loss {before['loss']:.4f} before, {after['loss']:.4f} after"
    )
    part = max(1, len(train) // 10)
    if statistics.fmean(train[-part:]) >= statistics.fmean(train[:part]):
        return f"{found}; the training diverged: {advice(settings)}"
    best = min(validation, key=lambda record: record["loss"])
    return (
        f"{found}, while the training loss fell: what it learned does not carry over; train for fewer steps "
        f"(the best validation is that of step {best['step']}: {best['loss']:.4f}), on more data, or {advice(settings)}"
    )


def _is_worse(before: Record, after: Record) -> bool:
    allowed = before["loss"] * (_MARGIN + 1 / math.sqrt(before.get("weight", math.inf)))
    return after["loss"] > before["loss"] + allowed and after.get("accuracy", 0) <= before.get("accuracy", 0)


def unsteady(metrics: Metrics, settings: Settings) -> str | None:
    """A note on a training loss that was, for five steps or a twentieth of the run, half again as large as at the start."""
    losses, validation = [record["loss"] for record in metrics.of("train")], metrics.of("validation")
    window = max(5, len(losses) // 20)
    start = max([validation[0]["loss"], *losses[:1]])
    for first in range(len(losses) - window + 1):
        middle = statistics.median(losses[first : first + window])
        # In absolute terms too: where the loss is next to nothing, any noise is half of it.
        if middle > 1.5 * start + 0.1:
            return (
                f"the training loss rose from {start:.2f} to {middle:.2f} in steps {first + 1} to {first + window} before it "
                f"fell again: a steadier run may end better; {advice(settings)}"
            )
    return None


def overfitting(metrics: Metrics, settings: Settings) -> str | None:
    """A note on a validation loss that rose again after its best, by more than chance, while the training loss fell on."""
    validation, train = metrics.of("validation"), metrics.of("train")
    best, last = min(validation, key=lambda record: record["loss"]), validation[-1]
    allowed = best["loss"] * (_MARGIN + 1 / math.sqrt(best.get("weight", math.inf)))
    if last["loss"] <= best["loss"] + allowed:
        return None
    window = max(1, len(train) // 10)
    then = [record["loss"] for record in train if abs(record["step"] - best["step"]) <= window]
    now = [record["loss"] for record in train[-window:]]
    if not then or statistics.fmean(now) >= statistics.fmean(then):
        return None
    kept = (
        f"the adapters are those of the best {settings.metric}"
        if settings.best
        else "--best ends with the adapters of the best validation, --patience stops soon after it"
    )
    return (
        f"overfitting: the validation loss was best at step {best['step']} ({best['loss']:.4f}) and rose to "
        f"{last['loss']:.4f} at step {last['step']}, while the training loss fell; {kept}"
    )
