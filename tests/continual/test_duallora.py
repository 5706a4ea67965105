"""DualLoRA: directions, branches and gates against numpy; what old tasks' inputs give does not move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from continual.streams import BASE, KEY, data, fn, started, stepper

import jlora
from jlora.methods.duallora import new_directions

pytestmark = pytest.mark.once

MATRICES = {"stack 0": BASE["stack"][0], "stack 1": BASE["stack"][1], "plain": BASE["plain"]}


def of(tree, place, name):
    leaf = tree[place.split()[0]][name]
    return np.asarray(leaf[int(place[-1])] if place.startswith("stack") else leaf, np.float64)


def task_rows(task, dimension, seed=0):
    """Inputs of a task that lie in a plane of their own, and targets."""
    rng = np.random.default_rng(40 + task)
    plane = rng.standard_normal((dimension, 6))
    x = np.random.default_rng(seed + 7 * task).standard_normal((8, dimension)) @ plane
    return x.astype(np.float32), data(task)[1]


def seen(adapted, x):
    return jlora.observe(fn, jlora.input_covariance)(adapted, x)[1]


def directions_by_numpy(x, known, count, energy):
    """GPM's rule on rows: the fewest directions beyond the known ones that hold the energy."""
    x = np.asarray(x, np.float64)
    rest = x - x @ known @ known.T
    _, s, vt = np.linalg.svd(rest, full_matrices=True)
    s = np.append(s, np.zeros(x.shape[1] - len(s)))
    found, held, whole = np.zeros((x.shape[1], count)), np.sum(x**2) - np.sum(rest**2), np.sum(x**2)
    for n in range(count):
        if held >= energy * whole or s[n] ** 2 <= 1e-6 * whole:
            break
        found[:, n], held = vt[n], held + s[n] ** 2
    return found


@pytest.mark.once
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_directions_are_those_of_the_singular_vectors_of_the_rows(energy):
    x = np.random.default_rng(1).standard_normal((12, 6)) * [4, 3, 2, 1, 0.5, 0.1]
    known = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 2)))[0] @ np.diag([1.0, 0.0])
    found = np.asarray(new_directions(jnp.asarray(x.T @ x / 12), jnp.asarray(known), 3, energy))
    wanted = directions_by_numpy(x, known, 3, energy)
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=2e-5)
    assert np.count_nonzero(found.any(0)) == np.count_nonzero(wanted.any(0)) == {0.5: 1, 0.9: 2, 1.0: 3}[energy]


class Oracle:
    """The method's parts of one matrix by numpy: finished branches are dense."""

    def __init__(self, w, method, x):
        self.w, self.method, self.task = np.asarray(w, np.float64), method, 0
        self.f = [directions_by_numpy(x, np.zeros((6, 1)), method.directions, method.energy)]
        self.dense, self.u = np.zeros_like(self.w), []

    def align(self, actual):
        """Turns the last task's directions as the method's lie: a singular vector has no sign."""
        columns = actual[:, 2 * len(self.f) - 2 : 2 * len(self.f)]
        self.f[-1] = self.f[-1] * np.where(np.sum(self.f[-1] * columns, 0) < 0, -1, 1)
        np.testing.assert_allclose(self.f[-1], columns, atol=1e-4)

    def output(self, x, a, b, u):
        x = np.asarray(x, np.float64)
        y = x @ (self.w + self.dense + self.unseen(a) @ b)
        shares = [np.sum((x @ f) ** 2, -1, keepdims=True) for f in self.f]
        whole = np.sum(x**2, -1, keepdims=True) if self.method.gate == "energy" else np.max(shares, 0)
        for f, share, each in zip(self.f, shares, [*self.u, u], strict=True):
            y = y + (1 if self.method.gate == "open" else share / whole) * (x @ f @ each)
        return y

    def unseen(self, a):
        known = np.concatenate([np.zeros((6, 1)), *self.f[:-1]], 1)
        return a - known @ known.T @ a

    def next_task(self, x, a, b, u):
        self.dense, self.u = self.dense + self.unseen(a) @ b, [*self.u, u]
        known = np.concatenate(self.f, 1)
        self.f.append(directions_by_numpy(x, known, self.method.directions, self.method.energy))


