"""Gradients that are taken by pieces of the rows, so that a mesh sums small ones, are those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import problems

import jlora

pytestmark = pytest.mark.once

SPEC = {
    "up": jlora.SHiRA(density=0.3),
    "down": jlora.HiRA(2),
    "wide": jlora.LoHa(4),
    "stack": jlora.Axes("batch in out", jlora.LoHa(2)),
}


def model(p, x):
    x = jnp.tanh(x @ p["up"]) @ (2 * p["down"])
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ p["wide"], p["stack"])[0]


# Pieces that divide the 24 rows, and pieces that don't.
@pytest.mark.parametrize(("rows", "dtype"), [(3, jnp.float32), (3, jnp.bfloat16), (5, jnp.float32)], ids=str)
def test_gradients_by_pieces_of_the_rows_are_those_of_the_whole(rows, dtype):
    shapes = {"up": (8, 12), "down": (12, 8), "wide": (8, 8), "stack": (2, 8, 8)}
    params = {name: problems.weight(n, *shape).astype(dtype) for n, (name, shape) in enumerate(shapes.items())}
    adapted = problems.perturbed(jlora.adapterize(params, SPEC, key=jax.random.key(0)))
    x = problems.normal(9, 2, 12, 8).astype(dtype)

    def both(rows):
        loss = lambda p, x: jnp.sum(
            jnp.sin(jlora.lift(model, rows=rows)(adapted.replace(params=p), x).astype(jnp.float32))
        )
        return problems.jit(jax.value_and_grad(loss, argnums=(0, 1)))(adapted.params, x)

    found, wanted = (jax.tree.leaves(both(each)) for each in (rows, 1))
    for mine, theirs in zip(found, wanted, strict=True):
        mine, theirs = (np.asarray(each, np.float32) for each in (mine, theirs))
        assert np.linalg.norm(mine - theirs) <= (1e-5 if dtype == jnp.float32 else 2e-2) * np.linalg.norm(theirs)


def test_with_dropout_the_rows_stay_together():
    spec = {"w": jlora.Dropout(jlora.HiRA(2), 0.5)}
    adapted = problems.perturbed(jlora.adapterize({"w": problems.weight(0, 8, 8)}, spec, key=jax.random.key(0)))
    adapted, x = adapted.replace(context={"dropout": jax.random.key(1)}), problems.normal(1, 16, 8)
    loss = lambda rows: lambda p: jnp.sum(jlora.lift(lambda p: x @ p["w"], rows=rows)(adapted.replace(params=p)) ** 2)
    found, wanted = (problems.jit(jax.grad(loss(rows)))(adapted.params) for rows in (4, 1))
    problems.close(found, wanted)


def test_a_number_of_pieces_below_one_is_refused():
    with pytest.raises(ValueError, match="rows must be into how many pieces a mesh cuts the rows, 1 or more; got 0"):
        jlora.lift(model, rows=0)
