"""The cross-entropy of a language model without all of its logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora._chunks import cut, joined
from jlora.core.tree.adapted import DROPOUT, Adapted

_ENTRIES = 2**24
"""Logits of a chunk by default: 64 MiB in float32, little beside a model whose vocabulary is worth chunks."""

Head = Callable[[Any, jax.Array], jax.Array]
"""Params, or what holds an `Adapted`, and hidden states `[rows, positions, width]` to logits `[rows, positions, words]`."""


class TokenSums(NamedTuple):
    """Sums over the predictions of a batch, so that parts of a batch add up exactly to the whole.

    Attributes:
        loss: `Σ w · -log p(target)` in nats.
        weight: `Σ w`.
        correct: `Σ w` over the predictions whose largest logit is the target's.
    """

    loss: Any
    weight: Any
    correct: Any


def chunked_cross_entropy(
    head: Head,
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    *,
    chunk: int | None = None,
) -> TokenSums:
    """`Σ w · -log softmax(head(params, hidden))[target]`, with the logits of one chunk of positions in memory at a time.

    The gradients are taken in the same pass, chunk by chunk, so no logits are kept or computed twice; they are those of the
    plain cross-entropy but for the order of sums. For a vocabulary of 128,256 and 4,096 tokens the logits alone would be
    2.1 GB in float32, and their gradient as much again.

    Args:
        head: a lifted or plain function of params and hidden states to logits. It is called in a loop, once traced. What a call
            tells the adapters for each position (`Adapted.on`), such as the slots `[rows, positions]` of a bank, is cut as the
            positions are: whole numbers whose first two axes are these, and other numbers with an axis behind them.
        params: what it takes, such as an `Adapted` or `{"params": adapted}`. Of an `Adapted` the trained arrays get
            gradients, of other leaves those that are floating-point numbers.
        hidden: `[rows, positions, width]`, what the model has before its head.
        targets: integers `[rows, positions]`. One below 0, such as -100, is none: with a weight of 0 it does not count, with
            another the loss is NaN.
        weights: `[rows, positions]`, 0 for what does not count; by default all ones.
        chunk: positions of each row in a chunk; by default as many as make 2^24 logits.

    Returns:
        Sums; divide `loss` by `weight` for the mean. Only `loss` has gradients: by params, hidden states and weights.

    Raises:
        ValueError: for shapes that do not fit together, a chunk below 1, or a head that closes over what is differentiated.

    Example:
        >>> adapted = jlora.adapterize({"head": jnp.ones((4, 7))}, {"head": jlora.LoRA(rank=2)})
        >>> head = jlora.lift(lambda params, hidden: hidden @ params["head"])
        >>> hidden, targets = jnp.ones((2, 5, 4)), jnp.zeros((2, 5), int)  # a body makes the hidden states
        >>> sums = jlora.losses.chunked_cross_entropy(head, adapted, hidden, targets)
        >>> loss = sums.loss / sums.weight

        A body and a head that each read some of the adapted leaves are lifted with `unread="allow"`; the models of
        `jlora.models` are called with `return_hidden=True` and with `from_hidden=`.

    Reference:
        Hsu et al. 2024, arXiv:2410.10989 (Liger Kernel, fused linear cross-entropy).
    """
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    _check(hidden, targets, weights, chunk)
    chunk = _positions(head, params, hidden) if chunk is None else chunk
    if chunk >= hidden.shape[1]:
        loss, (_, correct) = _scored(head(params, hidden), targets, weights)
    else:
        trained, rebuild = _split(params, hidden.shape[:2], chunk)

        def of_chunk(trained: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array, number: jax.Array):
            return _scored(head(rebuild(trained, number), hidden), targets, weights)

        try:
            loss, correct = _summed(of_chunk, chunk)(trained, hidden, targets, weights)
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                "the head closes over an array that is differentiated, whose gradient would be lost: give it by params"
            ) from error
    return TokenSums(loss, jnp.sum(weights), jax.lax.stop_gradient(correct))


def _scored(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The weighted sum of the losses; every loss, and the weight of what is right."""
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.int32)
    # Indexing would count a target below 0 from the end of the vocabulary.
    targets = jnp.where(targets < 0, jnp.where(weights == 0, 0, logits.shape[-1]), targets)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return jnp.sum(losses * weights), (losses, jnp.sum(right * weights))


