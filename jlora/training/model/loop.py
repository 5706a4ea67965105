"""The training and the validation step: a lifted function, adapters donated, the base an argument without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from jlora.core.transforms.observe import Asked, asked_by
from jlora.training.data.pipeline import Batch
from jlora.training.data.streaming.lazy import Made
from jlora.training.hosts import processes
from jlora.training.hosts.placement import rows_of_batch
from jlora.training.model.losses import Forward, Objective, Sums, lifted_forward, sums, with_prompts


class State(NamedTuple):
    """What changes from step to step.

    Attributes:
        params: the trained arrays, `adapted.params`.
        opt_state: the optimizer's state.
        step: int32, steps done.
        key: the run's random key; step `n` uses it folded with `n`.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


class StepResult(NamedTuple):
    """What a step reports: mean loss, norm of the gradient before clipping, number of predictions, and `Sums.more`."""

    loss: jax.Array
    gradient_norm: jax.Array
    weight: jax.Array
    more: dict[str, jax.Array] = {}  # noqa: RUF012  (never changed)


Step = Callable[[State, jlora.Adapted, dict[str, jax.Array]], tuple[State, StepResult]]


def make_step(
    forward: Forward,
    tx: optax.GradientTransformation,
    start: State | None = None,
    cuts: Mapping[str, int] | None = None,
    rows: int = 1,
    texts: int = 1,
    objective: Objective = sums,
) -> Step:
    """The jitted training step.

    Args:
        forward: the plain model; it is lifted here, and observed where an optimizer rule takes statistics of inputs.
        tx: the optimizer, clipping included.
        start: the first state, on a mesh; its arrays stay where they are from step to step. Without it the compiler may
            move them.
        cuts, rows: as for `jlora.lift`.
        texts: how many texts a row has at most, each of which gets the virtual tokens of prompts.
        objective: the loss.

    Returns:
        `step(state, adapted, batch) -> state, result`, where `state` is donated, `adapted` gives base and constants,
        and the arrays of `batch` are `[parts, rows, …]`: gradients of the parts are summed, and divided by the weight
        of all, so the result does not depend on the number of parts (but for rounding).
    """
    step = training_step(forward, tx, texts, objective, cuts=cuts, rows=rows)
    places = None if start is None else (jax.tree.map(lambda leaf: leaf.sharding, start), None)
    return jax.jit(step, donate_argnums=0, out_shardings=places)


def training_step(
    forward: Forward,
    tx: optax.GradientTransformation,
    texts: int = 1,
    objective: Objective = sums,
    **lifting: Any,
) -> Step:
    """The step of `make_step` as a function that is not jitted; `lifting` are options of `jlora.lift`."""
    lifted = lifted_forward(forward, texts, **lifting)

    def step(state: State, adapted: jlora.Adapted, batch: dict[str, jax.Array]) -> tuple[State, StepResult]:
        weight = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        key, asked = jax.random.fold_in(state.key, state.step), asked_by(adapted)

        def mean_loss(params, part, part_key):
            whole = adapted.replace(params=params).on(dropout=part_key)
            if asked is None:
                found, seen = objective(lifted, whole, part), {}
            else:
                found, seen = _observed_sums(forward, asked, whole, part, lifting, texts, objective)
            return found.loss / weight, (seen, found.more)

        (loss, (seen, more)), gradient = _over_parts(
            jax.value_and_grad(mean_loss, has_aux=True), state.params, batch, key
        )
        inputs: Any = {} if asked is None else {"inputs": asked.finished(seen)}
        updates, opt_state = tx.update(gradient, state.opt_state, state.params, **inputs)
        params = optax.apply_updates(state.params, updates)
        result = StepResult(loss, optax.tree.norm(gradient), jnp.sum(batch["weights"]), more)
        return State(params, opt_state, state.step + 1, state.key), result

    return step


def _over_parts(value_and_grad: Callable, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[Any, Any]:
    """Sums of the parts' values and gradients; a loop only where there are several parts."""
    parts = batch["weights"].shape[0]
    if parts == 1:
        return value_and_grad(params, jax.tree.map(lambda x: x[0], batch), key)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, part[0], jax.random.fold_in(key, part[1]))), None

    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], batch), key)
    zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zero, (batch, jnp.arange(parts)))[0]


