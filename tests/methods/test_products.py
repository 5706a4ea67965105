"""Methods whose update is a product of factors, held against numpy, the authors' code and PEFT."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from descent import descend

import jlora

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parents[1] / "golden"
RNG = np.random.default_rng(0)
ROWS, COLUMNS = 12, 8
BASE = {"w": jnp.asarray(RNG.standard_normal((ROWS, COLUMNS)) / 4, jnp.float32)}
X = RNG.standard_normal((5, ROWS)).astype(np.float32)
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def started(method, base=BASE, size=0.3):
    """The start with noise on all that is trained."""
    adapted, rng = jlora.adapterize(base, {"w": method}, key=jax.random.key(1)), np.random.default_rng(2)
    noisy = lambda leaf: leaf + jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype)
    return adapted.replace(params=jax.tree.map(noisy, adapted.params))


def change(adapted):
    """How far the merged weight is from the base's."""
    return np.asarray(jlora.merge(adapted)["w"] - adapted.base["w"])


def outputs(adapted):
    return jlora.lift(lambda params, x: x @ params["w"], strict=True)(adapted, X)


# --- formulas, gradients and steps in numpy ------------------------------------------------------------------------------


def loramini(p, frozen):
    """The change of the weight, and what turns its gradient into those of the fields."""
    left, right = frozen["a_aux"], frozen["b_aux"]

    def pull(g):
        inner = 1.5 * np.einsum("ia,io,bo->ab", left, g, right)
        return {"a": inner @ p["b"].T, "b": p["a"].T @ inner}

    return 1.5 * left @ p["a"] @ p["b"] @ right, pull


def melora(p, frozen):
    """One LoRA after the other, each with its own slices."""
    rows, columns = np.split(np.arange(ROWS), 4), np.split(np.arange(COLUMNS), 4)
    delta = np.zeros((ROWS, COLUMNS))
    for i, o in zip(rows, columns):
        delta[np.ix_(i, o)] = 1.5 * p["a"][i] @ p["b"][:, o]

    def pull(g):
        found = {name: np.zeros_like(p[name]) for name in "ab"}
        for i, o in zip(rows, columns):
            found["a"][i] = 1.5 * g[np.ix_(i, o)] @ p["b"][:, o].T
            found["b"][:, o] = 1.5 * p["a"][i].T @ g[np.ix_(i, o)]
        return found

    return delta, pull


def multilora(p, frozen):
    """One branch after the other, with its scales as a diagonal matrix."""
    branches = [(p["a"][n], p["b"][n], np.diag(p["s"][n])) for n in range(3)]

    def pull(g):
        found = {
            "a": [g @ (b @ s).T for _, b, s in branches],
            "b": [a.T @ g @ s for a, _, s in branches],
            "s": [np.diag((a @ b).T @ g) for a, b, _ in branches],
        }
        return {name: 1.5 * np.stack(each) for name, each in found.items()}

    return 1.5 * sum(a @ b @ s for a, b, s in branches), pull


def gralora(p, frozen):
    """One block of the grid after the other."""
    rows, columns, ranks = (np.split(np.arange(size), 2) for size in (ROWS, COLUMNS, 4))
    blocks = [(i, o, ranks[j], ranks[n]) for n, i in enumerate(rows) for j, o in enumerate(columns)]
    delta = p["a_general"] @ p["b_general"]
    for i, o, of_a, of_b in blocks:
        delta[np.ix_(i, o)] += p["a"][np.ix_(i, of_a)] @ p["b"][np.ix_(of_b, o)]

    def pull(g):
        found = {name: np.zeros_like(p[name]) for name in "ab"}
        for i, o, of_a, of_b in blocks:
            found["a"][np.ix_(i, of_a)] += g[np.ix_(i, o)] @ p["b"][np.ix_(of_b, o)].T
            found["b"][np.ix_(of_b, o)] += p["a"][np.ix_(i, of_a)].T @ g[np.ix_(i, o)]
        found |= {"a_general": g @ p["b_general"].T, "b_general": p["a_general"].T @ g}
        return {name: 1.5 * each for name, each in found.items()}

    return 1.5 * delta, pull


