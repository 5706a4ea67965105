"""Blocks as Levanter's models have them, in haliax 1.3: several named axes, stacked layers, a weight times a number.

    python experiments/clients/haliax_blocks.py

No release of haliax runs on the JAX that jlora needs: 1.3, the last one, asks for three names inside of JAX that are not there
any more. The first lines put them where haliax looks for them. What is checked is that a lift keeps the factored form
(`strict=True`) and equals the merged model.
"""

from __future__ import annotations

import jax
import jax._src.core
import jax._src.numpy.einsum
import jax._src.numpy.lax_numpy
import jax._src.tree_util

jax._src.tree_util.BuiltInKeyEntry = object
jax.core.is_constant_dim = jax._src.core.is_constant_dim
jax._src.numpy.lax_numpy._einsum = jax._src.numpy.einsum._einsum

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import numpy as np
from haliax.nn.scan import Stacked

import jlora

EMBED, HEADS, SIZE, LAYERS = (hax.Axis(name, n) for name, n in {"embed": 8, "heads": 2, "size": 4, "layers": 3}.items())
BATCH, VOCAB = hax.Axis("batch", 5), hax.Axis("vocab", 11)


class Scaled(hnn.Linear):
    """A product whose weight is multiplied by a number first, as in a width-independent parametrization."""

    def __call__(self, inputs):
        return inputs.dot(self.weight * 0.5, axis=self.In) + self.bias


class Block(eqx.Module):
    query: hnn.Linear
    out: Scaled

    @staticmethod
    def init(key):
        one, other = jax.random.split(key)
        back = hnn.Linear.init((HEADS, SIZE), EMBED, key=other)
        return Block(hnn.Linear.init(EMBED, (HEADS, SIZE), key=one), Scaled(back.weight, back.bias, back.In, back.Out))

    def __call__(self, x):
        return x + self.out(hax.tanh(self.query(x)))


class Model(eqx.Module):
    blocks: Stacked
    head: hnn.Linear

    def __call__(self, x):
        return self.head(self.blocks.fold(x))


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    blocks = Stacked.init(LAYERS, Block)(jax.random.split(keys[0], LAYERS.size))
    model = Model(blocks, hnn.Linear.init(EMBED, VOCAB, key=keys[1]))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    x = jax.random.normal(keys[2], (BATCH.size, EMBED.size))

    def call(arrays, x):
        return eqx.combine(arrays, static)(hax.named(x, (BATCH, EMBED))).array

    report = jlora.sites(call, arrays, x)
    print(report)
    adapted = jlora.adapterize(arrays, {jlora.ALL_LINEAR: jlora.LoRA(rank=2, init="random")}, sites=report)
    assert [site.path for site in adapted.plan.sites] == [
        "blocks/stacked/query/weight/0",
        "blocks/stacked/out/weight/0",
    ]
    lifted = jax.jit(jlora.lift(call, strict=True, plan="factored"))(adapted, x)
    merged = jax.jit(call)(jlora.merge(adapted), x)
    np.testing.assert_allclose(lifted, merged, rtol=1e-4, atol=1e-5)
    assert not np.allclose(merged, jax.jit(call)(arrays, x), atol=1e-2)
    print("the lift is strict, and equals the merged model")


if __name__ == "__main__":
    main()