def _observed_sums(
    forward: Forward,
    asked: Asked,
    adapted: jlora.Adapted,
    batch: Any,
    lifting: dict[str, Any],
    texts: int,
    objective: Objective,
) -> tuple[Sums, Any]:
    """The sums of a batch, and what was measured of the inputs, to be added up over parts."""
    observed, seen = jlora.observe(forward, asked.statistic.measure, asked.at, **lifting), []

    def kept(params: Any, batch: Any) -> jax.Array:
        logits, found = observed(params, batch)
        seen.append(found)
        return logits

    return objective(with_prompts(kept, texts), adapted, batch), seen[0]


def make_evaluation(
    forward: Forward, cuts: Mapping[str, int] | None = None, texts: int = 1, objective: Objective = sums
) -> Callable[[jlora.Adapted, Iterable[Any]], Sums]:
    """A function that sums the loss of an `Adapted` (without dropout) over batches on the devices; the rest as for the step."""
    lifted = lifted_forward(forward, texts, cuts=cuts)
    step = jax.jit(lambda adapted, batch: objective(lifted, adapted, batch))

    def evaluate(adapted: jlora.Adapted, batches: Iterable[Any]) -> Sums:
        # In float64, so that many small batches add up as one.
        parts = [jax.device_get(step(adapted, batch)) for batch in batches]
        return jax.tree.map(lambda *values: np.sum(np.array(values, np.float64), axis=0), *parts)

    return evaluate


def make_rows(
    forward: Forward, mesh: Mesh, cuts: Mapping[str, int] | None = None
) -> Callable[[jlora.Adapted, Iterable[Any]], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A function of a classifier's `Adapted` and batches on the devices: losses, predicted labels and labels of the rows."""
    lifted, place = lifted_forward(forward, cuts=cuts), NamedSharding(mesh, PartitionSpec())

    def of_batch(adapted: jlora.Adapted, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        logits, labels = lifted(adapted, batch).astype(jnp.float32), batch["labels"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, jnp.argmax(logits, axis=-1), labels, batch["weights"]

    step = jax.jit(of_batch, out_shardings=place)

    def rows(adapted: jlora.Adapted, batches: Iterable[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = [jax.device_get(step(adapted, batch)) for batch in batches]
        losses, predicted, labels, weights = (np.concatenate(arrays) for arrays in zip(*found))
        real = weights > 0
        return losses[real], predicted[real], labels[real]

    return rows


def held_out_loss(
    forward: Forward, cuts: Mapping[str, int] | None = None, texts: int = 1, objective: Objective = sums
) -> Callable[[jlora.Adapted, Any], jax.Array]:
    """`loss(adapted, batch)`: the mean loss of an `Adapted` (without dropout) on a batch, for events; traceable."""
    lifted = lifted_forward(forward, texts, cuts=cuts)

    def loss(adapted: jlora.Adapted, batch: Any) -> jax.Array:
        found = objective(lifted, adapted, batch)
        return found.loss / jnp.maximum(found.weight, 1.0)

    return loss


def to_devices(batch: Batch, mesh: Mesh, parts: int = 0) -> dict[str, jax.Array]:
    """A batch on the mesh, its rows cut by `data`; with `parts`, as `[parts, rows / parts, …]`."""
    if parts:
        batch = {name: np.reshape(x, (parts, x.shape[0] // parts, *x.shape[1:])) for name, x in batch.items()}
    place = rows_of_batch(mesh, 1 if parts else 0)
    return {name: processes.put(x, place) for name, x in batch.items()}


def on_devices(batches: Sequence[Batch], mesh: Mesh) -> Sequence[dict[str, jax.Array]]:
    """Batches on the mesh; those that are made when they are asked for are brought there then, each time."""
    if isinstance(batches, Made):
        return Made(len(batches), lambda number: to_devices(batches[number], mesh))
    return [to_devices(batch, mesh) for batch in batches]
