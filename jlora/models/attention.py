"""What the attention of every model shares: segments, positions, what is visible, and the key-value cache."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._chunks import cut, joined
from jlora.core.products.backend import target

SCORES = 2**26
"""Scores of attention that are in memory at a time: 256 MiB in float32."""
SCORES_OF_A_TPU = 2**24
"""The same for each chip of a TPU: more leave its fast memory between the products and are read again."""


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the tokens read so far. `empty_cache` makes one.

    Attributes:
        keys: `[layers, batch, slots, kv_heads, head_dim]`, or None until the model's first call makes them.
        values: As keys.
        positions: int32 `[batch, slots]`, position of the token in each slot.
        segments: int32 `[batch, slots]`, segment of the token in each slot, 0 where the slot is empty or padding.
        index: int32, the next free slot: a number for all rows, or `[batch]`, for rows that are not equally long.
    """

    keys: jax.Array | None
    values: jax.Array | None
    positions: jax.Array
    segments: jax.Array
    index: jax.Array

    def longer(self, slots: int) -> "KVCache":
        """An empty cache with room for more tokens a row."""
        room = jnp.pad(self.positions, ((0, 0), (0, slots)))
        return self.replace(positions=room, segments=jnp.zeros_like(room))


def empty_cache(batch: int, slots: int) -> KVCache:
    """A cache for `slots` tokens a row, prompt and continuation together."""
    blank = jnp.zeros((batch, slots), jnp.int32)
    return KVCache(keys=None, values=None, positions=blank, segments=blank, index=jnp.zeros((), jnp.int32))


def token_segments(tokens: jax.Array, segment_ids: jax.Array | None, attention_mask: jax.Array | None) -> jax.Array:
    """Segment of every token, int32 `[batch, length]`, 0 for padding; without either argument all are segment 1."""
    segments = jnp.ones_like(tokens, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    return segments if attention_mask is None else jnp.where(attention_mask.astype(bool), segments, 0)


def token_positions(segments: jax.Array, cache: KVCache | None = None) -> jax.Array:
    """Positions that count each segment's tokens from 0, or on from those in the cache; padding does not count."""
    valid = segments != 0
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    if cache is not None:
        seen = jnp.sum(cache.segments != 0, axis=1, dtype=jnp.int32)
        return jnp.maximum(seen[:, None] + count - 1, 0)
    previous = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    starts = jnp.where((segments != previous) & valid, count - 1, 0)
    return jnp.maximum(count - 1 - jax.lax.cummax(starts, axis=1), 0)


def extend(cache: KVCache, positions: jax.Array, segments: jax.Array) -> KVCache:
    """The cache with the new tokens' positions and segments written (their keys and values come from the layers).

    Raises:
        ValueError: The cache has too few slots, as far as shapes (and a concrete index) tell.
    """
    length, slots = positions.shape[1], cache.positions.shape[1]
    used = 0 if isinstance(cache.index, Tracer) else int(np.asarray(cache.index).max())
    if used + length > slots:
        raise ValueError(
            f"KV cache: {slots} slots, {used} used, {length} more tokens given; make a longer empty_cache."
        )
    return cache.replace(
        positions=written(cache.positions, positions, cache.index),
        segments=written(cache.segments, segments, cache.index),
        index=cache.index + length,
    )


def written(kept: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """`kept [batch, slots, ...]` with `new [batch, length, ...]` from slot `index` on, a number or `[batch]`."""
    new = new.astype(kept.dtype)
    if jnp.ndim(index):
        return jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice_in_dim(row, part, start, 0))(
            kept, new, index
        )
    return jax.lax.dynamic_update_slice_in_dim(kept, new, index, 1)


class Visible(NamedTuple):
    """Which keys each query sees: those of its segment that are no padding; and with positions none after itself.

    Attributes:
        query_segments: int32 `[batch, queries]`, 0 for padding.
        key_segments: int32 `[batch, keys]`.
        query_positions: int32 `[batch, queries]`, or None where tokens see what follows them.
        key_positions: int32 `[batch, keys]`, or None.
        window: how many positions back a query sees, itself counted; None for all of them.
    """

    query_segments: jax.Array
    key_segments: jax.Array
    query_positions: jax.Array | None = None
    key_positions: jax.Array | None = None
    window: Any = None

    def mask(self) -> jax.Array:
        """True where a query sees a key; bool `[batch, 1, queries, keys]`."""
        query, key = self.query_segments[:, None, :, None], self.key_segments[:, None, None, :]
        seen = (query == key) & (key != 0)
        if self.query_positions is None or self.key_positions is None:
            return seen
        distance = self.query_positions[:, None, :, None] - self.key_positions[:, None, None, :]
        seen &= distance >= 0
        return seen if self.window is None else seen & (distance < self.window)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visible,
    scale: float | jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32, heads folded into the last axis.

    Where the scores would be more than 2^26 numbers (on a TPU 2^24 for each chip), the queries go through in blocks, each
    against all keys, and their scores are computed again for the gradient. Then memory grows with the length, not with its
    square.

    Args:
        query: `[batch, queries, heads, head_dim]`.
        key: `[batch, keys, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads` (grouped-query attention).
        value: As key.
        visible: Which keys each query sees.
        scale: Multiplies the scores; None is `1 / sqrt(head_dim)`.
        cap: Scores are kept within ±cap, by `cap * tanh(score / cap)`; None leaves them.

    Returns:
        `[batch, queries, heads * head_dim]`.
    """
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    device = target()
    most = SCORES_OF_A_TPU * device.devices if device.platform == "tpu" else SCORES
    block = max(most // max(batch * heads * keys, 1), 1)
    if block >= queries:
        return _attend(query, key, value, visible, scale, cap)

    @jax.checkpoint
    def of_block(part: tuple[jax.Array, Visible]) -> jax.Array:
        query, own = part
        return _attend(query, key, value, own, scale, cap)

    of_queries = {name: getattr(visible, name) for name in ("query_segments", "query_positions")}
    parts = {name: cut(array, block) for name, array in of_queries.items() if array is not None}
    mixed = jax.lax.map(lambda part: of_block((part[0], visible._replace(**part[1]))), (cut(query, block), parts))
    return joined(mixed, queries)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, visible: Visible, scale: Any, cap: Any) -> jax.Array:
    mask = visible.mask()
    if cap is None and not isinstance(scale, jax.Array):
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale)
        return mixed.reshape(*query.shape[:2], -1)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32) * factor
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    # A finite number, so that rows of padding alone stay numbers.
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(*query.shape[:2], -1)
