"""The tiny functions and params on which every method is tried.

Names of leaves that are not stacked end in a number, since some methods adapt no leaf without a layer.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jlora
from jlora import paths
from jlora.core.protocol.method import View
from jlora.core.protocol.statistics import INPUTS, RESIDUAL
from jlora.core.tree.adapted import SHARED

# Nearly all the time of the contract is compilation, and these programs do almost no arithmetic.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def weight(seed, *shape):
    """A matrix, or a stack of them, that keeps the size of what it multiplies."""
    return normal(seed, *shape, scale=1 / math.sqrt(shape[-2]))


def product(params, x):
    return x @ params["w_0"]


def layers(params, x):
    """Stacked layers under `scan` and `remat`."""
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["w_0"])[0]


def adapt(params, spec, key=None, sites=None):
    """`adapterize`, with gradients of some loss, inputs, or the residual of a coarse base for what starts from them.

    A method of the tests that a call tells something has what it is told in `told`.
    """
    methods = [method for method in (getattr(method, "method", method) for method in spec.values()) if method]
    inputs = frozenset().union(*(method.needs for method in methods)) & INPUTS.keys()

    def loss(params, batch):
        if inputs:
            return sum(_used(params, site, batch) for site in jlora.watch(params, spec, sites).plan.sites)
        return sum(jnp.sum(jnp.sin(batch * leaf)) for leaf in jax.tree.leaves(params)).astype(jnp.float32)

    batches = [jnp.asarray(x, jax.tree.leaves(params)[0].dtype) for x in (3.0, 5.0)]
    needing = frozenset().union(*(method.needs for method in methods))
    prepared = jlora.prepare(params, spec, loss, batches, key, sites) if needing - {RESIDUAL} else None
    if needing == {RESIDUAL}:
        original = jax.tree.map(lambda w: w.astype(jnp.float32) + jnp.sin(3 * w.astype(jnp.float32)) / 10, params)
        prepared = jlora.residuals(original, params, spec, key, sites)
    told = functools.reduce(dict.__or__, (getattr(method, "told", {}) for method in methods), {})
    return jlora.adapterize(params, spec, key, sites, prepared).on(**told)


def _used(params, site, batch):
    """The product of a leaf's matrices with inputs of their own."""
    w = site.fold(paths.lookup(params, site.keys))
    x = normal(paths.number(site.path), *site.batch_shape, 5, site.in_size).astype(w.dtype)
    return jnp.sum(jnp.sin(jnp.einsum("...ti,...io->...to", batch * x, w))).astype(jnp.float32)


@dataclass(frozen=True)
class Problem:
    """A function of params and inputs, and a spec that adapts the params by one method."""

    fn: Callable[..., Any]
    params: dict[str, Any]
    x: jax.Array
    spec: dict[str, Any]
    sites: Any = None
    noise: float = 0.3

    def perturbed(self):
        """The start with noise on every trained array."""
        return perturbed(self.adapted, size=self.noise)

    @functools.cached_property
    def adapted(self):
        """The start; the problems below make it at once, and outside any trace, for all checks.

        Not under `jit`: draws of equal shapes, which take most of a start's time, are compiled once for all methods.
        """
        return self.start(jax.random.key(0))

    def start(self, key):
        return adapt(self.params, self.spec, key, self.sites)


def ready(*args):
    problem = Problem(*args)
    assert problem.adapted.params
    return problem


@functools.cache
def plain(method, rows=8, columns=8):
    return ready(product, {"w_0": weight(0, rows, columns)}, normal(1, 16, rows), {"w_0": method})


# Where layers follow each other, each multiplies the rounding of those before it by the size of its weight: less noise.
LAYERS_NOISE = 0.1


@functools.cache
def stack(method):
    spec = {"w_0": jlora.Axes("batch in out", method)}
    return ready(layers, {"w_0": weight(0, 3, 8, 8)}, normal(1, 16, 8), spec, None, LAYERS_NOISE)


def shapes(method):
    """A square, a tall and a wide matrix, and a stack of three."""
    return [plain(method), plain(method, 12, 8), plain(method, 8, 12), stack(method)]


