"""`prompted`: any function of tokens, with the virtual tokens of its adapters in front of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.protocol.wrapping import innermost
from jlora.core.tree.adapted import Adapted
from jlora.prompts.inserting import Places, before_each, first_tokens, in_front
from jlora.prompts.virtual import VIRTUAL, Virtual

#: Names under which functions take ids, and what lies beside them, `[batch, length]`.
TOKENS = ("tokens", "input_ids", "inputs")
POSITIONS = ("positions", "position_ids")
SEGMENTS = ("segment_ids",)
MASKS = ("attention_mask",)
TYPES = ("token_types", "token_type_ids", "types")
_BESIDE = (*POSITIONS, *SEGMENTS, *MASKS, *TYPES)


def prompted(fn: Callable[..., Any], tokens: int | str = 1, texts: int = 1, pooled: bool = False) -> Callable[..., Any]:
    """The function that runs a lifted `fn` with the virtual tokens of its adapters in front of every text.

    It takes and gives what `fn` does: the ids get the virtual tokens in front, the mask, segments, positions and types beside
    them (`attention_mask`, `segment_ids`, `positions`, `token_types`, and their names in transformers) get entries for these,
    and what comes back for them is cut off. Positions are those after the virtual tokens.

    Args:
        fn: a lifted function, `jlora.lift(model.apply)`, of an `Adapted` with prompts.
        tokens: which argument holds the ids, `[batch, length]`, by number or name; or a dict with them, a batch.
        texts: how many texts a row has at most, where `segment_ids` tell several. Results of further ones are NaN.
        pooled: says that a result may have no axis of tokens because the function pools over them, of which the virtual tokens
            are then a part. Without it such a result is refused.

    Returns:
        A function of the same arguments with the same result. A first call with an empty `cache` (`jlora.models.empty_cache`)
        puts the prompts into it; further calls with the cache add nothing. For a cache of another kind call this function
        without it, or `fn` itself for all calls but the first.

    Raises:
        ValueError: (when called) where no adapters have prompts, or prompts of different lengths; for ids that are no integers
            `[batch, length]`, or of a dtype too small for the virtual ones; for a result without an axis of tokens.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> adapted = jlora.adapterize(params, {"embed_tokens/embedding": jlora.PromptTuning(tokens=4)})
        >>> apply = jlora.prompted(jlora.lift(model.apply))
        >>> logits = apply({"params": adapted}, tokens)
    """

    @functools.wraps(fn, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        call = _Call(fn, args, kwargs, tokens)
        found = virtual_of((args, kwargs))
        if not found:
            raise ValueError("prompted wants adapters that train virtual tokens, such as jlora.PromptTuning; got none")
        number = _one_length(found)
        if call.cache is not None and not _is_empty(call.cache):
            return fn(*args, **kwargs)
        ids = call.ids
        places = _places(call, number, texts)
        first = _first_id(found, ids.dtype, number)
        longer = places.spread(ids, 0)
        # Without ids of their own virtual tokens may have any: what becomes of them reaches nothing.
        longer = jnp.where(places.number >= 0, places.number.astype(ids.dtype) + first, longer) if first else longer
        out = call.again(
            longer, {name: _longer(name, array, places, number) for name, array in call.beside.items()}, places
        )
        return _cut(out, places, ids.shape, pooled, lambda: jax.eval_shape(fn, *args, **kwargs))

    return run


def virtual_of(tree: Any) -> list[tuple[Any, Virtual]]:
    """The sites whose methods train virtual tokens, of all adapters in a tree, with these methods."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Adapted))
    adapters = [node for node in nodes if isinstance(node, Adapted)]
    found = []
    for each in adapters:
        for site in each.plan.sites:
            method = innermost(site.method)
            if isinstance(method, Virtual):
                found.append((site, method))
        found += virtual_of(each.base)
    return found


