"""Events: what methods do between steps is asked at the due steps, once for all leaves that share it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora

#: The keys that events got.
DRAWN = []


@dataclass(frozen=True)
class Doubled:
    """Doubles `b` after every second step, and says so."""

    factor: float = 2.0

    def due(self, step):
        return step % 2 == 0

    def happen(self, context):
        DRAWN.append(jax.random.key_data(context.key).tolist())
        context.say(f"{[site.path for site in context.sites]} at {context.step}")
        params = {**context.adapted.params}
        for site in context.sites:
            params[site.path] = {
                **params[site.path],
                "b": self.factor * params[site.path]["b"] + context.loss(None, 1.0),
            }
        return context.adapted.replace(params=params), context.opt_state


@dataclass(frozen=True)
class Eventful(jlora.LoRA):
    factor: float = 2.0

    @property
    def event(self):
        return Doubled(self.factor)


def test_events_happen_at_their_steps_once_for_all_leaves_that_share_them():
    params = {name: jnp.ones((4, 4)) for name in "uvwx"}
    spec = {"[uv]": Eventful(2), "w": jlora.DoRA(Eventful(2, factor=3.0)), "x": jlora.LoRA(2)}
    adapted = jlora.adapterize(params, spec)
    params = {name: {**fields, "b": jnp.ones((2, 4))} for name, fields in adapted.params.items()}
    adapted = adapted.replace(params=params)
    tx = optax.sgd(0.1)
    given = (adapted, tx.init(adapted.params))
    said = []

    def run(step):
        return jlora.run_events(*given, tx, jax.random.key(0), step, lambda adapted, batch: batch, [1.0], said.append)

    assert run(1)[0] is adapted and said == []
    found, _ = run(2)
    assert said == ["['u', 'v'] at 2", "['w'] at 2"]
    run(4)
    assert len({tuple(key) for key in DRAWN}) == 4, "each event of each step has a key of its own"
    for name, wanted in {"u": 3.0, "v": 3.0, "w": 4.0, "x": 1.0}.items():
        np.testing.assert_array_equal(found.params[name]["b"], np.full((2, 4), wanted))
