"""Shifted sparse attention (S²-Attn) of LongLoRA: attention in groups of tokens, which half the heads cut elsewhere."""

from typing import Any

import jax
import jax.numpy as jnp


def s2_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    group: int | None = None,
    causal: bool = True,
    segments: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Attention inside groups, for training on long texts: `length * group` scores a head in place of `length²`.

    The first half of the heads sees groups `[0, group)`, `[group, 2 group)`, ..; the second half groups that begin half a group
    later, so that what is known flows from group to group. The authors roll the second half by half a group, by which the first
    tokens of a text would see the last ones; here they don't. A model that was trained so is used with full attention.

    Args:
        query: `[batch, length, heads, head_dim]`.
        key: `[batch, length, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        value: as key.
        bias: not supported.
        mask: bool `[batch, 1 or heads, length, length]`, what else is seen; beside `causal` and `segments`. It alone takes
            `length²` numbers: leave it out where these say the same.
        group: tokens of a group, an even number; None for a quarter of the length (the authors' choice), rounded up.
        causal: no token sees one behind it.
        segments: which text each token is of, `[batch, length]`, 0 for padding; each text sees itself alone.
        **options: what else Flax gives an `attention_fn`; dropout is refused.

    Returns:
        `[batch, length, heads, head_dim]`.

    Raises:
        ValueError: for a bias, dropout, an odd number of heads, keys of another length than queries (as in decoding), or a
            group that is no positive even number.

    Example:
        >>> import functools, flax
        >>> attention = functools.partial(jlora.models.s2_attention, group=2048)
        >>> layer = flax.linen.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention)

    Reference:
        Chen et al. 2023 (LongLoRA), arXiv:2309.12307.
    """
    _check(query, key, bias, options)
    length, heads = query.shape[1], query.shape[2]
    group = group_of(length, group)
    halves = [_half(x, heads) for x in (query, key, value)]
    masks = [None, None] if mask is None else [mask, mask] if mask.shape[1] == 1 else jnp.split(mask, 2, axis=1)
    made = [
        _in_groups(q, k, v, seen, group, group // 2 * n, causal, segments)
        for n, (q, k, v, seen) in enumerate(zip(*halves, masks, strict=True))
    ]
    return jnp.concatenate(made, axis=2)


def group_of(length: int, group: int | None) -> int:
    """The tokens of a group: as asked for, or a quarter of the length, rounded up to an even number.

    Raises:
        ValueError: for a group that is no positive even number.
    """
    if group is None:
        return 2 * -(-length // 8)
    if type(group) is not int or group < 2 or group % 2:
        raise ValueError(f"group must be a positive even number of tokens, got {group!r}")
    return group


def _check(query: jax.Array, key: jax.Array, bias: Any, options: dict[str, Any]) -> None:
    if bias is not None:
        raise ValueError("s2_attention takes no bias; say what is seen by mask, or segments")
    if options.get("dropout_rate", 0.0) and not options.get("deterministic", False):
        raise ValueError(f"s2_attention has no dropout, got dropout_rate={options['dropout_rate']}")
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"s2_attention is for training: {query.shape[1]} queries with {key.shape[1]} keys, as in decoding, want full "
            "attention"
        )
    if query.shape[2] % 2 or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"s2_attention wants an even number of heads, a multiple of those of keys, got {query.shape[2]} and "
            f"{key.shape[2]}"
        )


def _half(x: jax.Array, heads: int) -> list[jax.Array]:
    """The heads of each half of the queries, or the ones of keys that belong to them."""
    if x.shape[2] % 2:  # one head of keys is for queries of both halves
        x = jnp.repeat(x, heads // x.shape[2], axis=2)
    return jnp.split(x, 2, axis=2)


def _in_groups(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    group: int,
    shift: int,
    causal: bool,
    segments: jax.Array | None,
) -> jax.Array:
    """Attention inside groups of which the first begins `shift` tokens before the text."""
    batch, length = query.shape[:2]
    groups = -(-(length + shift) // group)
    after = groups * group - length - shift

    def grouped(x: jax.Array) -> jax.Array:
        """`[batch, length, ..]` as `[batch * groups, group, ..]`."""
        x = jnp.pad(x, ((0, 0), (shift, after), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch * groups, group, *x.shape[2:])

    own = jnp.ones((batch, length), jnp.int32) if segments is None else jnp.broadcast_to(segments, (batch, length))
    own = grouped(own)
    seen = (own[:, :, None] == own[:, None, :]) & (own[:, None, :] != 0)
    if causal:
        seen &= jnp.tri(group, dtype=bool)
    seen = seen[:, None]
    if mask is not None:
        seen = seen & _blocks(mask, group, groups, shift, after)
    mixed = jax.nn.dot_product_attention(*(grouped(x) for x in (query, key, value)), mask=seen)
    return mixed.reshape(batch, groups * group, *mixed.shape[2:])[:, shift : shift + length]


def _blocks(mask: jax.Array, group: int, groups: int, shift: int, after: int) -> jax.Array:
    """What a mask `[batch, heads, length, length]` says inside of each group, `[batch * groups, heads, group, group]`."""
    batch, heads = mask.shape[:2]
    mask = jnp.pad(mask, ((0, 0), (0, 0), (shift, after), (shift, after)))
    blocks = jnp.diagonal(mask.reshape(batch, heads, groups, group, groups, group), axis1=2, axis2=4)
    return jnp.moveaxis(blocks, -1, 1).reshape(batch * groups, heads, group, group)