WRITTEN = [
    (jlora.LoRAMini(rank=2, in_width=5, out_width=3, alpha=3), loramini),
    (jlora.MELoRA(rank=2, blocks=4, alpha=3), melora),
    (jlora.MultiLoRA(rank=2, alpha=3), multilora),
    (jlora.GraLoRA(rank=4, hybrid_rank=2, alpha=9), gralora),
]


def sgd(p, gradient, state, step):
    return {name: p[name] - 0.01 * gradient[name] for name in p}


# Above the usual one, so that rounding of gradients near zero isn't blown up to whole steps.
EPS = 1e-2


def adam(p, gradient, state, step):
    after = {}
    for name, g in gradient.items():
        m, v = state.get(name, (0.0, 0.0))
        state[name] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        after[name] = p[name] - 0.02 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + EPS)
    return after


def in_numpy(written, optimizer, p, frozen, w):
    """Outputs and gradients before ten steps on a sum of sines, and the trained arrays after them, in double precision."""
    p, frozen = ({name: np.asarray(leaf, np.float64) for name, leaf in tree.items()} for tree in (p, frozen))
    first, state = None, {}
    for step in range(1, 11):
        delta, pull = written(p, frozen)
        y = X @ (np.asarray(w, np.float64) + delta)
        gradient = pull(X.T @ np.cos(y))
        first = first or (y, gradient)
        p = optimizer(p, gradient, state, step)
    return *first, p


@pytest.mark.parametrize(("method", "written"), WRITTEN, ids=[str(method) for method, _ in WRITTEN])
def test_outputs_gradients_and_ten_steps_are_those_of_the_formula_in_numpy(method, written):
    adapted = started(method)
    p, frozen = adapted.params["w"], adapted.frozen.get("w", {})
    txs = jlora.optimizer(adapted, optax.sgd, 0.01), jlora.optimizer(adapted, optax.adam, 0.02, eps=EPS)
    for tx, optimizer in zip(txs, (sgd, adam)):
        y, _, gradients, after = descend(lambda p: outputs(adapted.replace(params=p)), adapted.params, tx, 10)
        wanted = in_numpy(written, optimizer, p, frozen, BASE["w"])
        jax.tree.map(close, (y[0], {name: each[0] for name, each in gradients["w"].items()}, after["w"]), wanted)
    close(change(adapted), written({n: np.asarray(v) for n, v in p.items()}, frozen)[0])


# --- numbers of PEFT and of the authors ----------------------------------------------------------------------------------


def numbers(file):
    return dict(np.load(GOLDEN / file))


def below(golden, prefix):
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def side(blocks, name):
    """Factors of blocks, `[blocks, in / blocks, rank]` or `[blocks, rank, out / blocks]`, as jlora keeps them."""
    return blocks.reshape(-1, blocks.shape[-1]) if name[0] == "a" else np.concatenate(blocks, axis=-1)


def ten_steps(adapted, fn, x):
    """Outputs and gradients of a sum of sines, and the trained arrays after ten steps of Adam."""
    lifted, tx = jlora.lift(fn, strict=True), jlora.optimizer(adapted, optax.adam, 0.02)
    y, _, gradients, after = descend(lambda p: lifted(adapted.replace(params=p), x), adapted.params, tx, 10)
    return y[0], jax.tree.map(lambda leaf: leaf[0], gradients), after


def test_melora_is_that_of_the_authors():
    golden = numbers("melora.npz")
    fields = {
        when: {"w": {name: side(value, name) for name, value in below(golden, f"{when}/").items()}}
        for when in ("start", "before", "gradient", "after")
    }
    adapted = jlora.adapterize({"w": golden["w"]}, {"w": jlora.MELoRA(rank=2, blocks=4, alpha=3)})
    assert jax.tree.map(np.shape, adapted.params) == jax.tree.map(np.shape, fields["start"])
    adapted = adapted.replace(params=fields["before"])
    found = ten_steps(adapted, lambda params, x: x @ params["w"] + golden["bias"], golden["x"])
    jax.tree.map(close, found, (golden["y"], fields["gradient"], fields["after"]))


