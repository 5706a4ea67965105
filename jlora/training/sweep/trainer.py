"""The runs of a sweep, trained at once from their first (or resumed) step to their last."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.training.data.dataset import Data
from jlora.training.data.pipeline import Batch
from jlora.training.errors import Stopped
from jlora.training.hosts.placement import make_mesh
from jlora.training.hosts.stopping import watched
from jlora.training.model.loop import State, StepResult, on_devices, to_devices, training_step
from jlora.training.model.losses import Forward, lifted_forward
from jlora.training.model.preferences import objective_of, told
from jlora.training.model.scores import summarize
from jlora.training.reporting.metrics import Metrics
from jlora.training.reporting.progress import Progress
from jlora.training.reporting.verdict import STUCK, advice, is_stuck
from jlora.training.run.best import waited
from jlora.training.run.checkpoint import Checkpoints, find_whole
from jlora.training.run.schedule import NUMBERS, learning_rate, make_optimizer
from jlora.training.settings.fields import Settings

# Steps whose results are fetched together, as in a run alone.
_FETCH = 10


@dataclasses.dataclass
class Course:
    """What is known of a run so far: arrays of one entry a run, so that a checkpoint holds it.

    Attributes:
        steps: int32, steps done.
        stopped: bool, whether it takes part no more.
        failed: bool, whether it was stopped because it can't go on.
    """

    steps: np.ndarray
    stopped: np.ndarray
    failed: np.ndarray

    @classmethod
    def of(cls, runs: int) -> Course:
        """That of runs which have not begun."""
        return cls(np.zeros(runs, np.int32), np.zeros(runs, np.bool_), np.zeros(runs, np.bool_))


@dataclasses.dataclass
class SweepTrainer:
    """Trains a stack of adapters, and writes metrics into a folder for each run and checkpoints into that of the sweep.

    Attributes:
        stacked: base, constants and the starting adapters.
        forward: the plain model.
        data: the data, that all runs see, each in its seed's order.
        settings: of the sweep, resolved, with steps counted.
        runs: those of each run.
        out: the sweep's folder, which is claimed.
        folders: that of each run.
        fingerprint: of the base.
        complaints: what is wrong with each run that could not go on, by its number.
        resumed_at: the step that the sweep goes on from; 0 for its beginning.
    """

    stacked: jlora.Stacked
    forward: Forward
    data: Data
    settings: Settings
    runs: Sequence[Settings]
    out: Path
    folders: Sequence[Path]
    fingerprint: str
    complaints: dict[int, str] = dataclasses.field(default_factory=dict)
    metrics: list[Metrics] = dataclasses.field(default_factory=list)
    resumed_at: int = 0

    def __post_init__(self):
        settings = self.settings
        assert settings.batch and settings.steps
        self._mesh = make_mesh({})
        rows = settings.batch // settings.accumulate
        self._validation = on_devices(self.data.validation_batches(rows), self._mesh)
        self._seeds = list(dict.fromkeys(each.seed for each in self.runs))
        self._batches = _Several([self.data.training_batches(settings.batch, seed) for seed in self._seeds])
        self._still = self.stacked.replace(params={})
        self._course = Course.of(len(self.runs))
        values = {name: [getattr(each, name) for each in self.runs] for name in NUMBERS}
        # A clip of 0 is none.
        values["clip"] = [each or math.inf for each in values["clip"]]
        self._numbers = {name: jnp.array(each, jnp.float32) for name, each in values.items() if len(set(each)) > 1}
        self._rates = [learning_rate(each) for each in self.runs]
        self._objective = objective_of(self.settings, self.forward)
        lifted = lifted_forward(self.forward, self.data.texts)
        of_one = lambda adapted, batch: self._objective(lifted, adapted, batch)  # noqa: E731
        self._sums = jax.jit(jlora.each_run(of_one, in_axes=(0, None)))
        axis = 0 if len(self._seeds) > 1 else None
        # Its runs' own state, the stack, the batch, the numbers of each, whether it is stopped.
        self._step = jax.jit(jlora.each_run(self._one, in_axes=(0, 0, axis, 0, 0)), donate_argnums=0)

    def _one(
        self, state: State, still: jlora.Adapted, batch: Any, numbers: dict[str, jax.Array], stopped: jax.Array
    ) -> tuple[State, StepResult]:
        """The step of one run."""
        tx = make_optimizer(still.replace(params=state.params), self.settings, numbers)
        new, result = training_step(self.forward, tx, self.data.texts, self._objective)(state, still, batch)
        return jlora.hold(stopped, new, state), result

    def run(self) -> jlora.Stacked:
        """Train to the last step of the last run that is not stopped; resume where the settings say so.

        Raises:
            Stopped: a KeyboardInterrupt, after SIGINT or SIGTERM.
            OSError: if something cannot be written.
        """
        whole = find_whole(self.out / "checkpoints")
        checkpoints = Checkpoints(self.out / "checkpoints", self.settings.keep, self.fingerprint)
        state, notes, done = self._start(checkpoints, whole)
        self.resumed_at = done
        resume = self.settings.resume
        for folder, steps in zip(self.folders, self._course.steps):
            self.metrics.append(Metrics(folder / "metrics.jsonl", int(steps) if resume else None))
        self._recall()
        progress = Progress(self.settings.progress, done, self.settings.steps or 0)
        with contextlib.ExitStack() as stack:
            self._asked = stack.enter_context(watched())
            stack.callback(checkpoints.close)
            for metrics in self.metrics:
                stack.callback(metrics.close)
            stack.callback(progress.close)
            for note in notes:
                progress.say(note)
            if not done and not any(metrics.of("validation") for metrics in self.metrics):
                progress.say("validation before the training, which is compiled first …")
                self._validate(0, state, progress)
            state = self._steps(done, state, progress, checkpoints)
        return self._still.replace(params=state.params)

    @property
    def course(self) -> Course:
        """What is known of the runs."""
        return self._course

    def _start(self, checkpoints: Checkpoints, whole: Any) -> tuple[State, list[str], int]:
        """The first state, or that of the last whole checkpoint; words about what was found; steps done."""
        keys = jnp.stack([jax.random.fold_in(jax.random.key(each.seed), 1) for each in self.runs])

        def first(still: jlora.Adapted, params: Any, key: jax.Array, numbers: dict[str, jax.Array]) -> State:
            tx = make_optimizer(still.replace(params=params), self.settings, numbers)
            return State(params, tx.init(params), jnp.zeros((), jnp.int32), key)

        state = jax.jit(jlora.each_run(first))(self._still, self.stacked.params, keys, self._numbers)
        if not self.settings.resume:
            return state, [], 0
        notes = [f"{text}: it was set aside" for text in whole.complaints]
        if whole.step is None:
            return state, [*notes, "no whole checkpoint: the sweep starts from its beginning"], 0
        alone = state._replace(step=state.step[0])
        alone, kept = checkpoints.restore(whole.step, alone, self._kept(), self._batches)  # pyright: ignore[reportArgumentType]
        self._still = self._still.replace(frozen=kept.frozen["still"])
        self._course = Course(**{name: np.array(value) for name, value in kept.frozen["course"].items()})
        state = alone._replace(step=jnp.array(self._course.steps))
        return state, [*notes, f"resumed from the checkpoint of step {whole.step}"], whole.step

    def _kept(self) -> _Kept:
        course = {name: jnp.asarray(value) for name, value in dataclasses.asdict(self._course).items()}
        return _Kept({}, {"still": self._still.frozen, "course": course})

    def _recall(self) -> None:
        """Finds again what was wrong with runs that failed before a resume."""
        for number in np.flatnonzero(self._course.failed):
            self.complaints[int(number)] = self._failure(int(number))

    def _steps(self, done: int, state: State, progress: Progress, checkpoints: Checkpoints) -> State:
        settings, waiting, since = self.settings, [], time.perf_counter()
        assert settings.steps and settings.evaluate_every and settings.checkpoint_every
        for step in range(done + 1, settings.steps + 1):
            if self._asked():
                raise Stopped(settings.out, step - 1)
            if self._course.stopped.all():
                break
            batch, tokens = self._batch()
            if step == done + 1:
                progress.compiling()
            stopped = jnp.asarray(self._course.stopped)
            state, result = self._step(state, self._still, batch, self._numbers, stopped)
            waiting.append((step, result, tokens))
            if len(waiting) > 1:
                jax.block_until_ready(waiting[-2][1].loss)
            last = step == settings.steps
            validate, save = last or step % settings.evaluate_every == 0, last or step % settings.checkpoint_every == 0
            stop = self._asked()
            if step == done + 1 or validate or save or stop or len(waiting) == _FETCH:
                self._record(waiting, since, progress)
                if validate:
                    self._validate(step, state, progress)
                if save or stop:
                    alone = state._replace(step=jnp.int32(step))
                    checkpoints.save(alone, self._kept(), self._batches)  # pyright: ignore[reportArgumentType]
                waiting, since = [], time.perf_counter()
            if stop and not last:
                raise Stopped(settings.out, step)
        return state

    def _batch(self) -> tuple[dict[str, jax.Array], np.ndarray]:
        """The next batch of each run, or that of all where they have one seed; and how many tokens each run reads."""
        batches, parts = self._batches.next(), self.settings.accumulate
        order = [self._seeds.index(each.seed) for each in self.runs]
        tokens = np.array([np.count_nonzero(batch["segment_ids"]) for batch in batches])[order]
        if len(batches) == 1:
            return to_devices(batches[0], self._mesh, parts), tokens
        longest = max(batch["tokens"].shape[-1] for batch in batches)
        placed = [to_devices(_lengthened(batch, longest), self._mesh, parts) for batch in batches]
        return {name: jnp.stack([placed[n][name] for n in order]) for name in placed[0]}, tokens

    def _record(self, waiting: list[tuple[int, StepResult, np.ndarray]], since: float, progress: Progress) -> None:
        """Fetch the results of some steps and write the lines of each run; runs that can't go on are stopped."""
        results, course = jax.device_get([result for _, result, _ in waiting]), self._course
        going, seconds = ~course.stopped, time.perf_counter() - since
        speed = sum(float(np.sum(result.weight[going])) for result in results) / seconds
        read = sum(float(np.sum(tokens[going])) for *_, tokens in waiting) / seconds
        for (step, _, tokens), result in zip(waiting, results):
            for number in np.flatnonzero(~course.stopped):
                metrics, loss, norm = (
                    self.metrics[number],
                    float(result.loss[number]),
                    float(result.gradient_norm[number]),
                )
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    self._fail(number, f"the loss is {loss} and its gradient's norm {norm} at step {step}", progress)
                    continue
                rate = float(np.asarray(self._rates[number](step - 1)))
                weight = float(result.weight[number])
                share = round(speed / int(going.sum()), 1)
                more = {name: value[number] for name, value in result.more.items()}
                metrics.write(
                    step,
                    "train",
                    loss=loss,
                    learning_rate=rate,
                    gradient_norm=norm,
                    weight=weight,
                    tokens=int(tokens[number]),
                    per_second=share,
                    **told(more),
                )
                course.steps[number] = step
                if is_stuck(metrics.last("train", STUCK)):
                    self._fail(
                        number, f"the gradient is exactly 0 in each of the last {STUCK} steps to {step}", progress
                    )
            if going.any():
                progress.step(step, float(np.nanmean(result.loss[going])), read, speed, self.settings.task != "lm")

    def _fail(self, number: Any, found: str, progress: Progress) -> None:
        self._course.stopped[number] = self._course.failed[number] = True
        self.complaints[int(number)] = text = f"{found}: the training diverged; {advice(self.runs[number])}"
        (self.folders[number] / _FAILURE).write_text(text + "\n", encoding="utf-8")
        progress.say(f"{self.folders[number].name}: {text}")

    def _failure(self, number: int) -> str:
        return (self.folders[number] / _FAILURE).read_text(encoding="utf-8").strip()

    def _validate(self, step: int, state: State, progress: Progress) -> None:
        whole, course = self._still.replace(params=state.params), self._course
        parts = [jax.device_get(self._sums(whole, batch)) for batch in self._validation]
        losses = []
        for number in np.flatnonzero(~course.stopped):
            found = jax.tree.map(lambda *v, n=number: np.sum(np.array([x[n] for x in v], np.float64), axis=0), *parts)
            values = summarize(found, bool(self.data.labels))
            if not math.isfinite(values["loss"]):
                if not step:
                    raise ValueError(f"the validation loss is {values['loss']}: the model itself gives no finite loss")
                self._fail(number, f"the validation loss is {values['loss']} at step {step}", progress)
                continue
            self.metrics[number].write(step, "validation", **values, weight=float(found.weight))
            losses.append(values["loss"])
            self._judge(int(number), step, progress)
        if losses:
            progress.say(
                f"validation at step {step}: loss {min(losses):.4f} to {max(losses):.4f} in {len(losses)} "
                f"{'run' if len(losses) == 1 else 'runs'}"
            )

    def _judge(self, number: int, step: int, progress: Progress) -> None:
        """Stops a run whose validation got no better for too long."""
        patience, whole = self.settings.patience, step == self.settings.steps
        if patience is None or whole or waited(self.metrics[number].of("validation"), "loss") < patience:
            return
        self._course.stopped[number] = True
        progress.say(f"{self.folders[number].name}: stopped at step {step}, {patience} validations after its best")


