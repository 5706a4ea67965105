"""Steps of training, for tests that hold them against those of other code."""

import jax
import jax.numpy as jnp
import optax


def sines(y):
    """A loss that weighs all outputs differently."""
    return jnp.sum(jnp.sin(y))


def descend(outputs, p, tx, steps, loss=sines, compiler_options=None):
    """Takes steps of an optimizer on a loss of `outputs(p)`.

    Returns:
        Outputs, losses and gradients before each step, stacked, and the params after the last.
    """

    def step(carry, _):
        p, state = carry

        def of(p):
            y = outputs(p)
            return loss(y), y

        (value, y), gradients = jax.value_and_grad(of, has_aux=True)(p)
        updates, state = tx.update(gradients, state, p)
        return (optax.apply_updates(p, updates), state), (y, value, gradients)

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps), compiler_options=compiler_options)
    (after, _), (y, losses, gradients) = run(p)
    return y, losses, gradients, after
