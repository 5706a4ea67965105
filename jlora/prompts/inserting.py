"""Where virtual tokens go in a batch: in front of every text of every row."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """A batch `[rows, length]` with room for virtual tokens, `[rows, longer]`.

    Attributes:
        source: for each new position the old one that it takes, or `length` where it is virtual or empty.
        number: for each new position the number of its virtual token, or -1.
        kept: for each old position its new one, or `longer` where there was no room.
        owner: for each new position an old one of the same text; for a virtual one that of the first token behind it.
        first: how many positions there are before the first old one, where all of these follow one another; else 0. Static.
    """

    source: jax.Array
    number: jax.Array
    kept: jax.Array
    owner: jax.Array
    first: int = field(default=0, metadata={"static": True})

    @property
    def longer(self) -> int:
        """The new length."""
        return self.source.shape[1]

    def spread(self, array: jax.Array, fill: int) -> jax.Array:
        """What belongs to the old tokens at their new positions; `fill` at all others."""
        return jnp.take_along_axis(jnp.pad(array, ((0, 0), (0, 1)), constant_values=fill), self.source, axis=1)

    def of_owner(self, array: jax.Array) -> jax.Array:
        """As `spread`, but a virtual token has what the first token behind it has, and an empty position 0."""
        return jnp.take_along_axis(jnp.pad(array, ((0, 0), (0, 1))), self.owner, axis=1)

    def back(self, array: jax.Array) -> jax.Array:
        """What a function gives for the new positions `[rows, longer, ..]` at the old ones; NaN where there was no room."""
        if self.first:
            return array[:, self.first :]
        fill = jnp.nan if jnp.issubdtype(array.dtype, jnp.inexact) else None
        return jax.vmap(lambda row, kept: jnp.take(row, kept, axis=0, mode="fill", fill_value=fill))(array, self.kept)


def in_front(shape: tuple[int, ...], tokens: int) -> Places:
    """One text a row: the virtual tokens are the first positions of all, before any padding."""
    rows, length = shape
    new = jnp.arange(length + tokens, dtype=jnp.int32)
    wide = lambda array: jnp.broadcast_to(array, (rows, array.shape[0]))  # noqa: E731
    return Places(
        wide(jnp.where(new < tokens, length, new - tokens)),
        wide(jnp.where(new < tokens, new, -1)),
        wide(jnp.arange(length, dtype=jnp.int32) + tokens),
        wide(jnp.maximum(new - tokens, 0)),
        tokens,
    )


def first_tokens(segments: jax.Array | None, mask: jax.Array | None) -> jax.Array:
    """Where a text begins, bool `[rows, length]`.

    Args:
        segments: which text each token is of, 0 for padding; None for one text a row.
        mask: 0 or False for padding, where there are no segments.
    """
    if segments is None:
        assert mask is not None
        there = mask.astype(bool)
        return there & (jnp.cumsum(there, axis=1) == 1)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    return (segments != 0) & (segments != before)


def before_each(first: jax.Array, tokens: int, texts: int) -> Places:
    """Several texts a row, or padding in front of them: the virtual tokens are before the first token of each text.

    Args:
        first: where a text begins, bool `[rows, length]`.
        tokens: virtual tokens a text.
        texts: for how many texts a row there is room. The tokens of further ones have no place.
    """
    rows, length = first.shape
    longer = length + texts * tokens
    ordinal = jnp.cumsum(first, axis=1, dtype=jnp.int32)
    old = jnp.arange(length, dtype=jnp.int32)
    kept = jnp.where(ordinal <= texts, old + tokens * ordinal, longer)
    row = jnp.arange(rows)[:, None]
    blank = jnp.full((rows, longer), length, jnp.int32)
    source = blank.at[row, kept].set(jnp.broadcast_to(old, (rows, length)), mode="drop")
    # The virtual tokens of a text that begins at `kept` are the ones before it.
    virtual = jnp.arange(tokens, dtype=jnp.int32)
    at = jnp.where(first[..., None], kept[..., None] - tokens + virtual, longer).reshape(rows, -1)
    at = jnp.where(jnp.repeat(kept, tokens, axis=1) < longer, at, longer)
    number = jnp.full((rows, longer), -1, jnp.int32)
    number = number.at[row, at].set(jnp.tile(virtual, (rows, length)), mode="drop")
    owner = source.at[row, at].set(jnp.broadcast_to(jnp.repeat(old, tokens), (rows, length * tokens)), mode="drop")
    return Places(source, number, kept, owner)