@pytest.mark.once
@pytest.mark.parametrize(
    "gate", ["energy", *(pytest.param(gate, marks=pytest.mark.long) for gate in ("relative", "open"))]
)
def test_a_stream_is_that_of_numpy_compiled_once(gate):
    method, traces = jlora.DualLoRA(rank=2, directions=2, tasks=3, energy=0.8, gate=gate), []
    x, y = data(0)
    adapted, state, tx = started(method, x, (optax.adam, 0.05))
    step, oracles = stepper(tx, traces), {place: Oracle(w, method, x) for place, w in MATRICES.items()}
    parts = lambda place: [of(adapted.params, place, name) for name in "abu"]
    for task in range(3):
        x, y = data(task)
        if task:
            probe = data(9)[0]
            before, inputs = jlora.lift(fn)(adapted, probe), seen(adapted, x)
            kept = adapted.frozen["plain"]
            for place, oracle in oracles.items():
                oracle.next_task(x, *parts(place))
            adapted, state = jlora.next_task(adapted, state, tx, jax.random.fold_in(KEY, task), inputs=inputs)
            if gate != "relative":
                np.testing.assert_allclose(jlora.lift(fn)(adapted, probe), before, atol=1e-5, rtol=1e-6)
            done = slice(0, 2 * (task - 1))
            np.testing.assert_array_equal(adapted.frozen["plain"]["past_u"][done], kept["past_u"][done])
        for place, oracle in oracles.items():
            oracle.align(of(adapted.frozen, place, "f"))
        for _ in range(3):
            adapted, state, _ = step(adapted, state, x, y)
        wanted = sum(oracle.output(x, *parts(place)) for place, oracle in oracles.items())
        np.testing.assert_allclose(jlora.lift(fn)(adapted, x), wanted, atol=2e-4)
    assert len(traces) == 1
    f = of(adapted.frozen, "stack 1", "f")
    used = f[:, f.any(0)]
    np.testing.assert_allclose(used.T @ used, np.eye(used.shape[1]), atol=1e-5)
    if gate == "open":
        np.testing.assert_allclose(fn(jlora.merge(adapted), x), jlora.lift(fn)(adapted, x), atol=1e-4)


@pytest.mark.once
def test_what_inputs_of_an_earlier_task_give_does_not_move_while_the_next_is_learned():
    method = jlora.DualLoRA(rank=2, directions=2, tasks=3, energy=1.0)
    (x, y), (x2, y2) = task_rows(0, 2), task_rows(1, 2)
    adapted, state, tx = started(method, x, (optax.adam, 0.05))
    step = stepper(tx, [])
    for _ in range(20):
        adapted, state, _ = step(adapted, state, x, y)
    old = jlora.lift(fn)(adapted, x)
    adapted, state = jlora.next_task(adapted, state, tx, KEY, inputs=seen(adapted, x2))
    _, _, first = step(adapted, state, x2, y2)
    for _ in range(40):
        adapted, state, last = step(adapted, state, x2, y2)
    assert last < 0.7 * first, "the next task was not learned"
    np.testing.assert_allclose(jlora.lift(fn)(adapted, x), old, atol=2e-5)


def test_inputs_that_are_missing_and_matrices_without_room_are_refused():
    method = jlora.DualLoRA(rank=2, directions=2, tasks=3)
    adapted, state, tx = started(method, data(0)[0], (optax.adam, 0.05))
    with pytest.raises(ValueError, match=r"plain: DualLoRA\(.*covariance \(6, 6\), got nothing"):
        jlora.next_task(adapted, state, tx, KEY)
    with pytest.raises(ValueError, match=r"plain: .*\(6, 6\), got shape \(6,\)"):
        jlora.next_task(adapted, state, tx, KEY, inputs={**seen(adapted, data(0)[0]), "plain": jnp.ones(6)})
    with pytest.raises(
        ValueError, match="4 tasks of 2 directions are more than the 6 inputs; use at most 3 tasks, or 1 dir"
    ):
        started(jlora.DualLoRA(rank=2, directions=2, tasks=4), data(0)[0])