def _one_length(found: list[tuple[Any, Virtual]]) -> int:
    """The number of virtual tokens, which all sites must agree on."""
    lengths = {method.tokens: site.path for site, method in reversed(found)}
    if len(lengths) > 1:
        told = " and ".join(f"{path} has {tokens}" for tokens, path in sorted(lengths.items()))
        raise ValueError(f"all prompts of a call must have as many virtual tokens, but {told}")
    return next(iter(lengths))


def _first_id(found: list[tuple[Any, Virtual]], dtype: Any, number: int) -> int:
    """The id of the first virtual token, or 0 where they have none of their own."""
    sizes = {site.in_size for site, method in found if method.own_ids}
    if len(sizes) > 1:
        raise ValueError(f"prompts are for one embedding of tokens; here are some of {sorted(sizes)} rows")
    first = next(iter(sizes), 0)
    if first + number - 1 > jnp.iinfo(dtype).max:
        raise ValueError(
            f"ids of dtype {dtype} can't hold the virtual ones, {first} to {first + number - 1}; use int32"
        )
    return first


class _Call:
    """A call of a function of tokens, which can be made again with others.

    Attributes:
        ids: the tokens.
        beside: what lies beside them, by name.
        cache: the keyword `cache`, or None.
    """

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int | str):
        self.fn = fn
        self.args: dict[Any, Any] = dict(enumerate(args))
        self.kwargs: dict[Any, Any] = dict(kwargs)
        self.cache = kwargs.get("cache")
        # Where the ids are: in one of these dicts, which are put together again for the call.
        self.holder, self.key = self._argument(tokens)
        given = self.holder[self.key]
        self.batch: dict[Any, Any] | None = None
        beside: list[tuple[dict[Any, Any], Any, str]] = [
            (self.kwargs, name, name) for name in _BESIDE if name in kwargs
        ]
        if isinstance(given, Mapping):
            self.outer, self.batch = (self.holder, self.key), dict(given)
            self.holder, self.key = self.batch, _name_of_ids(given)
            beside += [(self.batch, name, name) for name in _BESIDE if name in given]
        elif self.holder is self.args:
            named = [(n, name) for n, name in enumerate(_parameters(fn)) if n in self.args and name in _BESIDE]
            beside += [(self.args, n, name) for n, name in named]
        self.places = {name: (holder, key) for holder, key, name in beside if holder[key] is not None}
        self.beside = {name: holder[key] for name, (holder, key) in self.places.items()}
        self.ids = _checked(self.holder[self.key])

    def _argument(self, tokens: int | str) -> tuple[dict[Any, Any], Any]:
        """The dict of arguments in which the ids, or a batch with them, are, and their key there."""
        if isinstance(tokens, str):
            if tokens not in self.kwargs:
                raise ValueError(
                    f"prompted wants the ids as the keyword {tokens!r}; the call has {sorted(self.kwargs)}"
                )
            return self.kwargs, tokens
        if tokens in self.args:
            return self.args, tokens
        named = [name for name in TOKENS if name in self.kwargs]
        if not named:
            raise ValueError(
                f"prompted wants the ids as argument {tokens}; the call has {len(self.args)} (see tokens=)"
            )
        return self.kwargs, named[0]

    def again(self, ids: jax.Array, beside: dict[str, jax.Array], places: Places) -> Any:
        """The call with other tokens, and adapters that are told where the virtual ones are."""
        self.holder[self.key] = ids
        for name, array in beside.items():
            holder, key = self.places[name]
            holder[key] = array
        if self.batch is not None:
            holder, key = self.outer
            holder[key] = self.batch
        if self.cache is not None:
            self.kwargs["cache"] = self.cache.longer(places.longer - self.ids.shape[1])
        args, kwargs = _told((tuple(self.args.values()), self.kwargs), places.number)
        return self.fn(*args, **kwargs)


def _name_of_ids(batch: Mapping[str, Any]) -> str:
    """The key of the ids in a batch."""
    found = [name for name in TOKENS if name in batch]
    if len(found) != 1:
        raise ValueError(f"prompted wants a batch with one of {TOKENS}, got {sorted(batch)}")
    return found[0]


