"""Online-LoRA against the authors' loop, written again in numpy; plateaus; task scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from continual.streams import jit

import jlora
from jlora.continual.online import own_label_losses
from jlora.continual.plateau import Plateau

pytestmark = pytest.mark.once

KEY = jax.random.key(1)
RNG = np.random.default_rng(3)
W = RNG.standard_normal((6, 4)).astype(np.float32)
HEAD = (RNG.standard_normal((4, 3)) / 2).astype(np.float32)
RATE, PENALTY = 0.1, 30.0


def plateaus_by_lists(losses, window, mean_below, variance_below):
    """The authors' loop, which waits for a full window here; where plateaus are told."""
    kept, armed, told, last = [], True, [], (0.0, 0.0)
    for number, loss in enumerate(losses):
        kept = [*kept, loss][-window:]
        mean, variance = np.mean(kept), np.var(kept)
        if not armed and mean > last[0] + np.sqrt(last[1]):
            armed = True
        if armed and len(kept) == window and mean < mean_below and variance < variance_below:
            armed, last = False, (mean, variance)
            told.append(number)
    return told


def test_plateaus_are_told_once_until_the_loss_has_risen():
    rng = np.random.default_rng(0)
    steps = np.concatenate([np.linspace(9, 3, 12), np.full(8, 3.0), np.linspace(8, 2, 9), np.full(9, 2.0)])
    losses = (steps + 0.05 * rng.standard_normal(len(steps))).astype(np.float32)
    plateau, told = Plateau(5, 6.0, 0.1), []
    update, state = jit(plateau.update), plateau.init()
    for number, loss in enumerate(losses):
        state, now = update(state, loss)
        told += [number] if now else []
    assert told == plateaus_by_lists(losses, 5, 6.0, 0.1)
    assert len(told) >= 2 and told[0] >= 12 and told[1] >= 29, "one plateau on each of the two levels"
    with pytest.raises(ValueError, match="window must be a whole number of at least 1, got 0"):
        Plateau(0)


def logits(adapted, batch):
    return jlora.lift(lambda p, x: (x @ p["w"]) @ p["head"])(adapted, batch["x"])


def losses(adapted, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(adapted, batch), batch["y"])


def surprise(adapted, batch):
    return own_label_losses(logits(adapted, batch))


