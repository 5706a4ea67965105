"""`prompt_routed`: a function whose adapters are chosen by the prompt, and stay chosen while it is continued."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.compose.mixtures.milora import MiLoRA
from jlora.core.protocol.layers import stated_layers
from jlora.core.transforms.lift import lift
from jlora.core.tree.adapted import Adapted


class Routed(NamedTuple):
    """The cache of a function, and what the router chose for the prompt, `[layers, rows, modules]`."""

    cache: Any
    routing: jax.Array


def prompt_routed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The lifted function of an `Adapted` with `MiLoRA`, for a prompt and what follows it.

    A call with an empty cache reads the prompt: its tokens are those of `attention_mask`, unless `adapted.on(prompt=mask)` says
    others. What the router chooses then goes with the cache, and later calls use it, whatever tokens they bring. So
    `jlora.models.generate` takes it.

    Args:
        fn: a function as `jlora.lift` takes it, of `cache=` and `attention_mask=` among others.

    Returns:
        A function of the same arguments; what it returns for the cache, and takes in its place, has the choices beside it.

    Raises:
        ValueError: (when called) where not just one argument has a router, and for a prompt of which nothing says what its
            tokens are.
        TypeError: (when called) without a cache.

    Example:
        >>> apply = jlora.prompt_routed(model.apply)
    """
    plain, speaking = lift(fn), lift(fn, aux=True)

    @functools.wraps(fn, updated=())
    def run(*args: Any, cache: Any, **kwargs: Any) -> Any:
        adapted = _adapted_in((args, kwargs))
        again = lambda changed: jax.tree.map(  # noqa: E731
            lambda node: changed if isinstance(node, Adapted) else node, (args, kwargs), is_leaf=_is_adapted
        )
        if isinstance(cache, Routed):
            those, named = again(adapted.on(routing=cache.routing, prompt=None))
            result, after = plain(*those, **named, cache=cache.cache)
            return result, Routed(after, cache.routing)
        if "prompt" not in adapted.context:
            if kwargs.get("attention_mask") is None:
                raise ValueError("say which tokens are the prompt's: attention_mask=, or adapted.on(prompt=mask)")
            adapted = adapted.on(prompt=kwargs["attention_mask"])
        those, named = again(adapted)
        (result, after), said = speaking(*those, **named, cache=cache)
        return result, Routed(after, routing_of(adapted, said))

    return run


def routing_of(adapted: Adapted, said: Any) -> jax.Array:
    """What `adapted.on(routing=...)` takes, of what the routers said: `[layers, rows, modules]`, NaN where there is none."""
    sites = [site for site in adapted.plan.sites if isinstance(site.method, MiLoRA) and not site.method.module]
    numbers = [n.reshape(-1) for n in stated_layers(sites)]
    each = [paths.lookup(said, site.keys)["routed"] for site in sites]
    each = [routed.reshape(-1, *routed.shape[-2:]) for routed in each]
    routing = jnp.full((max(int(n.max()) for n in numbers) + 1, *each[0].shape[1:]), jnp.nan, each[0].dtype)
    for n, routed in zip(numbers, each, strict=True):
        routing = routing.at[n].set(routed)
    return routing


def _is_adapted(node: Any) -> bool:
    return isinstance(node, Adapted)


def _adapted_in(tree: Any) -> Adapted:
    """The one `Adapted` of a call, which must have a router."""
    found = [node for node in jax.tree.leaves(tree, is_leaf=_is_adapted) if _is_adapted(node)]
    if len(found) == 1 and any(
        isinstance(site.method, MiLoRA) and not site.method.module for site in found[0].plan.sites
    ):
        return found[0]
    raise ValueError(
        f"prompt_routed wants one argument with a router of MiLoRA, its module 0; got {len(found)} with adapters"
    )
