"""A small linear model of a stack and a plain leaf, trained on random tasks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora

# Nearly all the time is compilation.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
BASE = {
    "stack": RNG.standard_normal((2, 6, 5)).astype(np.float32),
    "plain": RNG.standard_normal((6, 5)).astype(np.float32),
}


def fn(params, x):
    return x @ params["stack"][0] + x @ params["stack"][1] + x @ params["plain"]


def data(task):
    rng = np.random.default_rng(100 + task)
    return rng.standard_normal((8, 6)).astype(np.float32), rng.standard_normal((8, 5)).astype(np.float32)


def spec(method):
    return {"stack": jlora.Axes("batch in out", method), "plain": method}


def started(method, x=None, tx=None):
    params = jax.tree.map(jnp.asarray, BASE)
    prepared = None
    if x is not None:
        prepared = jlora.prepare(params, spec(method), lambda p, b: jnp.sum(fn(p, b)), [x])
    adapted = jlora.adapterize(params, spec(method), KEY, prepared=prepared)
    tx = jlora.optimizer(adapted, *(tx or (optax.sgd, 0.05)), **({} if tx else {"momentum": 0.9}))
    return adapted, tx.init(adapted.params), tx


def stepper(tx, traces):
    """A jitted step on the loss `sum over the rows of ‖y - fn(x)‖² / 2 rows`."""

    @jit
    def step(adapted, state, x, y):
        traces.append(1)

        def loss(p):
            return jnp.sum((jlora.lift(fn)(adapted.replace(params=p), x) - y) ** 2) / (2 * len(x))

        value, gradient = jax.value_and_grad(loss)(adapted.params)
        updates, state = tx.update(gradient, state, adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state, value

    return step


def matrices(tree, name):
    """A field of the three matrices as float64."""
    stack, plain = tree["stack"][name], tree["plain"][name]
    return [np.asarray(m, np.float64) for m in (*stack, plain)]


def weights(adapted):
    """The merged matrices, as float64."""
    merged = jlora.merge(adapted)
    return [np.asarray(m, np.float64) for m in (*merged["stack"], merged["plain"])]