def _summed(of_chunk: Callable, chunk: int) -> Callable:
    """The sums of `of_chunk` over chunks of positions, with gradients that are taken on the way."""

    @jax.custom_vjp
    def summed(trained, hidden, targets, weights):
        def add(total, part):
            loss, (_, correct) = of_chunk(trained, *part)
            return (total[0] + loss, total[1] + correct), None

        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(add, (zero, zero), _parts(chunk, hidden, targets, weights))[0]

    def forward(trained, hidden, targets, weights):
        def add(total, part):
            value_and_grad = jax.value_and_grad(of_chunk, argnums=(0, 1), has_aux=True)
            (loss, (losses, correct)), (gradient, to_hidden) = value_and_grad(trained, *part)
            gradients = jax.tree.map(lambda sum, new: sum + new.astype(sum.dtype), total[2], gradient)
            return (total[0] + loss, total[1] + correct, gradients), (to_hidden, losses)

        zero = jnp.zeros((), jnp.float32)
        start = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, _wide(leaf.dtype)), trained)
        parts = _parts(chunk, hidden, targets, weights)
        (loss, correct, gradients), found = jax.lax.scan(add, (zero, zero, start), parts)
        to_hidden, losses = (joined(part, hidden.shape[1]) for part in found)
        kept = jax.tree.map(lambda sum, leaf: sum.astype(leaf.dtype), gradients, trained)
        return (loss, correct), (kept, to_hidden, losses.astype(weights.dtype))

    def backward(kept, cotangents):
        gradients, to_hidden, losses = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), kept)
        return gradients, to_hidden, None, losses

    summed.defvjp(forward, backward)
    return summed


def _parts(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays in chunks of positions, and the chunks' numbers; what they are filled with weighs nothing."""
    parts = [cut(array, chunk) for array in arrays]
    return *parts, jnp.arange(len(parts[0]))


def _split(params: Any, places: tuple[int, ...], chunk: int) -> tuple[list[Any], Callable[[list[Any], jax.Array], Any]]:
    """What is differentiated, and a function that puts it back for the chunk of a number.

    The chunk has dropout of its own, and of what was told for each of the `[rows, positions]` what is for its positions.
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    adapted = [isinstance(leaf, Adapted) for leaf in leaves]
    chosen = [
        is_adapted or jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for is_adapted, leaf in zip(adapted, leaves)
    ]
    trained = [leaf.params if isinstance(leaf, Adapted) else leaf for leaf, take in zip(leaves, chosen) if take]
    told = [_told_by_chunk(leaf, places, chunk) if isinstance(leaf, Adapted) else {} for leaf in leaves]

    def rebuild(trained: list[Any], number: jax.Array) -> Any:
        new = iter(trained)
        whole = [next(new) if take else leaf for leaf, take in zip(leaves, chosen)]
        return jax.tree.unflatten(treedef, [_for_chunk(*each, number) for each in zip(leaves, whole, told)])

    return trained, rebuild


def _told_by_chunk(adapted: Adapted, places: tuple[int, ...], chunk: int) -> dict[str, jax.Array]:
    """What a call tells for each position, `[chunks, rows, chunk, …]`.

    Numbers of two axes that are not whole are for rows: a bank's weights, `[rows, slots]`.
    """
    least = {name: 2 if jnp.issubdtype(x.dtype, jnp.integer) else 3 for name, x in adapted.context.items()}
    by_position = {name: x for name, x in adapted.context.items() if x.ndim >= least[name] and x.shape[:2] == places}
    return {name: cut(x, chunk) for name, x in by_position.items()}


def _for_chunk(former: Any, new: Any, told: dict[str, jax.Array], number: jax.Array) -> Any:
    if not isinstance(former, Adapted):
        return new
    own, key = {name: parts[number] for name, parts in told.items()}, former.context.get(DROPOUT)
    if key is not None:
        own[DROPOUT] = jax.random.fold_in(key, number)
    return former.replace(params=new).on(**own)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _positions(head: Head, params: Any, hidden: jax.Array) -> int:
    """How many positions of each row make `_ENTRIES` logits; at least one."""
    # Of all positions, since a call may tell methods something of each token, such as a bank's slots.
    logits = jax.eval_shape(head, params, hidden)
    return max(_ENTRIES * max(hidden.shape[1], 1) // max(logits.size, 1), 1)


def _check(hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int | None) -> None:
    if hidden.ndim != 3:
        raise ValueError(f"hidden must be [rows, positions, width], got shape {hidden.shape}")
    for name, array in (("targets", targets), ("weights", weights)):
        if array.shape != hidden.shape[:2]:
            raise ValueError(f"{name} must be [rows, positions] = {hidden.shape[:2]}, got shape {array.shape}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, got {chunk}")