def stream(steps):
    """Batches of three rows whose classes change in the middle."""
    rng = np.random.default_rng(11)
    for step in range(steps):
        y = rng.integers(0, 2, 3) + (step >= steps // 2)
        yield {"x": (rng.standard_normal((3, 6)) + 2 * np.eye(6)[y]).astype(np.float32), "y": y.astype(np.int32)}


class Oracle:
    """The authors' loop in float64: lists for the buffer, gradients by hand, the history added up densely."""

    def __init__(self, a, plateau):
        self.w, self.head = W.astype(np.float64), HEAD.astype(np.float64)
        self.a, self.b = a, np.zeros((2, 4))
        self.omega, self.buffer, self.count, self.window = None, [], 0, []
        self.plateau, self.losses, self.told = plateau, [], []

    def gradients(self, x, y):
        """The loss of one row and its gradients by `a`, `b` and `head`."""
        hidden = x @ (self.w + self.a @ self.b)
        z = hidden @ self.head
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        dz = p - np.eye(3)[y]
        dw = np.outer(x, self.head @ dz)
        return -np.log(p[y]), [dw @ self.b.T, self.a.T @ dw, np.outer(hidden, dz)], np.argmax(z)

    def step(self, batch, new_a):
        rows = list(zip(batch["x"].astype(np.float64), batch["y"]))
        found = [self.gradients(*row) for row in (*rows, *self.buffer)]
        weights = [1 / len(rows)] * len(rows) + [1] * len(self.buffer)
        loss = sum(weight * each[0] for weight, each in zip(weights, found))
        grads = [sum(w * each[1][n] for w, each in zip(weights, found)) for n in range(3)]
        if self.omega:
            grads[0], grads[1] = (
                grads[0] + PENALTY * self.omega[0] * self.a,
                grads[1] + PENALTY * self.omega[1] * self.b,
            )
        self.a, self.b, self.head = (v - RATE * g for v, g in zip((self.a, self.b, self.head), grads))
        self.losses.append(loss)
        told = plateaus_by_lists(self.losses, *self.plateau)
        if told and told[-1] == len(self.losses) - 1:
            self.begin(new_a)
        hardest = sorted(range(len(found)), key=lambda n: -found[n][0])[:4]
        self.buffer = [(*rows, *self.buffer)[n] for n in hardest]
        return loss

    def begin(self, new_a):
        self.count += 1
        squares = [np.zeros_like(self.a), np.zeros_like(self.b)]
        for x, _ in self.buffer:
            own = self.gradients(x, 0)[2]
            each = self.gradients(x, own)[1]
            squares = [total + each[n] ** 2 for n, total in enumerate(squares)]
        old = self.omega or [0, 0]
        self.omega = [g / self.count + (1 - 1 / self.count) * o for g, o in zip(squares, old)]
        self.w = self.w + self.a @ self.b
        self.a, self.b = new_a, np.zeros((2, 4))


@functools.cache
def trained(links, steps=40):
    """The oracle's losses and ours, and what our run ends with."""
    lora = jlora.LoRA(2, alpha=2)
    spec = {"w": lora if links is None else jlora.Chain(lora, links), "head": jlora.Full()}
    adapted = jlora.adapterize({"w": jnp.asarray(W), "head": jnp.asarray(HEAD)}, spec, KEY)
    tx = jlora.optimizer(adapted, optax.sgd, RATE)
    plateau = Plateau(3, 6.0, 0.5)
    online = jlora.OnlineLoRA(losses, tx, surprise, penalty=PENALTY, plateau=plateau)
    batches = list(stream(steps))
    state, memory = tx.init(adapted.params), online.init(adapted, batches[0])
    oracle = Oracle(np.asarray(adapted.params["w"]["a"], np.float64), (3, 6.0, 0.5))
    step, found = jit(online.step), []
    for batch in batches:
        adapted, state, memory = step(adapted, state, memory, batch, KEY)
        wanted = oracle.step(batch, np.asarray(adapted.params["w"]["a"], np.float64))
        found.append((float(memory.loss), wanted, bool(memory.restarted)))
    return found, adapted, memory, oracle, step


@pytest.mark.once
def test_a_stream_is_that_of_the_authors_loop_in_one_compiled_program():
    found, adapted, memory, oracle, step = trained(None)
    ours, wanted, restarts = zip(*found)
    assert sum(restarts) == int(memory.restarts) == oracle.count >= 2, "too few plateaus to tell anything"
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    np.testing.assert_allclose(jlora.merge(adapted)["w"], oracle.w + oracle.a @ oracle.b, atol=1e-4)
    for name, omega in zip("ab", oracle.omega):
        np.testing.assert_allclose(memory.importance["w"][name], omega, atol=1e-5)
        assert np.min(memory.importance["w"][name]) >= 0
    np.testing.assert_allclose(memory.buffer["x"], np.stack([x for x, _ in oracle.buffer]), atol=1e-6)
    assert step._cache_size() == 1


@pytest.mark.once
def test_a_chain_keeps_the_base_and_goes_on_with_its_last_link():
    found, adapted, memory, _, _ = trained(2)
    assert int(memory.restarts) == 1 and sum(restarted for _, _, restarted in found) == 1
    np.testing.assert_array_equal(adapted.base["w"], W)
    plain = trained(None)[0]
    first = next(n for n, (_, _, restarted) in enumerate(found) if restarted)
    np.testing.assert_allclose(*([loss for loss, _, _ in each[: first + 4]] for each in (found, plain)), atol=1e-4)


def test_the_output_does_not_jump_where_an_adapter_begins_and_moments_are_new():
    adapted = jlora.adapterize({"w": jnp.asarray(W), "head": jnp.asarray(HEAD)}, {"w": jlora.LoRA(2)}, KEY)
    tx = jlora.optimizer(adapted, optax.adam, 0.0)
    adapted = adapted.replace(params=jax.tree.map(lambda x: x + 0.3, adapted.params))
    online = jlora.OnlineLoRA(losses, tx, penalty=0.0, plateau=Plateau(1, 1e3, 1e3))
    batch = next(stream(1))
    before = logits(adapted, batch)
    after, state, memory = jit(online.step)(adapted, tx.init(adapted.params), online.init(adapted, batch), batch, KEY)
    assert bool(memory.restarted)
    np.testing.assert_allclose(logits(after, batch), before, atol=1e-6)
    assert not np.any(after.params["w"]["b"]) and np.any(after.params["w"]["a"] != adapted.params["w"]["a"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state))


def test_what_online_lora_cannot_do_is_refused():
    adapted = jlora.adapterize({"w": jnp.asarray(W, jnp.bfloat16)}, {"w": jlora.LoRA(2)})
    tx = jlora.optimizer(adapted, optax.adam, 0.1)
    with pytest.raises(ValueError, match=r"w: the base is bfloat16.*Chain"):
        jlora.OnlineLoRA(losses, tx).init(adapted, {"x": jnp.ones((3, 6))})
    adapted = jlora.adapterize({"w": jnp.asarray(W)}, {"w": jlora.LoRA(2)})
    with pytest.raises(ValueError, match=r"the same number of items in front, got 2, 3"):
        jlora.OnlineLoRA(losses, tx).init(adapted, {"x": jnp.ones((3, 6)), "y": jnp.ones(2)})
    mean = jlora.OnlineLoRA(lambda a, batch: jnp.mean(jlora.lift(lambda p, x: x @ p["w"])(a, batch)), tx)
    memory, x = mean.init(adapted, jnp.ones((3, 6))), jnp.ones((3, 6))
    with pytest.raises(ValueError, match=r"one loss for each of 7 items, got shape \(\)"):
        mean.step(adapted, tx.init(adapted.params), memory, x, KEY)
    with pytest.raises(ValueError, match="buffer must be a whole number of at least 1"):
        jlora.OnlineLoRA(losses, tx, buffer=0)


def test_task_scores_are_those_of_their_formulas():
    table = RNG.uniform(size=(5, 5))
    scores = jlora.TaskScores(np.where(np.tri(5), table, np.nan))
    assert scores.average == pytest.approx(sum(table[4]) / 5)
    assert scores.anytime_average == pytest.approx(sum(sum(table[t, : t + 1]) / (t + 1) for t in range(5)) / 5)
    lost = [max(table[t, i] for t in range(i, 5)) - table[4, i] for i in range(4)]
    assert scores.forgetting == pytest.approx(sum(lost) / 4) and scores.forgetting >= 0
    assert scores.backward_transfer == pytest.approx(sum(table[4, i] - table[i, i] for i in range(4)) / 4)
    untrained = RNG.uniform(size=5)
    wanted = sum(table[i - 1, i] - untrained[i] for i in range(1, 5)) / 4
    assert jlora.TaskScores(table).forward_transfer(untrained) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="before it is trained"):
        scores.forward_transfer(untrained)
    with pytest.raises(ValueError, match="lacks the score on task 0 after task 1"):
        jlora.TaskScores([[1.0, 0.0], [np.nan, 1.0]])
    with pytest.raises(ValueError, match=r"got shape \(2, 3\)"):
        jlora.TaskScores(np.ones((2, 3)))
    assert jlora.TaskScores([[0.5]]).forgetting == 0