def model_function(params, x):
    """Every way in which models use a weight: product, heads, stack, embedding, tied head, convolution."""
    x = x + jnp.take(params["embedding_0"], jnp.arange(x.shape[1]), axis=0)
    x = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, params["heads_0"]))
    x = jnp.tanh(jnp.einsum("bthk,hkd->btd", x, params["output_0"]))
    x = layers({"w_0": params["stack"]}, x)
    x = jnp.tanh(
        lax.conv_general_dilated(x, params["convolution_0"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    )
    return x @ params["up_0"] @ params["embedding_0"].T


@functools.cache
def model(method):
    # All sides are multiples of 4, since some methods cut them into blocks.
    shapes = {"embedding_0": (12, 8), "heads_0": (8, 2, 4), "output_0": (2, 4, 8), "stack": (2, 8, 8)}
    shapes |= {"convolution_0": (3, 8, 8), "up_0": (8, 8)}
    params = {name: weight(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    x = normal(9, 2, 5, 8)
    spec = {"embedding_0": None} if method.needs & INPUTS.keys() else {}  # a lookup has no input
    # What acts alone takes products `x @ w`; the other uses it refuses.
    spec |= {".*" if method.mergeable else "stack|up_0": method}
    return ready(model_function, params, x, spec, jlora.sites(model_function, params, x), LAYERS_NOISE)


def perturbed(adapted, seed=2, size=0.3):
    """The same adapters with noise on every trained array."""
    leaves, treedef = jax.tree.flatten(adapted.params)
    noise = [normal(seed + 10 * n, *leaf.shape, scale=size).astype(leaf.dtype) for n, leaf in enumerate(leaves)]
    return adapted.replace(params=jax.tree.unflatten(treedef, [x + y for x, y in zip(leaves, noise, strict=True)]))


def observed(adapted):
    """What `tx.update` takes beside gradients where a rule asks for a statistic of the inputs: ones, `[*batch, in]`."""
    seen = {}
    for site in adapted.plan.sites:
        if getattr(site.method.optimizer_rule, "statistic", None) is not None:
            paths.insert(seen, site.keys, jnp.ones((*site.batch_shape, site.in_size)))
    return {"inputs": seen} if seen else {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Acts:
    """Stands where a weight would, for a method that has none: `x @ Acts(view)` is what the method makes of `x`."""

    view: View

    def __rmatmul__(self, x):
        found = self.view.site.method.apply(x, lambda z: z @ self.view.w.astype(z.dtype), self.view)
        return (found[0] if isinstance(found, tuple) else found).astype(x.dtype)


def by_hand(adapted):
    """The params with every adapted leaf replaced by its method's `weight`, without jlora's merge or lift."""
    params = dict(adapted.base)
    names = adapted.plan.shared_names()
    for site in adapted.plan.sites:
        leaf = params[site.path]
        drawers = [paths.lookup(tree, (SHARED, names.get(site.method))) for tree in (adapted.params, adapted.frozen)]
        shared = {**drawers[0], **drawers[1]}

        def function(w, trained, frozen, site=site, shared=shared):
            view = View(w, trained, frozen, site, shared, context=adapted.context)
            return site.method.weight(view) if site.method.mergeable else Acts(view)

        for _ in site.batch_axes:
            function = jax.vmap(function)
        w = site.fold(leaf) if site.method.matrix else leaf
        trained, frozen = (paths.lookup(tree, site.keys) for tree in (adapted.params, adapted.frozen))
        effective = function(w, trained, frozen)
        if not site.method.mergeable:
            params[site.path] = effective
            continue
        effective = effective.astype(leaf.dtype)
        params[site.path] = site.unfold(effective) if site.method.matrix else effective
    return params


def close(got, wanted, tolerance=1e-5):
    """Asserts that two trees are equal to a tolerance relative to the largest value."""
    got, wanted = jax.device_get((got, wanted))
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        mine, theirs = np.asarray(mine, np.float32), np.asarray(theirs, np.float32)
        bound = tolerance * max(1.0, float(np.max(np.abs(theirs), initial=0.0)))
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=bound)
