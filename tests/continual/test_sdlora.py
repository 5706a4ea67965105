"""SD-LoRA and `next_task`: whole trainings against numpy, what stays and what begins anew, and directions that are absorbed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from continual.streams import BASE, KEY, data, fn, jit, matrices, started, stepper, weights

import jlora
from jlora.methods.sdlora import made_up

pytestmark = pytest.mark.once

TASKS, STEPS, EPS = 3, 4, 1e-2
MATRICES = [*BASE["stack"].astype(np.float64), BASE["plain"].astype(np.float64)]


class Oracle:
    """SD-LoRA with SGD of momentum 0.9 in float64, its gradients by hand; a direction is kept as it was normalised."""

    def __init__(self, method, a, b):
        self.method, self.a, self.b = method, a, b
        self.past, self.m = [], np.full(method.tasks, method.magnitude)
        self.moments = self.fresh() | {"m": np.zeros(method.tasks)}

    def fresh(self):
        return {"a": [np.zeros_like(a) for a in self.a], "b": [np.zeros_like(b) for b in self.b]}

    def used(self):
        ranks = self.method.ranks or (self.method.rank,) * self.method.tasks
        return np.arange(self.method.rank) < ranks[len(self.past)]

    def length(self, a, b):
        if self.method.norm == "factors":
            return np.sqrt(np.sum(a**2) * np.sum(b**2) + EPS**2)
        return np.sqrt(np.sum((a @ b) ** 2) + EPS**2)

    def directions(self):
        """The present directions, normalised as they act, and all of them normalised."""
        now, unit = [], []
        for a, b in zip(self.a, self.b):
            a, b = a[:, self.used()], b[self.used()]
            unit.append(a @ b / self.length(a, b))
            now.append(unit[-1] if self.method.normalize_current else a @ b)
        return now, unit

    def weights(self):
        now, t = self.directions()[0], len(self.past)
        return [
            w + self.m[t] * now[i] + sum(self.m[k] * self.past[k][i] for k in range(t)) for i, w in enumerate(MATRICES)
        ]

    def step(self, x, y):
        g = x.T.astype(np.float64) @ (x @ sum(self.weights()) - y) / len(x)
        now, t, used = self.directions()[0], len(self.past), self.used()
        m = np.zeros_like(self.m)
        m[t] = sum(np.sum(g * d) for d in now)
        for k in range(t):
            m[k] = sum(np.sum(g * d) for d in self.past[k])
        grads = self.fresh() | {"m": m}
        for i, (a, b) in enumerate(zip(self.a, self.b)):
            a, b = a[:, used], b[used]
            d, n = a @ b, self.length(a, b)
            inner, each = self.m[t] * g, [0, 0]
            if self.method.normalize_current:
                pull = np.sum(g * d) * self.m[t] / n**3
                if self.method.norm == "factors":
                    each = [-pull * np.sum(b**2) * a, -pull * np.sum(a**2) * b]
                else:
                    inner = inner - pull * n * d
                inner = inner / n
            grads["a"][i][:, used] = inner @ b.T + each[0]
            grads["b"][i][used] = a.T @ inner + each[1]
        self.move(grads)

    def move(self, grads):
        for name in ("a", "b", "m"):
            value, moments, grad = getattr(self, name), self.moments[name], grads[name]
            for v, mu, g in zip(value, moments, grad) if name != "m" else [(value, moments, grad)]:
                mu *= 0.9
                mu += g
                v -= 0.05 * mu

    def next_task(self, a):
        self.past.append(self.directions()[1])
        self.a, self.b = a, [np.zeros_like(b) for b in self.b]
        self.moments |= self.fresh()
        if not self.method.carry:
            self.m[:], self.moments["m"] = self.method.magnitude, np.zeros_like(self.m)


METHODS = {
    "paper": jlora.SDLoRA(rank=2, tasks=TASKS),
    "RR": jlora.SDLoRA(rank=3, tasks=TASKS, ranks=(3, 1, 2), norm="factors"),
    "code": jlora.SDLoRA(2, TASKS, magnitude=0.8, norm="factors", normalize_current=False, carry=False),
}


@pytest.mark.once
@pytest.mark.parametrize("name", ["paper", *(pytest.param(name, marks=pytest.mark.long) for name in ("RR", "code"))])
def test_a_whole_stream_is_that_of_numpy_compiled_once_and_continuous(name):
    method, traces = METHODS[name], []
    adapted, state, tx = started(method)
    oracle, step = Oracle(method, *(matrices(adapted.params, field) for field in "ab")), stepper(tx, traces)
    for task in range(TASKS):
        x, y = data(task)
        if task:
            before = weights(adapted)
            adapted, state = jlora.next_task(adapted, state, tx, jax.random.fold_in(KEY, task))
            oracle.next_task(matrices(adapted.params, "a"))
            jump = max(np.abs(new - old).max() for new, old in zip(weights(adapted), before))
            assert jump > 1e-2 if name == "code" else jump < 1e-6
        for _ in range(STEPS):
            adapted, state, _ = step(adapted, state, x, y)
            oracle.step(x, y)
        for got, wanted in zip(weights(adapted), oracle.weights()):
            np.testing.assert_allclose(got, wanted, atol=2e-5)
        np.testing.assert_allclose(adapted.params["~shared"]["SDLoRA"]["magnitudes"], oracle.m, atol=2e-5)
    assert len(traces) == 1, "the step was compiled again for another task"
    small = jlora.compact(adapted)
    assert small.plan.sites[0].method.rank == sum(method.ranks or (method.rank,) * TASKS)
    np.testing.assert_allclose(jlora.lift(fn)(small, x), jlora.lift(fn)(adapted, x), atol=1e-5)


def test_moments_of_directions_begin_anew_and_those_of_magnitudes_go_on():
    adapted, state, tx = started(jlora.SDLoRA(rank=2, tasks=3), tx=(optax.adam, 0.01))
    step = stepper(tx, [])
    for _ in range(3):
        adapted, state, _ = step(adapted, state, *data(0))
    kept = jax.device_get(optax.tree_utils.tree_get_all_with_path(state, "mu"))
    magnitudes = [tree["~shared"]["SDLoRA"]["magnitudes"] for _, tree in kept if "magnitudes" in str(tree)]
    magnitudes = next(m for m in magnitudes if isinstance(m, np.ndarray))
    assert magnitudes[0] != 0 and not magnitudes[1:].any(), "a magnitude of a task to come was trained"
    adapted, state = jlora.next_task(adapted, state, tx, KEY)
    counts = {int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state, "count")}
    assert counts == {0, 3}
    for _, tree in optax.tree_utils.tree_get_all_with_path(state, "mu"):
        for path in ("stack", "plain"):
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(tree[path]))
        for leaf in jax.tree.leaves(tree["~shared"]):
            np.testing.assert_array_equal(leaf, magnitudes)


def planted(share):
    """An adapter in its third task, whose direction is `share` of a mixture of the first two, and the rest of another."""
    method = jlora.SDLoRA(rank=2, tasks=4, absorb=1e-3, eps=1e-6)
    adapted, state, tx = started(method)
    rng = np.random.default_rng(5)
    q, r = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (6, 5))
    unit = lambda k: (q[:, [k, k + 3]] * [1.0, 0.0], r[[k, k + 2]])
    both = (q[:, [0, 1]], np.stack([0.6 * r[0], 0.8 * r[1]]))
    other = (q[:, [2, 3]] * 2, np.stack([r[2], 0 * r[2]]))
    for number, (a, b) in enumerate((unit(0), unit(1), both if share else other)):
        fields = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
        stack = {name: jnp.stack([x, x]) for name, x in fields.items()}
        adapted = adapted.replace(params={**adapted.params, "stack": stack, "plain": fields})
        if number < 2:
            adapted, state = jlora.next_task(adapted, state, tx, jax.random.fold_in(KEY, number))
    shared = {"SDLoRA": {"magnitudes": jnp.asarray([1.5, -0.5, 2.0, 1.0])}}
    return adapted.replace(params={**adapted.params, "~shared": shared}), state, tx


@pytest.mark.once
@pytest.mark.parametrize("share", [True, False])
def test_a_direction_that_earlier_ones_make_up_goes_into_their_magnitudes(share):
    adapted, state, tx = planted(share)
    before = weights(adapted)
    adapted, state = jlora.next_task(adapted, state, tx, KEY)
    task, m = adapted.frozen["~shared"]["SDLoRA"]["task"], adapted.params["~shared"]["SDLoRA"]["magnitudes"]
    assert int(task) == (2 if share else 3)
    wanted = [1.5 + 2 * 0.6, -0.5 + 2 * 0.8, 1.0, 1.0] if share else [1.5, -0.5, 2.0, 1.0]
    np.testing.assert_allclose(m, wanted, atol=1e-5)
    for new, old in zip(weights(adapted), before):
        np.testing.assert_allclose(new, old, atol=1e-5)
    if not share:
        for a, b in zip(*(matrices(adapted.frozen, name) for name in ("past_a", "past_b"))):
            norms = [np.linalg.norm(a[:, n : n + 2] @ b[n : n + 2]) for n in (0, 2, 4)]
            np.testing.assert_allclose(norms, 1, atol=1e-6)


@pytest.mark.once
def test_least_squares_are_those_of_dense_vectors_also_where_directions_repeat():
    rng = np.random.default_rng(2)
    d = rng.standard_normal((4, 30))
    d[1] = d[0]
    new = rng.standard_normal(30)
    known = np.array([True, True, True, False])
    parts, error = jax.tree.map(np.asarray, made_up(*map(jnp.asarray, (d @ d.T, d @ new, new @ new, known))))
    wanted = np.linalg.lstsq(d[:3].T, new, rcond=None)[0]
    np.testing.assert_allclose(parts[:3] @ d[:3], wanted @ d[:3], atol=1e-4)
    np.testing.assert_allclose(error, np.sum((new - wanted @ d[:3]) ** 2) / (new @ new), atol=1e-5)
    assert parts[3] == 0
    assert float(made_up(*map(jnp.asarray, (d @ d.T, d @ new, new @ new, known & False)))[1]) == 1


def test_what_cannot_be_is_refused_with_the_leaf():
    adapted, state, tx = started(jlora.SDLoRA(rank=2, tasks=2))
    with pytest.raises(TypeError, match="outside of jit"):
        jit(lambda a, s: jlora.next_task(a, s, tx, KEY))(adapted, state)
    with pytest.raises(ValueError, match="trains arrays that its leaves share"):
        jlora.restart(adapted, state, tx, KEY)
    adapted, state = jlora.next_task(adapted, state, tx, KEY)
    with pytest.raises(ValueError, match=r"plain: SDLoRA\(.*\) has room for 2 tasks, and all of it is taken"):
        jlora.next_task(adapted, state, tx, KEY)
    plain, state, tx = started(jlora.LoRA(2))
    with pytest.raises(ValueError, match="nothing adapted here learns one task after another"):
        jlora.next_task(plain, state, tx, KEY)
    inside = {"plain": jlora.DoRA(jlora.SDLoRA(rank=2)), "stack": jlora.Axes("batch in out", jlora.SDLoRA(rank=2))}
    with pytest.raises(ValueError, match=r"plain: DoRA\(.*\) has a method inside whose tasks can't be ended there"):
        jlora.next_task(jlora.adapterize(BASE, inside), state, tx, KEY)
    with pytest.raises(ValueError, match=r"SDLoRA's ranks must be 3 whole numbers from 1 to its rank 2"):
        jlora.SDLoRA(rank=2, tasks=3, ranks=(2, 3, 1))


@pytest.mark.once
def test_a_run_that_stopped_within_a_task_ends_with_the_same_bits(tmp_path):
    method = jlora.SDLoRA(rank=2, tasks=3)
    adapted, state, tx = started(method)
    step = stepper(tx, [])
    adapted, state, _ = step(adapted, state, *data(0))
    adapted, state = jlora.next_task(adapted, state, tx, KEY)
    adapted, state, _ = step(adapted, state, *data(1))
    jlora.save(tmp_path / "stopped", adapted)
    kept = jax.device_get(state)
    on = [adapted, state, tx]
    again = [jlora.load(tmp_path / "stopped", jax.tree.map(jnp.asarray, BASE)), jax.tree.map(jnp.asarray, kept), tx]
    ends = []
    for adapted, state, tx in (on, again):
        adapted, state, _ = step(adapted, state, *data(1))
        adapted, state = jlora.next_task(adapted, state, tx, jax.random.fold_in(KEY, 2))
        ends.append(jax.tree.leaves((step(adapted, state, *data(2))[0].params, adapted.frozen)))
    assert all(map(np.array_equal, *ends))
