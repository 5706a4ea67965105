"""SHiRA: PEFT's numbers, its masks against numpy, and the sparse product against the dense one."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import checks, discovery
from contract.problems import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.core.products import entries
from jlora.methods.shira import struct_index
from jlora.optimize.optimizer import labels

pytestmark = pytest.mark.once

GOLDEN = np.load(Path(__file__).parent / "golden" / "shira.npz")
W, X = normal(0, 12, 8), normal(1, 5, 12)


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def product(params, x):
    return x @ params["w"]


def loss(params, x):
    return jnp.sum(jnp.sin(product(params, x)))


def adapted_with(method, w=W, values=None, **options):
    adapted = jlora.adapterize({"w": w}, {"w": method}, **options)
    if values is None:
        values = normal(7, *adapted.params["w"]["values"].shape, scale=0.3)
    return adapted.replace(params={"w": {**adapted.params["w"], "values": values}})


def index_of(adapted):
    return np.asarray(adapted.frozen["w"]["index"])


def test_peft_gives_the_same_output_gradient_steps_and_merged_weight():
    w = jnp.asarray(GOLDEN["w"])
    adapted = adapted_with(jlora.SHiRA("weight", rank=1), w, jnp.asarray(GOLDEN["values"]))
    np.testing.assert_array_equal(index_of(adapted), GOLDEN["index"])
    tx = jlora.optimizer(adapted, optax.adamw, learning_rate=0.01, weight_decay=0.1)

    def full_loss(p):
        y = jlora.lift(product)(adapted.replace(params=p), GOLDEN["x"]) + GOLDEN["bias"]
        return jnp.sum(jnp.sin(y)), y

    p, state, first = adapted.params, tx.init(adapted.params), None
    for _ in range(5):
        (_, y), gradient = jax.value_and_grad(full_loss, has_aux=True)(p)
        first = first or (y, gradient["w"]["values"])
        updates, state = tx.update(gradient, state, p)
        p = optax.apply_updates(p, updates)
    close(first[0], GOLDEN["y"])
    close(first[1], GOLDEN["gradient"])
    close(p["w"]["values"], GOLDEN["after"], 1e-4)
    half = adapted_with(jlora.SHiRA("weight", rank=1, scale=0.5), w, p["w"]["values"])
    close(jlora.merge(half)["w"], GOLDEN["merged"], 1e-4)


def first_of(score, k, offset=0):
    """Flat positions of the k largest after offset * k larger ones; of equal ones the first."""
    order = sorted(range(score.size), key=lambda n: (-score.ravel()[n], n))
    return np.sort(order[offset * k : (offset + 1) * k])


@pytest.mark.parametrize("offset", [0, 1])
def test_the_largest_entries_are_numpys_and_of_equal_ones_the_first(offset):
    w = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (12, 8)), jnp.float32)
    adapted = adapted_with(jlora.SHiRA("weight", entries=20, offset=offset), w)
    np.testing.assert_array_equal(index_of(adapted), first_of(np.abs(w), 20, offset))


def test_gradient_and_snip_rank_what_the_calibration_batches_give():
    batches = [normal(seed, 5, 12) for seed in (3, 4)]
    gradients = [np.asarray(jax.grad(loss)({"w": W}, batch)["w"]) for batch in batches]
    scores = {"gradient": np.abs(gradients).mean(0), "snip": np.abs(W * np.mean(gradients, 0))}
    for mask, score in scores.items():
        spec = {"w": jlora.SHiRA(mask, density=0.2)}
        adapted = jlora.adapterize({"w": W}, spec, prepared=jlora.prepare({"w": W}, spec, loss, batches))
        np.testing.assert_array_equal(index_of(adapted), first_of(score, 19))


@pytest.mark.parametrize("lines", ["rows", "columns"])
def test_struct_is_every_fth_line_and_the_diagonal(lines):
    size, every = 12, 4
    mask = np.eye(size, dtype=bool)
    mask[::every] = True
    mask = mask.T if lines == "columns" else mask
    np.testing.assert_array_equal(struct_index(size, size, mask.sum(), lines), np.flatnonzero(mask))


def test_struct_has_exactly_k_entries_and_offsets_are_disjoint_in_any_shape():
    for shape in ((8, 12), (12, 8), (1, 7)):
        for k in (1, shape[0], np.prod(shape) // 3):
            found = [struct_index(*shape, k, "rows", offset) for offset in range(3 if k > 1 else 1)]
            assert all(len(set(each)) == k for each in found)
            assert len(set(np.concatenate(found))) == k * len(found)


def test_adapters_with_offsets_of_one_key_are_disjoint():
    spec = [{"w": jlora.SHiRA("random", density=0.3, offset=offset)} for offset in range(3)]
    found = np.concatenate([index_of(jlora.adapterize({"w": W}, each)) for each in spec])
    assert len(found) == 3 * 29 == len(set(found))


def test_training_changes_k_entries_and_the_update_has_a_high_rank():
    w, k = normal(3, 32, 32), 128
    for mask in ("random", "struct"):
        adapted = adapted_with(jlora.SHiRA(mask, rank=2), w)
        update = np.asarray(jlora.merge(adapted)["w"] - w)
        assert np.count_nonzero(update) == k == adapted.params["w"]["values"].size
        rank = np.linalg.matrix_rank(update)
        assert rank == 32 if mask == "struct" else rank > 16  # LoRA of as many values: 2


def test_values_never_decay_and_the_optimizer_keeps_k_entries_a_moment():
    adapted = adapted_with(jlora.SHiRA("random", entries=9))
    assert labels(adapted) == {"w": {"values": "vector"}}
    tx = jlora.optimizer(adapted, optax.adamw, learning_rate=1.0, weight_decay=0.5)
    state = tx.init(adapted.params)
    assert sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == [9, 9]
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, adapted.params), state, adapted.params)
    np.testing.assert_array_equal(updates["w"]["values"], 0)


PLANS = [entries.SparsePlan(f, b, g) for f, b, g in (("entries", "formed", "entries"), ("apart", "entries", "dense"))]


@pytest.mark.parametrize("plan", [*PLANS, "factored", "merged"])
def test_every_plan_gives_the_dense_products_values_and_gradients(plan, monkeypatch):
    if isinstance(plan, entries.SparsePlan):
        monkeypatch.setattr(entries, "choose", lambda *_: plan)
    monkeypatch.setattr(entries, "IN_CACHE", 1)  # several blocks of entries in the gradient
    adapted, x = adapted_with(jlora.SHiRA("random", density=0.5, scale=2.0)), normal(2, 3, 5, 12)

    def lifted(values, w, x):
        there = adapted.replace(base={"w": w}, params={"w": {"values": values}})
        lift = jlora.lift(
            lambda p, x: (x @ p["w"]) @ p["w"].T, plan="auto" if isinstance(plan, entries.SparsePlan) else plan
        )
        return jnp.sum(jnp.sin(lift(there, x)))

    def written(values, w, x):
        w = w.reshape(-1).at[index_of(adapted)].add(2 * values).reshape(w.shape)
        return jnp.sum(jnp.sin(x @ w @ w.T))

    args = (adapted.params["w"]["values"], W, x)
    results = [jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*args) for f in (lifted, written)]
    for got, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        close(got, wanted, 1e-4)
    moved = [jax.jvp(f, args, jax.tree.map(jnp.ones_like, args)) for f in (lifted, written)]
    close(*moved, 1e-3)


def test_a_number_times_the_weight_multiplies_its_entries():
    adapted = adapted_with(jlora.SHiRA("weight", entries=5, scale=0.5))
    adapted, x = adapted.replace(params={"w": {"values": jnp.arange(1.0, 6.0)}}), normal(2, 3, 12)
    fn = lambda p: x @ (3 * p["w"])
    close(*jax.jit(lambda a: (jlora.lift(fn, strict=True)(a), fn(jlora.merge(a))))(adapted), 1e-5)


def test_plans_follow_the_cost_model(monkeypatch):
    def chosen(tokens, density, dtype=jnp.float32):
        return entries.choose("auto", tokens, (1000, 1000), int(density * 1e6), dtype)

    assert chosen(8, 0.01) == entries.SparsePlan("entries", "entries", "entries")
    assert chosen(4096, 0.01) == entries.SparsePlan("formed", "formed", "entries")
    assert chosen(4096, 0.1) == entries.SparsePlan("formed", "formed", "dense")
    assert chosen(4096, 0.01, jnp.bfloat16) == entries.SparsePlan("entries", "entries", "entries")
    assert chosen(4096, 0.1, jnp.bfloat16) == entries.SparsePlan("apart", "apart", "dense")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen(4096, 0.01).gradient == "dense"


def test_no_dense_gradient_arises_where_entries_are_few():
    size, tokens = 1024, 16
    adapted = adapted_with(jlora.SHiRA("random", density=0.01), normal(0, size, size))
    x = normal(1, tokens, size)

    def gradient(adapted, x, plan):
        run = jlora.lift(product, plan=plan)
        return jax.grad(lambda p: jnp.sum(jnp.sin(run(adapted.replace(params=p), x))))(adapted.params)

    compiled = {
        plan: jax.jit(gradient, static_argnums=2).lower(adapted, x, plan).compile() for plan in ("auto", "merged")
    }
    temporary = {plan: program.memory_analysis().temp_size_in_bytes for plan, program in compiled.items()}
    flops = {plan: program.cost_analysis()["flops"] for plan, program in compiled.items()}
    weight, product_flops = 4 * size * size, 2 * tokens * size * size
    assert temporary["auto"] < weight / 2 < temporary["merged"]
    assert flops["auto"] < 1.5 * product_flops < flops["merged"]


@pytest.mark.parametrize("plan", ["auto", "factored"])
def test_16_bit_bases_lose_no_update(plan):
    ones, x = jnp.ones((64, 16), jnp.bfloat16), jnp.ones((2, 64), jnp.bfloat16)
    adapted = adapted_with(jlora.SHiRA("random", density=0.5), ones, jnp.full(512, 2.0**-10))
    y = jlora.lift(lambda p, x: jnp.matmul(x, p["w"], preferred_element_type=jnp.float32), plan=plan)(adapted, x)
    counts = np.bincount(index_of(adapted) % 16, minlength=16)
    assert np.all(np.asarray(jlora.merge(adapted)["w"]) == 1), "each sum by itself is rounded away"
    np.testing.assert_array_equal(y[0], 64 + counts * 2.0**-10)


def test_a_mesh_gathers_no_weight_for_an_effective_weight():
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    w = jax.device_put(normal(0, 64, 64), NamedSharding(mesh, P("data", "model")))
    adapted = adapted_with(jlora.SHiRA("random", density=0.1), w)
    text = jax.jit(jlora.merge).lower(adapted).compile().as_text()
    assert "scatter" in text
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.parametrize("check", discovery.checks(checks))
def test_dora_goes_around_shira(check):
    discovery.checks(checks)[check](jlora.DoRA(jlora.SHiRA("weight", density=0.25)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "largest"}, "SHiRA's mask must be one of .*'snip'.*, got 'largest'"),
        ({"density": 0}, "SHiRA's density must be above 0 and at most 1, got 0"),
        ({"entries": -1}, "SHiRA's entries must be an integer of at least 0, got -1"),
        ({"entries": 1, "rank": 1}, "SHiRA takes entries or rank, not both; got entries=1, rank=1"),
        ({"scale": 0}, "SHiRA's scale must be finite and not 0, got 0"),
        ({"lines": "both"}, 'SHiRA\'s lines must be "rows" or "columns", got \'both\''),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jlora.SHiRA(**options)


def test_matrices_that_are_too_small_or_too_large_are_refused():
    def adapt(shape, method):
        return jax.eval_shape(
            lambda p: jlora.adapterize(p, {"w": method}), {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
        )

    with pytest.raises(ValueError, match=r"w, shape \(12, 8\): 100 entries are more than the 96 of the 12 x 8 matrix"):
        adapt((12, 8), jlora.SHiRA(entries=100))
    with pytest.raises(ValueError, match=r"40 entries after those of 2 adapters are more than the 96"):
        adapt((12, 8), jlora.SHiRA(entries=40, offset=2))
    with pytest.raises(
        ValueError, match=r"w, shape .*4294967296 entries are more than 32-bit positions can tell apart"
    ):
        adapt((2**16, 2**16), jlora.SHiRA(entries=4))
