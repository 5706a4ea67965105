"""Bases kept as products: an activation goes through the factors where that is less work than with the decoded matrix."""

import jax
import jax.numpy as jnp
import pytest
from contract.problems import close, jit, normal, perturbed, weight

import jlora
from jlora.core.products.chain import is_less_work

pytestmark = pytest.mark.once

PARAMS = {"wide": weight(0, 32, 48), "turned": weight(1, 32, 48), "stack": weight(2, 2, 32, 32)}
CODES = {
    "wide": jlora.LowRank(2, inner=1),
    "turned": jlora.SpectralTrain(2),
    "stack": jlora.Axes("batch in out", jlora.JointLowRank(3, over="layers")),
}
X = normal(3, 2, 4, 32)


def model(params, x):
    """Plain, scaled, transposed, stacked, in a branch and in a loop with checkpoints."""
    x = jnp.tanh(x @ (0.5 * params["wide"])) @ params["turned"].T
    x = x + jax.vmap(lambda x: x @ params["stack"][1])(x)
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    x, _ = jax.lax.scan(layer, x, params["stack"])
    return jax.lax.cond(x[0, 0, 0] > 0, lambda x: x @ params["wide"], lambda x: 2 * x @ params["wide"], x)


def results(spec):
    """A base kept as codes: `loss` with gradients of trained arrays and input, lifted, and the same of the merged function."""
    adapted = perturbed(jlora.adapterize(jlora.quantize(PARAMS, CODES), spec), size=0.1)

    def loss(function):
        return lambda p, x: jnp.sum(jnp.sin(function(adapted.replace(params=p), x)))

    lifted = loss(jlora.lift(model))
    return lifted, loss(lambda p, x: model(jlora.merge(p), x)), adapted


@pytest.mark.parametrize(
    "spec",
    [
        {
            "wide": jlora.LoRA(2),
            "turned": jlora.DoRA(jlora.LoRA(2)),
            "stack": jlora.Axes("batch in out", jlora.LoRA(2)),
        },
        {"wide": jlora.Fields(), "turned": jlora.Fields(), "stack": jlora.Axes("batch in out", jlora.Fields())},
        {"turned": jlora.LoRA(2)},
    ],
    ids=["beside", "trained", "left"],
)
def test_values_and_gradients_are_those_of_the_merged_function(spec):
    lifted, plain, adapted = results(spec)
    close(*(jit(jax.value_and_grad(f, argnums=(0, 1)))(adapted.params, X) for f in (lifted, plain)))


def product(params, x):
    return x @ params["w"]


def work(code, method, rows):
    """Multiply-adds, of two flops each, of a value with its gradients, by a row of input and weight."""
    params, x = {"w": weight(0, 64, 64)}, normal(1, rows, 64)
    kept = jlora.quantize(params, {"w": code})
    adapted = jlora.adapterize(kept, {"w": method} if method else {})
    loss = lambda p, a, x: jnp.sum(jnp.sin(jlora.lift(product)(a.replace(params=p), x)))
    program = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(adapted.params, adapted, x).compile()
    return program.cost_analysis()["flops"] / (2 * rows * 64 * 64)


@pytest.mark.parametrize(("code", "method"), [(jlora.LowRank(2), jlora.LoRA(2)), (jlora.LowRank(2), jlora.Fields())])
def test_a_product_of_low_rank_takes_the_work_of_its_factors(code, method):
    assert work(code, method, 16) < 0.4  # decoded: 2 and more


def test_where_the_factors_are_more_work_the_matrix_is_decoded():
    close_to_full = jlora.LowRank(60)
    assert work(close_to_full, jlora.LoRA(2), 256) < 2.7  # through the factors: 4
    assert is_less_work(16, [(64, 2), (2, 64)]) and not is_less_work(10**6, [(64, 60), (60, 64)])
    # So few rows that forming the matrix, 64 * 60 * 64, is more than the factors' 3,584 a row beyond the matrix's own.
    assert is_less_work(68, [(64, 60), (60, 64)]) and not is_less_work(69, [(64, 60), (60, 64)])


def test_in_16_bits_trained_fields_keep_small_updates_and_bases_go_through_their_factors():
    params, x = {"w": weight(0, 64, 64)}, normal(1, 16, 64).astype(jnp.bfloat16)
    kept = jlora.quantize(params, {"w": jlora.LowRank(2)})
    wide = lambda p, x: jax.lax.dot(x, p["w"].astype(x.dtype), preferred_element_type=jnp.float32)
    run = lambda tree: jit(jlora.lift(wide))(tree, x)
    exact = x.astype(jnp.float32) @ jlora.dequantize(kept)["w"]
    largest = float(jnp.abs(exact).max())
    for tree in (kept, jlora.adapterize(kept, {"w": jlora.LoRA(2)})):
        assert float(jnp.abs(run(tree) - exact).max()) < 0.02 * largest
    adapted = jlora.adapterize(kept, {"w": jlora.Fields()})
    # Each factor by less than half a step of 16 bits, so that hardly one of them would move.
    moved = adapted.replace(params=jax.tree.map(lambda m: m * (1 + 2.0**-13), adapted.params))
    change = run(moved) - run(adapted)
    assert float(jnp.abs(change - 2.0**-12 * exact).max()) < 0.2 * 2.0**-12 * largest
