"""`Adapted`: a base and its trainable adapters as one pytree, and what can be done with it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _compat, paths
from jlora.core.protocol.kept import Kept
from jlora.core.protocol.method import Arrays, Method, Site
from jlora.core.protocol.stored import Stored
from jlora.core.tree import beside
from jlora.core.tree.placement import whole
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight

#: Where `Adapted.params` and `Adapted.frozen` keep the arrays that several leaves share. No leaf's path starts so.
SHARED = "~shared"
#: What a call tells all methods that draw: their key.
DROPOUT = "dropout"


@dataclass(frozen=True)
class Plan:
    """The adapted leaves; static and hashable, so that it may sit in a pytree without retracing.

    Attributes:
        sites: the leaves.
        runs: how many adapters of one base a step is mapped over, of which these are one's (see `jlora.each_run`).
    """

    sites: tuple[Site, ...]
    runs: int = 1

    def shared_names(self) -> dict[Method, str]:
        """For each method whose leaves share arrays the name of their drawer under `SHARED`, in `params` and `frozen`."""
        names: dict[Method, str] = {}
        for method in (site.method for site in self.sites):
            if method.shared_fields and method not in names:
                # By name, not by class: a class of the user's own may have the name of another.
                same = sum(type(other).__name__ == type(method).__name__ for other in names)
                names[method] = type(method).__name__ + (f"_{same}" if same else "")
        return names


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Adapted:
    """Stands wherever the params tree stood; made by `adapterize`, understood by `lift`.

    Attributes:
        base: the params tree; never trained.
        params: what is trained: a nested dict along the base's own keys with the method's fields at the end, such as
            `params["layers"]["q_proj"]["kernel"]["a"]`. Stacked leaves have their batch axes in front. What several leaves
            share is under `SHARED`; a leaf that trains nothing of its own has an empty dict.
        frozen: constants of the methods, laid out like `params`.
        context: read-only inputs of a call, given by `on`; `{"dropout": key}` switches dropout on.
        plan: path, method and axis roles of every adapted leaf; static.
    """

    base: Any
    params: dict[str, Any]
    frozen: dict[str, Any]
    context: dict[str, Any]
    plan: Plan = field(metadata={"static": True})

    def replace(self, **changes: Any) -> Adapted:
        """A copy with some fields replaced, as in `adapted.replace(params=new_params)`."""
        return dataclasses.replace(self, **changes)

    def on(self, **context: Any) -> Adapted:
        """The adapters of one call, which is told some things beside its arguments.

        What a method may be told is in its `context`; it reaches the method through loops, checkpoints and `vmap`. It is an
        argument of a compiled function as any other: other values of the same shapes compile nothing anew.

        Args:
            context: arrays by name, beside what was given before; None takes one away. `dropout` is the key by which methods
                draw.

        Raises:
            ValueError: for a name that no method of these adapters knows, and for what a method can't take.

        Example:
            >>> drawn = adapted.on(dropout=jax.random.key(1))
        """
        methods = {site.method: site.path for site in reversed(self.plan.sites)}
        known = {DROPOUT}.union(*(method.context for method in methods))
        if unknown := sorted(set(context) - known):
            raise ValueError(f"no adapter here can be told {unknown[0]!r}; they know {', '.join(sorted(known))}")
        told = {**self.context, **context}
        told = {name: _told(name, value) for name, value in told.items() if value is not None}
        for method, path in methods.items():
            try:
                method.check_context({name: told[name] for name in method.context & set(told)})
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return self.replace(context=told)

    def weights(self, names: dict[Method, str] | None = None) -> list[Weight]:
        """The adapted leaves as the values that travel through a lifted function.

        Args:
            names: the `shared_names` of the whole plan, if this one is a part of it; by default the plan's own.
        """
        leaves = dict(paths.flatten_with_keys(self.base)[0])
        names = self.plan.shared_names() if names is None else names
        return [self._weight(site, leaves, self.shared(names.get(site.method, ""))) for site in self.plan.sites]

    def kept(self) -> list[Weight]:
        """The leaves that are kept in the form of a code and are not adapted, as such values."""
        sites = {site.keys for site in self.plan.sites}
        leaves, _ = paths.flatten_with_keys(self.base)
        return [kept_weight(keys, leaf) for keys, leaf in leaves if isinstance(leaf, Stored) and keys not in sites]

    def shared(self, name: str) -> Arrays:
        """The arrays that the leaves of a method share, trained ones and constants, by the name of their drawer."""
        return whole({**paths.lookup(self.params, (SHARED, name)), **paths.lookup(self.frozen, (SHARED, name))})

    def _weight(self, site: Site, leaves: dict[tuple[str, ...], Any], shared: Arrays) -> Weight:
        key = self.context.get(DROPOUT)
        if key is not None:
            key = jax.random.fold_in(key, paths.number(site.path)) if site.method.uses_key else None
        params, frozen = paths.lookup(self.params, site.keys), paths.lookup(self.frozen, site.keys)
        leaf = leaves[site.keys]
        leaf = jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
        found = {name: leaves.get(keys) for name, keys in beside.keys_of(site).items()}
        there = {name: beside.fold(site, jnp.asarray(leaf)) for name, leaf in found.items() if leaf is not None}
        context = {name: value for name, value in self.context.items() if name in site.method.context}
        return weights.start(leaf, site, params, frozen, shared, key, there, context)

    def with_leaves(self, arrays: list[Any]) -> Any:
        """The base tree with its adapted leaves replaced, in the order of the plan."""
        return self.with_replaced(dict(zip((site.keys for site in self.plan.sites), arrays, strict=True)))

    def with_replaced(self, new: dict[tuple[str, ...], Any]) -> Any:
        """The base tree with some leaves replaced, by their keys."""
        leaves, treedef = paths.flatten_with_keys(self.base)
        return jax.tree.unflatten(treedef, [new.get(keys, leaf) for keys, leaf in leaves])

    def _refuse(self, key: Any) -> NoReturn:
        """Refuses to be taken for a tree of params, as by a function that is not lifted or a `TrainState`.

        Raises:
            TypeError: with what can be done.
        """
        raise TypeError(
            f"a jlora.Adapted has no keys, such as {key!r}: functions of params take it by jlora.lift(fn); what is trained, as "
            "TrainState(params=...) and optimizers want it, is adapted.params, and the tree that was adapted adapted.base"
        )

    __contains__ = __getitem__ = _refuse

    def __repr__(self) -> str:
        return f"Adapted({len(self.plan.sites)} sites, {count(self.params):,} trained values on {count(self.base):,})"


def kept_weight(keys: tuple[str, ...], leaf: Stored) -> Weight:
    """A leaf that is kept in the form of a code, and not adapted, as the value that travels through a lifted function."""
    return weights.start(leaf, kept_site(keys, leaf), {}, {}, {}, None, {}, {})


def kept_site(keys: tuple[str, ...], leaf: Stored) -> Site:
    """Such a leaf with the roles in which it is kept."""
    return Site(keys, leaf.shape, str(leaf.dtype), leaf.in_axes, leaf.out_axes, leaf.batch_axes, "dot", Kept())


def _told(name: str, value: Any) -> jax.Array:
    """What a call is told, as an array.

    Raises:
        ValueError: for what is none, and for a number with a fraction as a key.
    """
    try:
        # Not as JAX takes Python's numbers: those have a dtype for which a program is compiled anew.
        array = jnp.asarray(value if _compat.is_array(value) else np.asarray(value))
        return _compat.typed_key(array) if name == DROPOUT else array
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} is no array that a call could be told: {error}") from None


def count(tree: Any) -> int:
    """Number of weights in a tree."""
    return sum(leaf.size for leaf in paths.leaves(tree) if _compat.is_array(leaf))