_FAILURE = "failure.txt"


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What a checkpoint holds beside the state, in the form of an `Adapted`."""

    params: Any
    frozen: Any

    def replace(self, **changes: Any) -> _Kept:
        return dataclasses.replace(self, **changes)


class _Several:
    """Iterators over batches as one whose position can be saved."""

    def __init__(self, iterators: Sequence[Any]):
        self._iterators = iterators

    def next(self) -> list[Batch]:
        """The next batch of each."""
        return [next(each) for each in self._iterators]

    def get_state(self) -> bytes:
        """The positions, as grain's checkpoints want them of what is no iterator of grain's own."""
        return json.dumps([each.get_state() for each in self._iterators]).encode()

    def start_prefetch(self) -> None:
        """Lets each fetch its next batches, as grain asks of what it has set."""
        for each in self._iterators:
            each.start_prefetch()

    def set_state(self, state: bytes) -> None:
        """Goes to saved positions."""
        for each, position in zip(self._iterators, json.loads(state), strict=True):
            each.set_state(position)


def _lengthened(batch: Batch, length: int) -> Batch:
    """A batch with its rows padded to a length, by what padding has everywhere: zeros."""
    more = length - batch["tokens"].shape[-1]
    return {name: np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, more)]) if x.ndim > 1 else x for name, x in batch.items()}