def of_peft(fields):
    """The fields of jlora from PEFT's tensors of one layer."""
    names = {"gralora_A": "a", "gralora_B": "b", "gralora_A_general": "a_general", "gralora_B_general": "b_general"}
    return {names[name]: value.T if "general" in name else side(value, names[name]) for name, value in fields.items()}


@pytest.mark.parametrize(
    ("name", "method"),
    [("plain", jlora.GraLoRA(rank=4, alpha=6)), ("hybrid", jlora.GraLoRA(4, blocks=4, hybrid_rank=2, alpha=6))],
)
def test_gralora_is_that_of_peft(name, method):
    golden = below(numbers("gralora.npz"), f"{name}/")
    base, bias = below(golden, "base/"), below(golden, "bias/")
    before, gradient, after, start = (
        {layer: of_peft(below(golden, f"{when}/{layer}/")) for layer in base}
        for when in ("before", "gradient", "after", "start")
    )
    adapted = jlora.adapterize(base, {".*": method})
    assert jax.tree.map(np.shape, adapted.params) == jax.tree.map(np.shape, start)

    def fn(params, x):
        return jnp.tanh(x @ params["up"] + bias["up"]) @ params["down"] + bias["down"]

    adapted = adapted.replace(params=before)
    jax.tree.map(close, ten_steps(adapted, fn, golden["x"]), (golden["y"], gradient, after))
    jax.tree.map(close, jlora.merge(adapted.replace(params=after)), below(golden, "merged/"))


# --- what the papers say of them -----------------------------------------------------------------------------------------


def test_an_update_of_loramini_lies_between_its_constants():
    adapted = started(jlora.LoRAMini(rank=3, in_width=5, out_width=4))
    left, right = (np.asarray(adapted.frozen["w"][name], np.float64) for name in ("a_aux", "b_aux"))
    delta = change(adapted)
    close(left @ np.linalg.pinv(left) @ delta, delta)
    close(delta @ np.linalg.pinv(right) @ right, delta)
    assert np.linalg.matrix_rank(delta, tol=1e-5) == 3
    state = jax.eval_shape(jlora.optimizer(adapted, optax.adam, 0.1).init, adapted.params)
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(), (5, 3), (3, 4)}


@pytest.mark.parametrize(("blocks", "rank", "whole"), [(2, 2, 4), (4, 1, 4), (1, 2, 2)])
def test_an_update_of_melora_is_block_diagonal_and_has_the_ranks_of_all_its_blocks(blocks, rank, whole):
    delta = change(started(jlora.MELoRA(rank=rank, blocks=blocks)))
    assert np.linalg.matrix_rank(delta, tol=1e-5) == whole
    inside = np.kron(np.eye(blocks), np.ones((ROWS // blocks, COLUMNS // blocks)))
    assert np.all((delta != 0) == (inside != 0))


@pytest.mark.parametrize(("blocks", "whole"), [(1, 2), (2, 4)])
def test_an_update_of_gralora_has_as_many_times_the_rank_as_blocks(blocks, whole):
    delta = change(started(jlora.GraLoRA(rank=2, blocks=blocks)))
    assert np.linalg.matrix_rank(delta, tol=1e-5) == whole


@pytest.mark.parametrize("method", [jlora.MELoRA(2, 1, alpha=5), jlora.GraLoRA(2, 1, alpha=5)], ids=str)
def test_one_block_is_lora(method):
    adapted = started(method)
    lora = jlora.adapterize(BASE, {"w": jlora.LoRA(2, alpha=5)}).replace(params=adapted.params)
    close(change(adapted), change(lora))


def test_the_scales_of_multilora_learn_first_and_never_decay():
    adapted = jlora.adapterize(BASE, {"w": jlora.MultiLoRA(rank=2)}, key=jax.random.key(0))
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(outputs(adapted.replace(params=p)))))(adapted.params)["w"]
    assert not np.any(gradient["a"]) and not np.any(gradient["b"]) and np.all(gradient["s"])
    ones = jax.tree.map(jnp.ones_like, adapted.params)
    tx = jlora.optimizer(adapted, optax.adamw, 0.1, ratio=4, weight_decay=0.5)
    step = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)[0]["w"]
    assert np.all(step["a"] < 0) and np.all(step["b"] < 0) and not np.any(step["s"])


