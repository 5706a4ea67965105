"""PRILoRA's rule: entries of `a` are pruned by their size times the size of the inputs that they meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora import _compat, paths
from jlora.core.protocol.method import Site
from jlora.core.transforms.observe import Statistic, input_norms
from jlora.optimize import moments
from jlora.optimize.allocate import budget, scores, triplets
from jlora.optimize.allocate.triplets import Fields, Triplet

Sites = tuple[Site, ...]
_FIELDS: Fields = ("a", None, "b")


class PruningState(NamedTuple):
    """The optimizer's state with what pruning remembers.

    Attributes:
        inner: the state of the optimizer inside.
        step: int32, updates made.
        norms: moving average of the norms of every site's inputs, `[*batch, in]`. It starts at zero and is not corrected for
            that: the correction would be one factor for all, and only the order of the entries counts.
        kept: for mode "freeze", masks of the entries of `a` that learn; else nothing.
        skipped: int32, updates whose gradients or norms were not finite, which changed no average.
    """

    inner: Any
    step: jax.Array
    norms: Any
    kept: Any
    skipped: jax.Array


@dataclass(frozen=True)
class PRILoRARule:
    """Every `every` steps: of each `group` entries along the inputs of a column of `a`, the `pruned` least become zero.

    Attributes: see `PRILoRA`.
    """

    every: int
    pruned: int
    group: int
    beta: float
    mode: str

    #: What `update` takes as `inputs`; `jlora.observe` measures it.
    statistic: ClassVar[Statistic] = input_norms

    def wrap(self, tx: optax.GradientTransformation, sites: Sites) -> optax.GradientTransformation:
        """The optimizer with the pruning around it; its `update` takes the params, and the norms as `inputs`.

        Raises:
            ValueError: for an embedding, whose lookup has no inputs.
        """
        if lookups := [site.path for site in sites if site.kind == "gather"]:
            raise ValueError(
                f"{lookups[0]}: PRILoRA prunes by the inputs of a product, and a lookup has none; give this leaf another "
                "method, or PRILoRA(pruned=0)"
            )
        inner = optax.with_extra_args_support(tx)

        def init(params: Any) -> PruningState:
            return self._init(inner, params, sites)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            if params is None or extra.get("inputs") is None:
                raise ValueError(
                    "PRILoRA needs the params and the norms of its inputs: tx.update(gradients, opt_state, params, "
                    "inputs=seen), with outputs, seen = jlora.observe(fn, jlora.input_norms)(...) in the loss"
                )
            return self._update(inner, sites, updates, state, params, extra)

        return optax.GradientTransformationExtraArgs(init, update)

    def _init(self, tx: optax.GradientTransformation, params: Any, sites: Sites) -> PruningState:
        norms: dict[str, Any] = {}
        kept: dict[str, Any] = {}
        # `optax.tree_map_params` calls `init` with a placeholder for the params, which has no leaves.
        for site, factor in zip(sites, triplets.read(params, sites, _FIELDS)) if jax.tree.leaves(params) else ():
            paths.insert(norms, site.keys, jnp.zeros(factor.a.shape[:-1], factor.a.dtype))
            if self.mode == "freeze":
                paths.insert(kept, site.keys, jnp.ones(factor.a.shape, bool))
        step, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
        return PruningState(tx.init(params), step, norms, kept, skipped)

    def _update(
        self, tx: Any, sites: Sites, gradients: Any, state: PruningState, params: Any, extra: dict[str, Any]
    ) -> tuple[Any, PruningState]:
        updates, inner = tx.update(gradients, state.inner, params, **extra)
        step: Any = optax.safe_increment(state.step)
        norms: dict[str, Any] = {}
        kept: dict[str, Any] = {}
        moves, gone = [], []
        sound = scores.finite((gradients, [_inputs(extra["inputs"], site) for site in sites]))
        keep = jnp.where(sound, self.beta, 1)
        for site, value, move in zip(sites, *(triplets.read(tree, sites, _FIELDS) for tree in (params, updates))):
            now = _inputs(extra["inputs"], site).astype(value.a.dtype)
            now = jnp.where(sound, now, jnp.zeros_like(now))
            average = keep.astype(now.dtype) * paths.lookup(state.norms, site.keys) + (1 - self.beta) * now
            zero = self._zero(step, value.a + move.a, average, paths.lookup(state.kept, site.keys))
            moves.append(Triplet(jnp.where(zero, -value.a, move.a), None, None))
            gone.append(Triplet(zero, None, None))
            paths.insert(norms, site.keys, average)
            if self.mode == "freeze":
                paths.insert(kept, site.keys, ~zero)
        inner = moments.edited(tx, inner, sites, _FIELDS, gone)
        return triplets.write(updates, sites, moves, _FIELDS), PruningState(
            inner, step, norms, kept, state.skipped + ~sound
        )

    def _zero(self, step: jax.Array, a: jax.Array, norms: jax.Array, kept: Any) -> jax.Array:
        """A mask of the entries that are zero after this step, sharded as `a` is."""
        return _compat.automatic(self._now_zero, jax.typeof(a))(step, a, norms, kept)

    def _now_zero(self, step: jax.Array, a: jax.Array, norms: jax.Array, kept: Any) -> jax.Array:
        now = step % self.every == 0
        frozen = ~kept if self.mode == "freeze" else jnp.zeros(a.shape, bool)
        return jax.lax.cond(now, lambda: frozen | ~self._kept(a, norms, frozen), lambda: frozen)

    def _kept(self, a: jax.Array, norms: jax.Array, frozen: jax.Array) -> jax.Array:
        # Frozen entries get the lowest importance, so that they are among the pruned ones of their group.
        importance = jnp.where(frozen, -1, jnp.abs(a) * norms[..., None])
        return ~least(importance, self.pruned, self.group)


def least(importance: jax.Array, count: int, group: int) -> jax.Array:
    """A mask of the `count` smallest of every `group` entries that follow each other along the axis before the last.

    Exactly so many, of equal ones the first. Where the last group is not full, it is filled up with infinite entries.
    """
    size = importance.shape[-2]
    values = jnp.moveaxis(importance, -2, -1)
    room = [(0, 0)] * (values.ndim - 1) + [(0, math.ceil(size / group) * group - size)]
    grouped = jnp.pad(values, room, constant_values=jnp.inf).reshape(*values.shape[:-1], -1, group)
    mask = (budget.positions(grouped) < count).reshape(*values.shape[:-1], -1)[..., :size]
    return jnp.moveaxis(mask, -1, -2)


def _inputs(seen: Any, site: Site) -> jax.Array:
    """The norms of a site's inputs.

    Raises:
        ValueError: where they are missing, or of another shape.
    """
    found: Any = paths.lookup(seen, site.keys) if isinstance(seen, dict) else None
    wanted = (*site.batch_shape, site.in_size)
    if getattr(found, "shape", None) != wanted:
        got = getattr(found, "shape", "nothing")
        raise ValueError(f"PRILoRA: inputs has {got} for {site.path}, wanted norms of shape {wanted} by jlora.observe")
    return found
