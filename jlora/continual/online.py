"""Online-LoRA: one pass over a stream without tasks; where the loss stands still, a new adapter begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora import paths
from jlora.continual.plateau import Plateau, PlateauState
from jlora.core.protocol.method import Site
from jlora.core.tree.adapted import Adapted
from jlora.optimize.restart import check_restart, restarted

Losses = Callable[[Adapted, Any], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OnlineState:
    """What `OnlineLoRA` remembers between two batches: arrays of fixed shapes, to be kept with a checkpoint.

    Attributes:
        plateau: the loss window.
        importance: of each entry of the adapters, laid out like `adapted.params`.
        buffer: the hardest items, in the form of a batch.
        hardness: their losses; minus infinity for a place that is free.
        restarts: how many adapters have begun since the first.
        loss: of the last batch and the buffer, without the penalty.
        restarted: whether a new adapter began with the last batch.
    """

    plateau: PlateauState
    importance: Any
    buffer: Any
    hardness: jax.Array
    restarts: jax.Array
    loss: jax.Array
    restarted: jax.Array


@dataclass(frozen=True)
class OnlineLoRA:
    """Continual learning from a stream of batches, each seen once, without being told where tasks begin.

    A batch is trained on by the loss `mean of its items + Σ over the buffer + penalty / 2 * Σ Ω p²`, with the few hardest items
    so far in the buffer, and `Ω` the importance of each entry `p` of the adapters. When the loss (without the penalty) is low
    and stands still, `importance` becomes the running mean of the squared gradients on the buffer, summed over its items; the
    adapter is kept as `jlora.restart` does, so that the output stays what it was; and a new one begins. For `LoRA` it goes into
    the base, which must be float32, and the stream may be endless; for `jlora.Chain` among its finished links, and when these
    are full the last link goes on.

    One step is one function of arrays, to be jitted once for the whole stream. All that is remembered are `adapted`, the
    optimizer's state and an `OnlineState`, whose shapes never change.

    Args:
        losses: `losses(adapted, batch) -> [items]`, the loss of each item; a batch is a pytree of arrays `[items, ...]`. An
            item is what the buffer keeps: a row, or a whole minibatch where the axis of rows comes second (as in the authors'
            code).
        tx: the optimizer.
        surprise: `surprise(adapted, batch) -> [items]`, of which importances are the squared gradients: the authors take
            `-log p` of the class that the model itself finds likeliest (`jlora.own_label_losses`). By default `losses`.
        penalty: the authors' λ.
        buffer: how many items are kept.
        plateau: when the loss stands still. Its thresholds are for the loss above, a sum of up to `1 + buffer` means.

    The authors' code adds the factors of successive adapters apart, so that its output jumps by their cross terms, begins new
    ones with both factors at zero, and takes the importance from one item: those three are not followed. The penalty draws the
    new adapter to zero, as in the code.

    Raises:
        ValueError: for a penalty that is negative, or a buffer below 1; (by `init`) for adapters that can't begin anew.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=2)})
        >>> tx = jlora.optimizer(adapted, optax.adam, learning_rate=2e-4)
        >>> losses = lambda adapted, batch: jnp.mean(jlora.lift(model.apply)({"params": adapted}, batch) ** 2, axis=(1, 2))
        >>> online = jlora.OnlineLoRA(losses, tx)
        >>> opt_state, state = tx.init(adapted.params), online.init(adapted, tokens)
        >>> adapted, opt_state, state = jax.jit(online.step)(adapted, opt_state, state, tokens, key)

    Reference:
        Wei et al. 2024, arXiv:2411.05663.
    """

    losses: Losses
    tx: optax.GradientTransformation
    surprise: Losses | None = None
    penalty: float = 2000.0
    buffer: int = 4
    plateau: Plateau = field(default_factory=Plateau)

    def __post_init__(self) -> None:
        if not self.penalty >= 0:
            raise ValueError(f"OnlineLoRA's penalty must be 0 or more, got {self.penalty!r}")
        if type(self.buffer) is not int or self.buffer < 1:
            raise ValueError(f"OnlineLoRA's buffer must be a whole number of at least 1, got {self.buffer!r}")

    def init(self, adapted: Adapted, batch: Any) -> OnlineState:
        """The state before the first batch.

        Args:
            adapted: what is trained.
            batch: one of the stream, for its shapes.

        Raises:
            ValueError: for adapters that can't begin anew (see `jlora.restart`), or a batch whose arrays differ in items.
        """
        check_restart(adapted, _sites(adapted))
        _items(batch)
        importance: dict[str, Any] = {}
        for site in _sites(adapted):
            paths.insert(importance, site.keys, jax.tree.map(jnp.zeros_like, paths.lookup(adapted.params, site.keys)))
        # Free places hold a real item, since what a model makes of zeros (an empty mask) may be no number.
        filled = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (self.buffer, *x.shape[1:])), batch)
        free = jnp.full(self.buffer, -jnp.inf, jnp.float32)
        zero = jnp.zeros((), jnp.float32)
        return OnlineState(
            self.plateau.init(), importance, filled, free, jnp.zeros((), jnp.int32), zero, jnp.zeros((), bool)
        )

    def step(
        self, adapted: Adapted, opt_state: Any, state: OnlineState, batch: Any, key: jax.Array
    ) -> tuple[Adapted, Any, OnlineState]:
        """Trains on one batch, and begins a new adapter where the loss stands still.

        Args:
            adapted: as the last batch left it.
            opt_state: the optimizer's state.
            state: what else is remembered.
            batch: the next of the stream.
            key: random key of the stream, the same for each batch; new adapters are drawn from it.

        Raises:
            ValueError: for `losses` that don't give one loss for each item, or arrays that differ in items.
        """
        count, hard = _items(batch), state.hardness > -jnp.inf
        both = jax.tree.map(lambda x, y: jnp.concatenate([x, y.astype(x.dtype)]), batch, state.buffer)

        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            losses = self.losses(adapted.replace(params=params), both).astype(jnp.float32)
            if losses.shape != (count + self.buffer,):
                raise ValueError(
                    f"OnlineLoRA's losses must give one loss for each of {count + self.buffer} items, got shape {losses.shape}"
                )
            loss = jnp.mean(losses[:count]) + jnp.sum(jnp.where(hard, losses[count:], 0))
            return loss + self.penalty / 2 * _weighed(state.importance, params), (loss, losses)

        (_, (loss, losses)), gradients = jax.value_and_grad(objective, has_aux=True)(adapted.params)
        updates, opt_state = self.tx.update(gradients, opt_state, adapted.params)
        adapted = adapted.replace(params=optax.apply_updates(adapted.params, updates))
        plateau, stands = self.plateau.update(state.plateau, loss)
        begins = stands & _room(adapted)
        adapted, opt_state, importance = self._begun(begins, adapted, opt_state, state, key)
        scores = jnp.where(jnp.concatenate([jnp.ones(count, bool), hard]), losses, -jnp.inf)
        hardness, chosen = jax.lax.top_k(scores, self.buffer)
        kept = jax.tree.map(lambda x: x[chosen], both)
        restarts = state.restarts + begins
        return adapted, opt_state, OnlineState(plateau, importance, kept, hardness, restarts, loss, begins)

    def _begun(
        self, begins: jax.Array, adapted: Adapted, opt_state: Any, state: OnlineState, key: jax.Array
    ) -> tuple[Adapted, Any, Any]:
        """With new adapters, where they begin."""
        sites = _sites(adapted)
        folded = {site.keys for site in sites if not site.method.kept_fields}
        leaves = {keys: leaf for keys, leaf in paths.flatten_with_keys(adapted.base)[0] if keys in folded}

        def whole(leaves: Any, params: Any, frozen: Any) -> Adapted:
            return adapted.replace(base=adapted.with_replaced(leaves), params=params, frozen=frozen)

        def yes(operands: Any) -> Any:
            leaves, opt_state, params, frozen, importance = operands
            now = whole(leaves, params, frozen)
            importance = self._importance(now, state, importance)
            new, opt_state = restarted(now, opt_state, self.tx, jax.random.fold_in(key, state.restarts + 1), sites)
            found = {keys: leaf for keys, leaf in paths.flatten_with_keys(new.base)[0] if keys in folded}
            return found, opt_state, new.params, new.frozen, importance

        operands = (leaves, opt_state, adapted.params, adapted.frozen, state.importance)
        leaves, opt_state, params, frozen, importance = jax.lax.cond(begins, yes, lambda operands: operands, operands)
        return whole(leaves, params, frozen), opt_state, importance

    def _importance(self, adapted: Adapted, state: OnlineState, before: Any) -> Any:
        """The running mean with the squared gradients on the buffer, item by item, so that memory holds those of one."""
        surprise = self.losses if self.surprise is None else self.surprise
        used = state.hardness > -jnp.inf

        def squares(total: Any, item: Any) -> tuple[Any, None]:
            one, counts = item
            loss = lambda p: surprise(adapted.replace(params=p), jax.tree.map(lambda x: x[None], one))[0]  # noqa: E731
            gradients = jax.grad(loss)(adapted.params)
            add = lambda site, t: jax.tree.map(  # noqa: E731
                lambda x, g: x + jnp.where(counts, g * g, 0), t, paths.lookup(gradients, site.keys)
            )
            return {site.path: add(site, total[site.path]) for site in _sites(adapted)}, None

        old = {site.path: paths.lookup(before, site.keys) for site in _sites(adapted)}
        zeros = jax.tree.map(jnp.zeros_like, old)
        total, _ = jax.lax.scan(squares, zeros, (state.buffer, used))
        share = 1 / (state.restarts + 1).astype(jnp.float32)
        new: dict[str, Any] = {}
        for site in _sites(adapted):
            mean = lambda g, x: (share * g + (1 - share) * x).astype(x.dtype)  # noqa: E731
            paths.insert(new, site.keys, jax.tree.map(mean, total[site.path], old[site.path]))
        return new


def own_label_losses(logits: jax.Array) -> jax.Array:
    """`-log p` of the class that is likeliest by the logits themselves, `[items]`, of `[items, classes]`."""
    return -jnp.max(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def _sites(adapted: Adapted) -> tuple[Site, ...]:
    """The leaves whose adapters begin anew."""
    return tuple(site for site in adapted.plan.sites if site.method.restarts)


def _items(batch: Any) -> Any:
    """How many items a batch has.

    Raises:
        ValueError: for arrays that differ in it.
    """
    counts = {leaf.shape[0] if getattr(leaf, "shape", ()) else None for leaf in jax.tree.leaves(batch)}
    if len(counts) != 1 or None in counts:
        told = ", ".join(sorted(map(str, counts)))
        raise ValueError(f"a batch's arrays must have the same number of items in front, got {told}")
    return next(iter(counts))


def _weighed(importance: Any, params: Any) -> jax.Array:
    """`Σ Ω p²`."""
    leaves = dict(paths.flatten_with_keys(params)[0])
    each = [jnp.sum(omega * leaves[keys] ** 2) for keys, omega in paths.flatten_with_keys(importance)[0]]
    return sum(each, jnp.zeros((), jnp.float32))


def _room(adapted: Adapted) -> jax.Array:
    """Whether all chains have room for another link."""
    free = jnp.ones((), bool)
    for site in adapted.plan.sites:
        links, frozen = site.method.links, paths.lookup(adapted.frozen, site.keys)
        if site.method.kept_fields and links is not None:
            free &= jnp.all(frozen["link"] + 1 < links) if "link" in frozen else False
    return free
