"""A small served model with adapters of several kinds, and what its texts have to be."""

import functools
import queue

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import models
from jlora.serving import AdapterStore, Engine, Finished

LENGTH, CHUNK, ROWS = 64, 8, 3


@functools.cache
def loaded():
    return models.load(models.STORIES260K)


@functools.cache
def sites():
    model, params = loaded()
    return jlora.sites(model.apply, {"params": params}, jax.ShapeDtypeStruct((1, 4), jnp.int32))


def trained(method, seed, pattern=jlora.ALL_LINEAR, params=None):
    """An adapter that changes texts, as one that was trained."""
    base = loaded()[1] if params is None else params
    adapted = jlora.adapterize(base, {pattern: method}, jax.random.key(seed), sites())
    leaves, tree = jax.tree.flatten(adapted.params)
    rng = np.random.default_rng(seed)
    noisy = [leaf + rng.standard_normal(leaf.shape).astype(leaf.dtype) / 8 for leaf in leaves]
    return adapted.replace(params=jax.tree.unflatten(tree, noisy))


@functools.cache
def adapters():
    """Adapters by name: ranks, methods and leaves differ."""
    few = ".*/(q|v)_proj/kernel"
    return {
        "one": trained(jlora.LoRA(2), 0),
        "two": trained(jlora.LoRA(8), 1),
        "dora": trained(jlora.DoRA(jlora.LoRA(4)), 2),
        "few": trained(jlora.LoRA(3, alpha=6), 3, few),
        "rs": trained(jlora.LoRA(1), 4),
    }


def store(slots=2, params=None, **options):
    """A store of the model."""
    model, base = loaded()
    return AdapterStore(model, base if params is None else params, slots=slots, **{"rank": 8, **options})


def engine(**options):
    """An engine with the adapters, which the tests of a module share."""
    model, params = loaded()
    held = store()
    for name, adapted in adapters().items():
        held.add(name, adapted)
    return Engine(model, params, **{"rows": ROWS, "length": LENGTH, "chunk": CHUNK, "adapters": held, **options})


class Heard:
    """What is told of a request."""

    def __init__(self):
        self._queue = queue.Queue()
        self.tokens, self.end = [], None

    def __call__(self, told):
        assert self.end is None
        if isinstance(told, Finished):
            self.end = told
        else:
            self.tokens.append(told)
        self._queue.put(told)

    def wait(self, timeout=120.0):
        """Itself, when the request has ended."""
        while not isinstance(self._queue.get(timeout=timeout), Finished):
            pass
        return self

    @property
    def ids(self):
        return [token.id for token in self.tokens]


def ask(served, prompt, adapter=None, max_new_tokens=8, **options):
    """A request, and what is told of it."""
    heard = Heard()
    heard.request = served.submit(prompt, adapter=adapter, max_new_tokens=max_new_tokens, listen=heard, **options)
    return heard


@functools.cache
def _forward():
    model, _ = loaded()
    return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])


@functools.cache
def _merged(name):
    return loaded()[1] if name is None else jlora.merge(adapters()[name])


def check_greedy(prompt, name, ids, params=None):
    """Refuses a text whose every token is not the likeliest after those before it, by the merged model without a cache."""
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(prompt) + len(ids)] = [*prompt, *ids]
    logits = np.asarray(_forward()(_merged(name) if params is None else params, tokens))
    for n, token in enumerate(ids, len(prompt)):
        assert logits[n - 1, token] >= logits[n - 1].max() - 1e-3, (name, n, token, logits[n - 1].argmax())


def prompts(count, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(3, 500, int(rng.integers(0, longest))).tolist()] for _ in range(count)]
