"""A run from its first (or resumed) step to its last."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jlora
from jlora.optimize.events import is_due
from jlora.training.data.dataset import Data
from jlora.training.errors import CheckpointError, DivergenceError, Stopped
from jlora.training.hosts import processes
from jlora.training.hosts.placement import on_mesh, row_parts
from jlora.training.hosts.stopping import watched
from jlora.training.model.loop import (
    State,
    StepResult,
    held_out_loss,
    make_evaluation,
    make_rows,
    make_step,
    on_devices,
    to_devices,
)
from jlora.training.model.losses import Forward
from jlora.training.model.preferences import objective_of, told
from jlora.training.model.scores import summarize
from jlora.training.reporting.metrics import Metrics, Record
from jlora.training.reporting.progress import Progress
from jlora.training.reporting.verdict import STUCK, advice, is_stuck
from jlora.training.run.best import best_of, waited
from jlora.training.run.checkpoint import Checkpoints, Whole, complaint, find_whole, last_whole
from jlora.training.run.schedule import learning_rate, make_optimizer, restarts_of
from jlora.training.settings.axes import ROWS
from jlora.training.settings.fields import Settings

# Steps whose results are fetched together: the devices need not wait for the host at each.
_FETCH = 10
# Seconds after which they are fetched anyway, so that who watches slow steps sees them; beside such steps the devices' wait
# for the host is short.
_SILENCE = 2.0
# The key of events is folded with this: a number that no step and no part of a batch has.
_EVENTS = 0x65766E74


@dataclasses.dataclass
class Trainer:
    """Trains an `Adapted` and writes metrics and checkpoints into a claimed folder.

    Attributes:
        adapted: base, constants and the starting adapters, on the mesh.
        forward: the plain model.
        data: the data.
        settings: resolved, with steps counted.
        mesh: the devices.
        out: the output folder.
        fingerprint: of the base.
        written: metrics of what the model writes with some adapters, beside those of its loss; None for none.
        listener: takes every line of the metrics, beside their file; None for nobody.
        metrics: of the run, once it began.
        resumed_at: the step that the run goes on from; 0 for its beginning.
    """

    adapted: jlora.Adapted
    forward: Forward
    data: Data
    settings: Settings
    mesh: Mesh
    out: Path
    fingerprint: str
    written: Callable[[jlora.Adapted], dict[str, float]] | None = None
    listener: Callable[[Record], None] | None = None
    metrics: Metrics | None = None
    resumed_at: int = 0

    def __post_init__(self):
        settings = self.settings
        assert settings.batch and settings.steps and settings.evaluate_every and settings.checkpoint_every
        self._tx = make_optimizer(self.adapted, settings)
        # Axes that cut no rows cut the features of activations.
        self._cuts = jlora.mesh.cuts(self.adapted, set(self.mesh.shape) - set(ROWS))
        self._texts, self._objective = self.data.texts, objective_of(settings, self.forward)
        self._evaluate = make_evaluation(self.forward, self._cuts, self._texts, self._objective)
        self._loss = held_out_loss(self.forward, self._cuts, self._texts, self._objective)
        self._rate = learning_rate(settings, restarts_of(self.adapted))
        rows = settings.batch // settings.accumulate
        self._validation = on_devices(self.data.validation_batches(rows), self.mesh)
        self._batches = self.data.training_batches(settings.batch, settings.seed)
        self._still = self.adapted.replace(params={})
        self._is_finite = jax.jit(_is_finite)

    def run(self) -> tuple[jlora.Adapted, Metrics]:
        """Train to the last step, or until patience ends; resume where the settings say so.

        The adapters are those of the last step, or of the best validation (`chosen`).

        The first SIGINT or SIGTERM ends it after the step at hand, with a checkpoint.

        Raises:
            DivergenceError: a ValueError, if something is not finite, or the gradient stays exactly 0.
            CheckpointError: a ValueError, if the checkpoint of the best validation is damaged or gone.
            Stopped: a KeyboardInterrupt, after such a signal.
            OSError: if something cannot be written.
        """
        directory = self.out / "checkpoints"
        # Before orbax looks: it takes every folder with a number for a checkpoint.
        whole = processes.by_first(lambda: find_whole(directory))
        checkpoints = Checkpoints(directory, self.settings.keep, self.fingerprint)
        state, notes = self._start(checkpoints, whole)
        done = int(state.step)
        given = (state, self._cuts, row_parts(self.mesh), self._texts, self._objective)
        self._step = make_step(self.forward, self._tx, *given)
        self.resumed_at = done
        self.metrics = metrics = Metrics(
            self.out / "metrics.jsonl", done if self.settings.resume else None, self.listener
        )
        self._check_best(checkpoints)
        progress = Progress(self.settings.progress, done, self.settings.steps or 0)
        with contextlib.ExitStack() as stack:
            self._asked = stack.enter_context(watched())
            # In reverse order, after an error too: what is being written is finished, so that it can be resumed from.
            stack.callback(checkpoints.close)
            stack.callback(metrics.close)
            stack.callback(progress.close)
            for note in notes:
                progress.say(note)
            if not metrics.of("validation"):
                progress.say("validation before the training, which is compiled first …")
                self._validate(0, state, metrics, progress)
            state = self._steps(done, state, metrics, progress, checkpoints)
            state = self._of_best(state, checkpoints)
        return self._still.replace(params=state.params), metrics

    def goes_on_from(self) -> int:
        """The step of the last whole checkpoint, or 0."""
        return processes.by_first(lambda: last_whole(self.out / "checkpoints")) or 0

    def rows(self, adapted: jlora.Adapted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Losses, predicted labels and labels of a classifier's validation rows, the shortest row first."""
        return make_rows(self.forward, self.mesh, self._cuts)(adapted, self._validation)

    def chosen(self) -> Record:
        """The validation of the adapters that the run ends with: the best one where that is asked for, or the last."""
        assert self.metrics is not None
        validation = self.metrics.of("validation")
        best = best_of(validation, self.settings.metric) if self.settings.best else None
        return validation[-1] if best is None else best

    def _best_step(self) -> int | None:
        """The step of the best validation, where its checkpoint is kept."""
        return self.chosen()["step"] or None if self.settings.best else None

    def _check_best(self, checkpoints: Checkpoints) -> None:
        """The checkpoint of the best validation is there, and whole."""
        assert self.metrics is not None
        best = self._best_step() if self.metrics.of("validation") else None
        if best is None:
            return
        wrong = processes.by_first(lambda: complaint(checkpoints.directory / str(best)))
        if wrong is not None:
            raise CheckpointError(
                f"the best validation is that of step {best}, but its checkpoint in {checkpoints.directory} {wrong}; "
                "--resume --no-best ends with the adapters of the last step"
            )

    def _of_best(self, state: State, checkpoints: Checkpoints) -> State:
        """The state of the best validation, where that is asked for."""
        best = self._best_step()
        if best is None or best == int(state.step):
            return state
        checkpoints.wait()
        self._check_best(checkpoints)
        state, self._still = checkpoints.restore(best, state, self._still, self._batches)
        return state

    def _is_enough(self) -> bool:
        """Whether the run has waited in vain for a better validation as often as it may."""
        settings = self.settings
        assert self.metrics is not None
        return (
            settings.patience is not None
            and waited(self.metrics.of("validation"), settings.metric) >= settings.patience
        )

    def _start(self, checkpoints: Checkpoints, whole: Whole) -> tuple[State, list[str]]:
        """The first state, or the last whole checkpoint's, with words about what was found."""
        # A copy: a method may have started from the base's own array, which must not be donated.
        params = jax.tree.map(jnp.copy, self.adapted.params)
        key = jax.random.fold_in(jax.random.key(self.settings.seed), 1)
        rest = (self._tx.init(params), jnp.zeros((), jnp.int32), key)
        state = State(params, *on_mesh(rest, self.mesh))
        if not self.settings.resume:
            return state, []
        notes = [f"{text}: it was set aside" for text in whole.complaints]
        if whole.step is None:
            return state, [*notes, "no whole checkpoint: the run starts from its beginning"]
        state, self._still = checkpoints.restore(whole.step, state, self._still, self._batches)
        rest = "" if whole.step != self.settings.steps else ", the last one: nothing is left to train"
        return state, [*notes, f"resumed from the checkpoint of step {whole.step}{rest}"]

    def _steps(self, done: int, state: State, metrics: Metrics, progress: Progress, checkpoints: Checkpoints) -> State:
        settings, waiting, since = self.settings, [], time.perf_counter()
        assert settings.steps and settings.evaluate_every and settings.checkpoint_every
        if self._asked():
            raise Stopped(settings.out, done, processes.several())
        if self._is_enough():
            return state
        for step in range(done + 1, settings.steps + 1):
            rows = next(self._batches)
            batch = to_devices(rows, self.mesh, settings.accumulate)
            first, last = step == done + 1, step == settings.steps
            given = (state, self._still, batch)
            state, result = self._first_step(given, progress) if first else self._step(*given)
            waiting.append((step, result, int(np.count_nonzero(rows["segment_ids"]))))
            if len(waiting) > 1:
                # One step waits while another runs: were there more, a stop would have to wait for them all.
                jax.block_until_ready(waiting[-2][1].loss)
            if is_due(self._still, step):
                state = self._between(step, state, progress)
            stop = self._asked()
            validate, save = last or step % settings.evaluate_every == 0, last or step % settings.checkpoint_every == 0
            if first or validate or save or stop or _to_fetch(waiting, since):
                self._record(waiting, since, metrics, progress)
                if validate:
                    self._validate(step, state, metrics, progress)
                    last = last or self._gives_up(step, progress)
                best = validate and step == self._best_step()
                if save or stop or last or best:
                    self._save(step, state, metrics, checkpoints, best)
                waiting, since = [], time.perf_counter()
            if last:
                break
            if stop:
                raise Stopped(settings.out, step, processes.several())
        return state

    def _gives_up(self, step: int, progress: Progress) -> bool:
        """Whether the run ends here, since it has waited in vain for a better validation; with a word about it."""
        if not self._is_enough():
            return False
        settings, best = self.settings, self.chosen()
        progress.say(
            f"stopped early, after step {step}: the best {settings.metric}, {best[settings.metric]:.4f}, is that of step "
            f"{best['step']}, and --patience is {settings.patience}"
        )
        return True

    def _first_step(self, given: tuple[Any, ...], progress: Progress) -> tuple[State, StepResult]:
        """A step, with a word about how long its program takes to be made."""
        progress.compiling()
        since = time.perf_counter()
        found = jax.block_until_ready(self._step(*given))
        progress.say(f"compiled in {time.perf_counter() - since:.1f} s, the first step included")
        return found

    def _save(self, step: int, state: State, metrics: Metrics, checkpoints: Checkpoints, best: bool) -> None:
        """Begin to write a checkpoint, unless it would hold what nothing can go on from."""
        if not self._is_finite(state.params):
            raise self._diverged(f"the weights are not finite after step {step}")
        if is_stuck(metrics.last("train", 1), 1) and not best:
            return  # it would push out the last good one
        checkpoints.save(state, self._still, self._batches, self._best_step())

    def _diverged(self, found: str) -> DivergenceError:
        return DivergenceError(f"{found}: the training diverged; {advice(self.settings)}")

    def _between(self, step: int, state: State, progress: Progress) -> State:
        """What the methods do after this step, before it is validated and saved: so a stop right after is no matter."""
        whole, key = self._still.replace(params=state.params), jax.random.fold_in(state.key, _EVENTS)

        def say(text: str) -> None:
            progress.say(f"step {step}: {text}")

        given = (whole, state.opt_state, self._tx, key, step)
        whole, opt_state = jlora.run_events(*given, loss=self._loss, batches=self._validation, say=say)
        self._still = whole.replace(params={})
        return state._replace(params=whole.params, opt_state=opt_state)

    def _record(
        self, waiting: list[tuple[int, StepResult, int]], since: float, metrics: Metrics, progress: Progress
    ) -> None:
        """Fetch the results of some steps and write their lines; `waiting` has their numbers, results and tokens."""
        results = jax.device_get([result for _, result, _ in waiting])
        seconds = time.perf_counter() - since
        speed = sum(float(result.weight) for result in results) / seconds
        all_tokens = sum(tokens for *_, tokens in waiting) / seconds
        for (step, _, tokens), result in zip(waiting, results):
            loss = float(result.loss)
            if not (math.isfinite(loss) and math.isfinite(float(result.gradient_norm))):
                raise self._diverged(
                    f"the loss is {loss} and its gradient's norm {float(result.gradient_norm)} at step {step}"
                )
            metrics.write(
                step,
                "train",
                loss=loss,
                learning_rate=float(np.asarray(self._rate(step - 1))),
                gradient_norm=float(result.gradient_norm),
                weight=float(result.weight),
                tokens=tokens,
                per_second=round(speed, 1),
                **told(result.more),
            )
            progress.step(step, loss, all_tokens, speed, self.settings.task != "lm")
            if is_stuck(metrics.last("train", STUCK)):
                raise self._diverged(
                    f"the gradient is exactly 0 in each of the last {STUCK} steps to step {step}, at a loss of {loss:.4f}"
                )

    def _validate(self, step: int, state: State, metrics: Metrics, progress: Progress) -> None:
        adapted = self._still.replace(params=state.params)
        found = self._evaluate(adapted, self._validation)
        values = summarize(found, bool(self.data.labels))
        values |= {} if self.written is None else self.written(adapted)
        # All processes stop and keep by the same numbers.
        values = processes.by_first(lambda: values)
        if not math.isfinite(values["loss"]):
            what = f"the validation loss is {values['loss']} at step {step}"
            raise (
                self._diverged(what)
                if step
                else ValueError(f"{what}: the model itself gives no finite loss on this data")
            )
        metrics.write(step, "validation", **values, weight=float(found.weight))
        progress.say(
            f"validation at step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        )


def _is_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _to_fetch(waiting: list[Any], since: float) -> bool:
    """Whether the results of steps should be fetched, the oldest begun at `since`; several processes do it at one step."""
    return len(waiting) == _FETCH or (time.perf_counter() - since > _SILENCE and not processes.several())