def test_branches_of_multilora_may_change_places():
    adapted = started(jlora.MultiLoRA(rank=2))
    turned = adapted.replace(params=jax.tree.map(lambda leaf: leaf[::-1], adapted.params))
    close(change(turned), change(adapted))
    assert len({branch.tobytes() for branch in np.asarray(adapted.params["w"]["a"])}) == 3


#: For each field the bound of its uniform start on a 256 x 128 matrix.
BOUNDS = {
    jlora.LoRAMini(8, 64, 16): {"a_aux": 256**-0.5, "a": 64**-0.5, "b": 0, "b_aux": 16**-0.5},
    jlora.MELoRA(8, 4): {"a": 64**-0.5, "b": 0},
    jlora.MultiLoRA(8): {"a": 256**-0.5, "b": 8**-0.5, "s": 0},
    jlora.GraLoRA(8, 4, 8): {"a": 64**-0.5, "b": 0, "a_general": 256**-0.5, "b_general": 0},
}


@pytest.mark.parametrize("method", BOUNDS, ids=str)
def test_factors_start_uniformly_as_in_the_references(method):
    adapted = jlora.adapterize({"w": jnp.zeros((256, 128))}, {"w": method}, key=jax.random.key(0))
    fields = {**adapted.params["w"], **adapted.frozen.get("w", {})}
    assert set(fields) == set(BOUNDS[method])
    for name, bound in BOUNDS[method].items():
        drawn = np.abs(np.asarray(fields[name]))
        assert np.max(drawn) <= bound and abs(np.mean(drawn) - bound / 2) <= 0.03 * bound, name


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jlora.LoRAMini(rank=8, in_width=4), "rank 8 is above its smaller width 4; use a smaller rank, or"),
        (lambda: jlora.LoRAMini(in_width=0), "in_width must be a positive whole number, got 0"),
        (lambda: jlora.MELoRA(blocks=0), "blocks must be a positive whole number, got 0"),
        (lambda: jlora.MultiLoRA(branches=0), "branches must be a positive whole number, got 0"),
        (lambda: jlora.GraLoRA(rank=6, blocks=4), "rank must be a multiple of its 4 blocks, got 6"),
        (lambda: jlora.GraLoRA(hybrid_rank=-1), "hybrid_rank must be an integer of at least 0, got -1"),
    ],
)
def test_hyperparameters_that_can_not_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (jlora.LoRAMini(2, 13, 4), r"in_width 13 is above that side of the 12 x 8 matrix; use 12 or less"),
        (jlora.LoRAMini(2, 4, 9), r"out_width 9 is above that side of the 12 x 8 matrix; use 8 or less"),
        (jlora.MELoRA(1, 8), r"blocks 8 must divide both sides of the 12 x 8 matrix; use 4, or another divisor of 4"),
        (jlora.MELoRA(3, 4), r"rank 3 is above the smaller side of a block .* use 2 or less, or fewer blocks"),
        (jlora.MultiLoRA(9), r"rank 9 is above the smaller side of the 12 x 8 matrix; use 8 or less"),
        (jlora.GraLoRA(9, 3), r"blocks 3 must divide both sides of the 12 x 8 matrix; use 2, or another divisor of 4"),
        (jlora.GraLoRA(10), r"rank 10 is above the smaller side of the 12 x 8 matrix; use 8 or less"),
        (jlora.GraLoRA(2, 2, 9), r"hybrid_rank 9 is above the smaller side of the 12 x 8 matrix; use 8 or less"),
    ],
)
def test_matrices_that_can_not_be_adapted_are_refused_by_name(method, words):
    with pytest.raises(ValueError, match=rf"^w, shape \(12, 8\): {words}"):
        jlora.adapterize(BASE, {"w": method})
