"""`two_passes`: a function that is run twice, first for the numbers by which X-LoRA mixes its adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.compose.mixtures.xlora import XLoRA
from jlora.core.tree.adapted import DROPOUT, Adapted


class Caches(NamedTuple):
    """The caches of both passes."""

    first: Any
    second: Any


def two_passes(
    fn: Callable[..., Any], hidden: Callable[..., Any] | None = None, aux: bool = False
) -> Callable[..., Any]:
    """The function that runs a lifted `fn` with the numbers by which X-LoRA mixes its adapters, found in a pass before it.

    The first pass gives the last hidden states `[rows, tokens, width]`, of the base, or with `pass_value` for every adapter,
    and has no gradient. Both passes get the same arguments.

    Args:
        fn: a lifted function, `jlora.lift(model.apply)`, of an `Adapted` that `jlora.xlora` made.
        hidden: a lifted function of the same arguments that returns the hidden states; by default `fn` with
            `return_hidden=True`, which the models of `jlora.models` take.
        aux: return the numbers too, `[rows, tokens, layers, slots]`.

    Returns:
        A function of the same arguments with the same result; with `aux` the pair of that and the numbers. With an argument
        `cache=` each pass has a cache: what is returned for it is the pair of both, to be given to the next call. So
        `jlora.models.generate` takes it. A dropout key, `adapted.on(dropout=key)`, drops in the classifier.

    Raises:
        ValueError: (when called) where not just one argument is made by `jlora.xlora`, and for hidden states of another shape.

    Example:
        >>> spec = {r".*/q_proj/kernel": jlora.LoRA(4)}
        >>> adapted = jlora.xlora(params, {"one": jlora.adapterize(params, spec)}, width=16)
        >>> apply = jlora.lift(model.apply)  # whose results stand for hidden states here
        >>> logits, scalings = jlora.two_passes(apply, hidden=apply, aux=True)({"params": adapted}, tokens)
    """
    read = functools.partial(fn, return_hidden=True) if hidden is None else hidden

    @functools.wraps(fn, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        adapted, method = _mixture_in((args, kwargs))
        caches = {}
        if kwargs.get("cache") is not None:
            cache = kwargs["cache"]
            caches = (cache if isinstance(cache, Caches) else Caches(cache, cache))._asdict()

        def called(fn: Callable[..., Any], changed: Any, name: str) -> tuple[Any, Any]:
            """A function's result, and its cache, with something in the place of the mixture."""
            again = lambda node: changed if isinstance(node, Adapted) else node  # noqa: E731
            those, named = jax.tree.map(again, (args, kwargs), is_leaf=lambda node: isinstance(node, Adapted))
            return fn(*those, **named, cache=caches[name]) if caches else (fn(*those, **named), None)

        kwargs = {name: value for name, value in kwargs.items() if not (caches and name == "cache")}
        states, first = called(read, _for_first(adapted, method), "first")
        scalings = _scalings(adapted, method, jax.lax.stop_gradient(states))
        result, second = called(fn, adapted.on(scalings=scalings), "second")
        result = (result, Caches(first, second)) if caches else result
        return (result, scalings) if aux else result

    return run


def _mixture_in(tree: Any) -> tuple[Adapted, XLoRA]:
    """The one X-LoRA among the arguments of a call, and its method."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Adapted))
    found = [node for node in nodes if isinstance(node, Adapted)]
    methods = {site.method for each in found for site in each.plan.sites}
    if len(found) == 1 and len(methods) == 1 and isinstance(method := methods.pop(), XLoRA):
        return found[0], method
    raise ValueError(
        f"two_passes wants one argument that jlora.xlora made; got {len(found)} with adapters"
        + "".join(f", {method}" for method in sorted(map(str, methods)))
    )


def _for_first(adapted: Adapted, method: XLoRA) -> Any:
    """What the first pass is run on."""
    if not method.pass_value:
        return adapted.base
    value = jnp.full((method.layers, method.slots), method.pass_value, jnp.float32)
    return adapted.on(scalings=method.kept(value))


def _scalings(adapted: Adapted, method: XLoRA, states: jax.Array) -> jax.Array:
    """The numbers `[rows, tokens, layers, slots]`."""
    if states.ndim != 3 or states.shape[-1] != method.width:
        raise ValueError(
            f"the first pass must give hidden states [rows, tokens, {method.width}], got shape {states.shape}: give hidden=, a "
            "lifted function of the same arguments, or jlora.xlora the width that they have"
        )
    key = adapted.context.get(DROPOUT)
    return method.scalings(adapted.shared(adapted.plan.shared_names()[method]), states, key)