def _checked(ids: Any) -> jax.Array:
    """Ids as an array `[batch, length]` of integers."""
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"prompted wants ids [batch, length] of integers, got shape {ids.shape} of {ids.dtype}")
    return ids


def _parameters(fn: Callable[..., Any]) -> list[str]:
    """The names of a function's positional parameters; none where they can't be known."""
    try:
        found = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []
    return [each.name for each in found if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]


def _told(tree: Any, number: jax.Array) -> Any:
    """The tree with every `Adapted` in it, and in the base of one, told where virtual tokens are."""

    def tell(node: Any) -> Any:
        if not isinstance(node, Adapted):
            return node
        return node.replace(base=_told(node.base, number), context=node.context | {VIRTUAL: number})

    return jax.tree.map(tell, tree, is_leaf=lambda node: isinstance(node, Adapted))


def _is_empty(cache: Any) -> bool:
    """Whether a cache has no tokens yet, as the ones of `jlora.models` tell."""
    if not hasattr(cache, "longer"):
        raise ValueError(
            f"prompted doesn't know the cache {type(cache).__name__}: make the first call, which puts the prompts into it, "
            "with longer ids yourself, and the others by the lifted function"
        )
    return cache.keys is None


def _places(call: _Call, number: int, texts: int) -> Places:
    """Where the virtual tokens go: right before each text, since models count positions anew behind padding."""

    def of(names: tuple[str, ...]) -> Any:
        arrays = [jnp.asarray(array) for name, array in call.beside.items() if name in names]
        return jnp.broadcast_to(arrays[0], call.ids.shape) if arrays else None

    segments, mask = of(SEGMENTS), of(MASKS)
    if segments is None and mask is None:
        return in_front(call.ids.shape, number)
    return before_each(first_tokens(segments, mask), number, 1 if segments is None else texts)


def _longer(name: str, array: Any, places: Places, number: int) -> jax.Array:
    """What lies beside the ids, for all positions."""
    array = jnp.asarray(array)
    if array.ndim == 1 and name in POSITIONS:
        array = array[None]
    if array.ndim != 2:
        raise ValueError(f"prompted wants {name} as [batch, length], got shape {array.shape}")
    array = jnp.broadcast_to(array, places.kept.shape)
    virtual = places.number >= 0
    if name in POSITIONS:
        return jnp.where(virtual, places.number.astype(array.dtype), places.spread(array + number, 0))
    if name in SEGMENTS:
        return places.of_owner(array)
    if name in MASKS:
        return jnp.where(virtual, jnp.ones((), array.dtype), places.spread(array, 0))
    return places.spread(array, 0)


def _cut(out: Any, places: Places, shape: tuple[int, ...], pooled: bool, plain: Callable[[], Any]) -> Any:
    """A result without what was computed for virtual tokens."""
    rows, before, longer = shape[0], shape[1], places.longer
    is_cache = lambda node: hasattr(node, "longer")  # noqa: E731
    found, treedef = jax.tree.flatten(out, is_leaf=is_cache)
    # A result of two axes may have as many labels as there are tokens: only one without prompts tells.
    usual = jax.tree.leaves(plain(), is_leaf=is_cache) if any(_flat(leaf) for leaf in found) else found

    def cut(leaf: Any, usual: Any) -> Any:
        if is_cache(leaf):
            return leaf
        has = getattr(leaf, "ndim", 0) >= 2 and leaf.shape[:2] == (rows, longer)
        if has and (not _flat(leaf) or usual.shape == (rows, before)):
            return places.back(leaf)
        if pooled:
            return leaf
        raise ValueError(
            f"prompted wants results with the axes [batch, length, ..], to cut off what belongs to virtual tokens, got shape "
            f"{jnp.shape(leaf)} for ids {shape}; say pooled=True where the function may pool over the virtual tokens too"
        )

    return jax.tree.unflatten(treedef, [cut(*each) for each in zip(found, usual, strict=True)])


def _flat(leaf: Any) -> bool:
    return getattr(leaf, "ndim", 0) == 2
