"""Methods that add inputs up, repeat outputs, or cut both to tables: MoRA, MiSS, LoKr; against formulas entry by entry."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import close, normal, perturbed, weight

import jlora
from jlora import LoKr, MiSS, MoRA
from jlora.methods.lokr import divided
from jlora.optimize.optimizer import labels

pytestmark = pytest.mark.once

PRODUCT = lambda params, x: x @ params["w"]
SHAPES = [(10, 7), (7, 10), (12, 9)]


def moved(method, shape):
    """Adapters away from the start, their arrays in float64, and the change of the weight that merging makes."""
    w = weight(0, *shape)
    adapted = jlora.adapterize({"w": w}, {"w": method})
    params = jax.tree.map(lambda leaf: leaf + normal(leaf.size, *leaf.shape, scale=0.5), adapted.params)
    adapted = adapted.replace(params=params)
    arrays = {name: np.asarray(leaf, np.float64) for name, leaf in params["w"].items()}
    return adapted, arrays, np.asarray(jlora.merge(adapted)["w"], np.float64) - np.asarray(w, np.float64)


def group(index, length, size):
    """Which of `size` neighbouring groups an entry is in; the first `length % size` groups are longer by one."""
    ends = np.cumsum([length // size + (n < length % size) for n in range(size)])
    return int(np.searchsorted(ends, index, side="right"))


def mora_by_hand(m, shape, mora_type):
    rows, columns = shape
    r, update = m.shape[0], np.zeros(shape)
    ins = [[i % r] for i in range(rows)] if mora_type in (1, 4) else [[group(i, rows, r)] for i in range(rows)]
    if mora_type in (1, 4):  # filled up to a multiple of r with the first inputs
        for extra in range(-rows % r):
            ins[extra].append((rows + extra) % r)
    for i in range(rows):
        for o in range(columns):
            to = o % r if mora_type in (1, 3) else group(o, columns, r)
            update[i, o] = sum(m[entry, to] for entry in ins[i])
    return update


@pytest.mark.parametrize("mora_type", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_mora_adds_up_and_repeats_as_its_type_says(mora_type, shape):
    adapted, arrays, update = moved(MoRA(2, mora_type), shape)
    r = int(math.sqrt(2 * sum(shape)) + 0.5)
    assert arrays["m"].shape == (r, r)
    np.testing.assert_allclose(update, mora_by_hand(arrays["m"], shape, mora_type), atol=1e-6)
    assert np.linalg.matrix_rank(update, tol=1e-5) <= r
    x = normal(1, 5, shape[0])
    close(jlora.lift(PRODUCT)(adapted, x), x @ jlora.merge(adapted)["w"])


@pytest.mark.parametrize("shape", [*SHAPES, (4, 19)])
def test_rotary_mora_has_a_block_for_each_part_of_the_input_turned_by_its_number(shape):
    rows, columns = shape
    adapted, arrays, update = moved(MoRA(1, 6), shape)
    m = arrays["m"]
    r = m.shape[0]
    assert r == int(math.sqrt(sum(shape)) + 0.5) // 2 * 2
    blocks = -(-rows // r)
    by_hand = np.zeros((blocks * r, blocks * r))
    for n in range(blocks):
        turn = np.zeros((r, r))
        for j in range(r // 2):
            angle = n * 10000.0 ** (-2 * j / r)
            turn[j, j] = turn[j + r // 2, j + r // 2] = math.cos(angle)
            turn[j, j + r // 2], turn[j + r // 2, j] = math.sin(angle), -math.sin(angle)
        by_hand[n * r : (n + 1) * r, n * r : (n + 1) * r] = turn @ m
    wide = np.concatenate([by_hand] * -(-columns // by_hand.shape[1]), axis=1)[:, :columns]
    wanted = wide[:rows].copy()
    wanted[: blocks * r - rows] += wide[rows:]  # the last block is filled up with the first inputs
    np.testing.assert_allclose(update, wanted, atol=1e-6)
    x = normal(1, 5, rows)
    close(jlora.lift(PRODUCT)(adapted, x), x @ jlora.merge(adapted)["w"])


def test_mora_refuses_a_rank_whose_matrix_would_not_fit_and_names_one_that_does():
    with pytest.raises(ValueError, match=r"rank 8 makes a square matrix of 11 .* 8 x 8 .*use a rank of 4 or less"):
        jlora.adapterize({"w": weight(0, 8, 8)}, {"w": MoRA(8, 1)})
    jlora.adapterize({"w": weight(0, 8, 8)}, {"w": MoRA(4, 1)})
    with pytest.raises(ValueError, match="MoRA's mora_type must be one of"):
        MoRA(8, 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_miss_repeats_its_rows_down_the_weight(shape):
    adapted, arrays, update = moved(MiSS(3), shape)
    wanted = [[arrays["b"][i % 3, o] for o in range(shape[1])] for i in range(shape[0])]
    np.testing.assert_allclose(update, wanted, atol=1e-6)
    x = normal(1, 5, shape[0])
    close(jlora.lift(PRODUCT)(adapted, x), x @ jlora.merge(adapted)["w"])


def test_mini_miss_repeats_columns_too_and_bat_multiplies_blocks_of_the_weight():
    _, arrays, update = moved(MiSS(3, variant="mini", mini_rank=2), (7, 6))
    np.testing.assert_allclose(update, [[arrays["b"][i % 3, o % 2] for o in range(6)] for i in range(7)], atol=1e-6)
    adapted, arrays, update = moved(MiSS(2, variant="bat"), (4, 6))
    w = np.asarray(adapted.base["w"], np.float64)
    for n in range(2):
        for k in range(3):
            rows, columns, b = slice(2 * n, 2 * n + 2), slice(2 * k, 2 * k + 2), arrays["b"][k]
            # In torch's layout [out, in]: block @ b + b.
            np.testing.assert_allclose(update[rows, columns].T, w[rows, columns].T @ b + b, atol=1e-6)


def test_miss_refuses_sizes_that_do_not_divide():
    params = {"w": weight(0, 6, 9)}
    for method, words in (
        (MiSS(7), "rank 7 is above the 6 inputs of the 6 x 9 matrix"),
        (MiSS(2, variant="mini", mini_rank=2), "mini_rank 2 must divide the 9 outputs"),
        (MiSS(2, variant="bat"), "rank 2 must divide both sides of the 6 x 9 matrix"),
    ):
        with pytest.raises(ValueError, match=words):
            jlora.adapterize(params, {"w": method})
    with pytest.raises(ValueError, match='MiSS has no dropout with variant="bat"'):
        MiSS(2, variant="bat", dropout=0.1)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (LoKr(1, 3.0), {"w1", "a2", "b2"}),
        (LoKr(8, 3.0), {"w1", "w2"}),
        (LoKr(1, 3.0, decompose_both=True), {"a1", "b1", "a2", "b2"}),
        (LoKr(1, 3.0, decompose_factor=2, init="lycoris"), {"w1", "a2", "b2"}),
    ],
    ids=str,
)
def test_lokr_is_a_kronecker_product_entry_by_entry(method, names):
    rows, columns = 12, 20
    adapted, arrays, update = moved(method, (rows, columns))
    assert set(arrays) == names
    w1, w2 = (arrays[f"w{n}"] if f"w{n}" in arrays else arrays[f"a{n}"] @ arrays[f"b{n}"] for n in "12")
    (i1, o1), (i2, o2) = w1.shape, w2.shape
    assert (i1, o1) == ((2, 2) if method.decompose_factor == 2 else (3, 4)) and (i1 * i2, o1 * o2) == (rows, columns)
    scale = 3.0 / method.rank
    wanted = [[scale * w1[i // i2, o // o2] * w2[i % i2, o % o2] for o in range(columns)] for i in range(rows)]
    np.testing.assert_allclose(update, wanted, atol=1e-6)
    x = normal(1, 5, rows)
    close(jlora.lift(PRODUCT)(adapted, x), x @ jlora.merge(adapted)["w"])


@pytest.mark.parametrize(
    ("method", "zero", "bounds"),
    [
        (MoRA(1, 6), "m", {}),
        (MiSS(2), "b", {}),
        (LoKr(4), "w1", {"a2": 32**-0.5, "b2": 4**-0.5}),
        (LoKr(4, decompose_both=True), "b1", {"a1": 16**-0.5, "a2": 32**-0.5, "b2": 4**-0.5}),
        (LoKr(4, init="lycoris"), "a2", {"w1": 16**-0.5, "b2": 4**-0.5}),
        (LoKr(40, init="lycoris"), "w2", {"w1": 16**-0.5}),
    ],
    ids=str,
)
def test_one_factor_starts_at_zero_and_learns_as_the_b_of_lora(method, zero, bounds):
    adapted = jlora.adapterize({"w": jnp.zeros((512, 640))}, {"w": method})
    drawn = {name: np.abs(field).max() for name, field in adapted.params["w"].items()}
    assert drawn.pop(zero) == 0
    assert drawn == pytest.approx(bounds, rel=0.1)
    assert labels(adapted)["w"] == {zero: "b", **dict.fromkeys(bounds, "a")}


def test_a_side_is_divided_into_the_two_closest_numbers():
    for side in range(1, 130):
        pairs = [(n, side // n) for n in range(1, side + 1) if side % n == 0 and n <= side // n]
        assert divided(side, -1) == min(pairs, key=sum)
    assert [divided(128, 4), divided(127, -1), divided(12, 5), divided(12, 6)] == [(4, 32), (1, 127), (3, 4), (6, 2)]


@pytest.mark.parametrize("method", [MoRA(1, 6), MoRA(1, 2), MiSS(2), LoKr(1)], ids=str)
def test_an_activation_meets_no_matrix_of_the_weights_shape_but_the_base(method):
    adapted = jlora.adapterize({"w": weight(0, 24, 40)}, {"w": method})
    loss = lambda p, x: jnp.sum(jnp.sin(jlora.lift(PRODUCT)(adapted.replace(params=p), x)))
    program = str(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(adapted.params, normal(1, 3, 24)))
    assert "dot_general" in program and "f32[24,40] = dot_general" not in program


def lifted_loss(adapted, fn=PRODUCT):
    return lambda p, base, x: jnp.sum(normal(7, 40, 40) * jlora.lift(fn)(adapted.replace(params=p, base=base), x))


@pytest.mark.parametrize("method", [MoRA(1, 6), LoKr(2, decompose_both=True)], ids=str)
def test_with_many_tokens_mora_and_lokr_are_formed_and_have_the_gradients_of_their_weight(method):
    adapted = perturbed(jlora.adapterize({"w": weight(0, 24, 40)}, {"w": method}))
    x, half = normal(1, 40, 24), lambda params, x: x @ (0.5 * params["w"])
    merged = lambda p, base, x: jnp.sum(normal(7, 40, 40) * half(jlora.merge(adapted.replace(params=p, base=base)), x))
    arguments = adapted.params, adapted.base, x
    found, wanted = (
        jax.jit(jax.value_and_grad(each, argnums=(0, 1, 2)))(*arguments)
        for each in (lifted_loss(adapted, half), merged)
    )
    jax.tree.map(lambda a, b: close(a, b, 1e-4), found, wanted)
    program = str(jax.make_jaxpr(jax.grad(lifted_loss(adapted)))(*arguments))
    assert "f32[24,40] = add" in program and "f32[24,40] = dot_general" not in program


def test_where_an_input_is_dropped_or_tokens_are_few_mora_acts():
    adapted = perturbed(jlora.adapterize({"w": weight(0, 24, 40)}, {"w": MoRA(1, 6, dropout=0.5)}))
    program = lambda x, **more: str(jax.make_jaxpr(jlora.lift(PRODUCT))(adapted.replace(**more), x))
    many, few = normal(1, 40, 24), normal(1, 13, 24)
    assert "f32[24,40] = add" in program(many)
    assert "f32[24,40] = add" not in program(few)
    assert "f32[24,40] = add" not in program(many, context={"dropout": jax.random.key(0)})
    assert "f32[24,40] = add" not in program(many.astype(jnp.bfloat16))


@pytest.mark.parametrize("unroll", [1, 6])
def test_neither_weights_nor_parts_of_inputs_are_kept_where_lokr_is_formed(unroll):
    def temporary(method):
        def fn(params, x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"], unroll=unroll)[0]

        adapted = jlora.adapterize({"w": weight(0, 6, 128, 128)}, {"w": jlora.Axes("batch in out", method)})
        loss = lambda p, base, x: jnp.sum(jlora.lift(fn)(adapted.replace(params=p, base=base), x) ** 2)
        compiled = jax.jit(jax.grad(loss)).lower(adapted.params, adapted.base, normal(1, 64, 128)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (128 * 128 * 4)

    formed, factored = temporary(LoKr(4)), temporary(jlora.LoRA(4))
    assert formed - factored < 4, f"{formed - factored:.1f} matrices more"


@pytest.mark.parametrize(("method", "number"), [(LoKr(1), 24), (MoRA(1), 8)], ids=str)
def test_the_cost_is_that_of_acting_also_of_matrices_so_small_that_two_rows_would_form_them(method, number):
    assert f" {number} multiply-adds more" in jlora.explain(jlora.adapterize({"w": weight(0, 4, 6)}, {"w": method}))


def test_ten_steps_of_mora_are_those_of_its_formula():
    shape, rate = (10, 7), 0.05
    adapted = jlora.adapterize({"w": weight(0, *shape)}, {"w": MoRA(2, 1)})
    x, y = normal(1, 6, 10), normal(2, 6, 7)
    tx = optax.sgd(rate)

    @jax.jit
    def step(p, state):
        grads = jax.grad(lambda p: jnp.mean((jlora.lift(PRODUCT)(adapted.replace(params=p), x) - y) ** 2))(p)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(p, updates), state

    p, state = adapted.params, tx.init(adapted.params)
    w, m = np.asarray(adapted.base["w"], np.float64), np.zeros((6, 6))
    basis = [[mora_by_hand(np.eye(36)[6 * i + j].reshape(6, 6), shape, 1) for j in range(6)] for i in range(6)]
    for _ in range(10):
        p, state = step(p, state)
        residual = np.asarray(x) @ (w + mora_by_hand(m, shape, 1)) - np.asarray(y)
        dense = np.asarray(x).T @ residual * 2 / residual.size
        m = m - rate * np.array([[np.sum(dense * basis[i][j]) for j in range(6)] for i in range(6)])
    np.testing.assert_allclose(p["w"]["m"], m, atol=1e-6)
