"""The programs of an engine: one chunk of a prompt, some decoding steps of all rows, one adapter into one row.

Where adapters may put something in front of a text, a fourth one lays that into the row's cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.compose.slotted import put
from jlora.core.transforms.lift import lift
from jlora.core.tree.adapted import Adapted
from jlora.models.attention import KVCache, empty_cache
from jlora.serving.drawing import Drawn, Ways, draw
from jlora.serving.room import FRONT, Packed, Room

#: What a step tells of a row: nothing; a token; its last token; its end by an end token; that its logits are no numbers.
NOTHING, TOKEN, LAST, STOP, UNSOUND = range(5)


class Rows(NamedTuple):
    """The rows on the device.

    Attributes:
        cache: keys and values, with an index for each row.
        token: int32 `[rows]`, the last token that was drawn, which the model hasn't read.
        count: int32 `[rows]`, how many were drawn.
        running: bool `[rows]`, whether the row draws more.
    """

    cache: KVCache
    token: jax.Array
    count: jax.Array
    running: jax.Array


class Told(NamedTuple):
    """What a program tells, `NOTHING` to `UNSOUND`, and what was drawn; with an axis of steps in front where it has steps."""

    event: jax.Array
    drawn: Drawn


class Programs:
    """Compiled programs of fixed shapes; all that changes from call to call is an argument.

    Attributes:
        traced: how many programs were compiled.
    """

    def __init__(self, model: Any, room: Room | None, rows: int, slots: int, steps: int):
        """Args: the decoder; what rows have room for; rows; tokens of the cache in each; decoding steps of a call."""
        self._apply = lift(model.apply, unread="allow")
        self._room, self._rows, self._slots, self._steps = room, rows, slots, steps
        self.traced = 0
        self.read = jax.jit(self._read, donate_argnums=1)
        self.decode = jax.jit(self._decode, donate_argnums=1)
        self._write = jax.jit(self._put, donate_argnums=0)
        self._lay = jax.jit(self._laid, donate_argnums=0)

    def empty(self, params: Any) -> Rows:
        """Rows in which nothing is.

        Args:
            params: the base.
        """
        tokens, cache = jnp.zeros((self._rows, 1), jnp.int32), empty_cache(self._rows, self._slots)
        _, made = jax.eval_shape(lambda params: self._apply({"params": params}, tokens, cache=cache), params)
        cache = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), made)
        blank = jnp.zeros(self._rows, jnp.int32)
        return Rows(cache.replace(index=blank), blank.copy(), blank.copy(), jnp.zeros(self._rows, bool))

    def write(self, adapted: Adapted, row: int, packed: Packed) -> Adapted:
        """The adapters of rows with one overwritten, in place."""
        sites = adapted.plan.sites
        banks = [paths.lookup(adapted.params, site.keys) for site in sites]
        params: dict[str, Any] = {}
        flat = {name: array for name, array in packed.items() if name not in FRONT}
        for site, fields in zip(sites, self._write(banks, flat, jnp.int32(row)), strict=True):
            paths.insert(params, site.keys, fields)
        return adapted.replace(params=params)

    def blank(self, rows: Rows) -> Packed | None:
        """Virtual tokens that are none, as many as there is room for; None where there is no room."""
        tokens = 0 if self._room is None else self._room.virtual
        if not tokens:
            return None
        alike: Any = dict(zip(FRONT, (rows.cache.keys, rows.cache.values), strict=True))
        return {name: jnp.zeros((x.shape[0], tokens, *x.shape[3:]), x.dtype) for name, x in alike.items()}

    def lay(self, rows: Rows, row: int, packed: Packed, count: int) -> Rows:
        """The rows, one of which begins with the virtual tokens of an adapter."""
        return self._lay(rows, *(packed[name] for name in FRONT), jnp.int32(row), jnp.int32(count))

    def _laid(self, rows: Rows, keys: jax.Array, values: jax.Array, row: jax.Array, count: jax.Array) -> Rows:
        self.traced += 1
        part = _of_row(rows.cache, row)

        def begun(kept: Any, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(kept, new[:, None].astype(kept.dtype), 0, 2)

        places = jnp.arange(part.positions.shape[1], dtype=jnp.int32)
        part = part.replace(
            keys=begun(part.keys, keys),
            values=begun(part.values, values),
            positions=places[None],
            segments=(places < count).astype(jnp.int32)[None],
            index=count,
        )
        return rows._replace(cache=_with_row(rows.cache, part, row))

    def _put(self, banks: Any, packed: Packed, row: jax.Array) -> Any:
        self.traced += 1
        assert self._room is not None
        return put(banks, self._room.unpacked(packed), row, tuple(len(site.batch_axes) for site in self._room.sites))

    def _read(
        self,
        params: Any,
        rows: Rows,
        ways: Ways,
        row: jax.Array,
        tokens: jax.Array,
        start: jax.Array,
        count: jax.Array,
        last: jax.Array,
    ) -> tuple[Rows, Told]:
        """One chunk of a prompt into a row; where it is the last, the row draws its first token.

        Args:
            params: the base, or the adapters of rows.
            rows: the rows.
            ways: how they draw.
            row: the row.
            tokens: int32 `[chunk]`, filled up with anything.
            start: how many tokens of the prompt were read before; at 0 the row is emptied.
            count: how many of the tokens are the prompt's.
            last: whether the prompt ends here.
        """
        self.traced += 1
        params = params.on(slot=row) if isinstance(params, Adapted) else params
        whole, ways = rows.cache, ways.row(row)
        cache = _emptied(_of_row(whole, row), start)
        mask = jnp.arange(tokens.shape[0]) < count
        hidden, cache = self._apply(
            {"params": params}, tokens[None], attention_mask=mask[None], cache=cache, return_hidden=True
        )
        end = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
        logits = self._apply({"params": params}, from_hidden=end)[:, 0]
        drawn = draw(logits, ways, jnp.zeros(1, jnp.int32))
        event = jnp.where(last, _events(drawn, ways, jnp.ones(1, jnp.int32)), NOTHING)
        rows = Rows(
            _with_row(whole, cache.replace(index=start + count), row),
            rows.token.at[row].set(drawn.token[0]),
            rows.count.at[row].set(1),
            rows.running.at[row].set(event[0] == TOKEN),
        )
        return rows, Told(event, drawn)

    def _decode(self, params: Any, rows: Rows, ways: Ways) -> tuple[Rows, Told]:
        """Some steps of all rows; a row that ends does nothing in the steps that are left."""
        self.traced += 1

        def step(rows: Rows, _: None) -> tuple[Rows, Told]:
            running = rows.running
            logits, cache = self._apply(
                {"params": params}, rows.token[:, None], attention_mask=running[:, None], cache=rows.cache
            )
            cache = cache.replace(index=jnp.where(running, cache.index, rows.cache.index))
            drawn = draw(logits[:, 0], ways, rows.count)
            count = rows.count + running
            event = jnp.where(running, _events(drawn, ways, count), NOTHING)
            return Rows(cache, jnp.where(running, drawn.token, rows.token), count, event == TOKEN), Told(event, drawn)

        rows = rows._replace(running=rows.running & ways.alive)
        return jax.lax.scan(step, rows, length=self._steps)


def _events(drawn: Drawn, ways: Ways, count: jax.Array) -> jax.Array:
    """What is to be told of rows that have drawn, the token counted."""
    event = jnp.where(count >= ways.limit, LAST, TOKEN)
    event = jnp.where(jnp.any(drawn.token[:, None] == ways.ends, axis=1), STOP, event)
    return jnp.where(drawn.sound, event, UNSOUND).astype(jnp.int32)


def _of_row(cache: KVCache, row: jax.Array) -> KVCache:
    """The cache of one row, as of a batch of one with one index."""

    def cut(array: Any, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, row, 1, axis)

    return KVCache(
        cut(cache.keys, 1), cut(cache.values, 1), cut(cache.positions, 0), cut(cache.segments, 0), cache.index[row]
    )


def _emptied(cache: KVCache, start: jax.Array) -> KVCache:
    """A row's cache without what is beyond its first tokens.

    What another text has left is masked, but zero times something that is no number would be none: so it is overwritten.
    """
    known = jnp.arange(cache.segments.shape[1]) < start
    kept = {name: jnp.where(known[:, None, None], getattr(cache, name), 0) for name in ("keys", "values")}
    return cache.replace(**kept, segments=jnp.where(known, cache.segments, 0), index=start)


def _with_row(whole: KVCache, part: KVCache, row: jax.Array) -> KVCache:
    """The cache with that of one row in its place."""

    def lay(array: Any, own: Any, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, own, row, axis)

    index = whole.index.at[row].set(part.index)
    keys, values = lay(whole.keys, part.keys, 1), lay(whole.values, part.values, 1)
    return KVCache(keys, values, lay(whole.positions, part.positions, 0), lay(whole.segments, part.segments, 0), index)
