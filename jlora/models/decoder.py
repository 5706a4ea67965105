"""What every decoder of the package is: tokens through a stack of layers with a causal mask and a cache, to logits.

A family is a subclass of `Decoder` with its layer, and a config with the fields that are read here: `vocab_size`,
`hidden_size`, `num_hidden_layers`, `num_key_value_heads`, `head_dim`, `windows`, `tie_word_embeddings`, `language_head`,
`scan_layers`, `remat`, `dtype`, `param_dtype`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora.models import attention
from jlora.models.quantized import refuse_codes

# The window of a layer that has none, beside layers that have one: wider than any text.
NO_WINDOW = np.iinfo(np.int32).max


class AttentionInputs(NamedTuple):
    """What every layer's attention reads besides the hidden states.

    Attributes:
        rotary: what the model's `rotary` makes of the tokens' positions; None for learned positions.
        visible: causal, and within the segment; without a layer's window.
        index: First free slot of the cache, a number or one for each row; None without a cache.
    """

    rotary: Any
    visible: attention.Visible
    index: jax.Array | None


class LayerInputs(NamedTuple):
    """What is one layer's own: its part of the cache, its window, and what the model's `own` gives it, each None if not."""

    keys: Any
    values: Any
    window: Any
    own: Any = None

    def extended(self, key: Any, value: Any, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array, "LayerInputs"]:
        """Keys and values of all tokens, and the layer's cache with the new ones; these alone where there is no cache."""
        if inputs.index is None:
            return key, value, self
        key = attention.written(self.keys, key, inputs.index)
        value = attention.written(self.values, value, inputs.index)
        return key, value, self._replace(keys=key, values=value)

    def visible(self, inputs: AttentionInputs) -> attention.Visible:
        """What this layer's queries see, which ends where its window does."""
        return inputs.visible._replace(window=self.window)


def dense(config: Any, features: int, bias: bool, name: str) -> nn.Dense:
    """A linear layer in the config's dtypes."""
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def embedding(config: Any, rows: int, name: str) -> nn.Embed:
    """A table in the config's dtypes."""
    return nn.Embed(rows, config.hidden_size, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(x / cap)`: values within ±cap; x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Decoder(nn.Module):
    """A decoder: `model.apply({"params": params}, tokens) -> logits`."""

    config: Any

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        cache: attention.KVCache | None = None,
        return_hidden: bool = False,
        from_hidden: jax.Array | None = None,
    ) -> Any:
        """Reads tokens and scores what follows each.

        Args:
            tokens: Token ids `[batch, length]`.
            positions: Position of every token; None counts the tokens of each segment, on from those in the cache.
            segment_ids: `[batch, length]`: packed texts, each sees itself alone; 0 is padding.
            attention_mask: `[batch, length]`, 0 or False for padding, on any side.
            cache: Keys and values of the tokens before (`empty_cache` at first); asks for a pair as the result.
            return_hidden: Return the last hidden states, after the final norm, in place of the logits; so does a model
                without a head.
            from_hidden: Such hidden states, in place of tokens: only the head is applied to them.

        Returns:
            Logits `[batch, length, vocab_size]` (or hidden states `[batch, length, hidden_size]`), float32; with a
            cache, the pair of these and the cache with the new tokens.

        Raises:
            TypeError: Params are kept in the form of a code: run the model by `jlora.lift(model.apply)`.
            ValueError: Both or neither of tokens and hidden states are given, or the latter to a model without a head.
        """
        refuse_codes(self.variables)
        c = self.config
        if from_hidden is not None:
            self._check_hidden(tokens)
            return self._head(self.table(), from_hidden)
        if tokens is None:
            raise ValueError(f"a {type(self).__name__} reads tokens, or hidden states by from_hidden; got neither.")
        segments = attention.token_segments(tokens, segment_ids, attention_mask)
        positions = attention.token_positions(segments, cache) if positions is None else positions
        positions = jnp.broadcast_to(positions, tokens.shape).astype(jnp.int32)
        table = self.table()
        x = self.embed(table, tokens, positions)
        inputs, cache = self._attention_inputs(positions, segments, cache)
        x, cache = self._run_layers(x, inputs, cache)
        x = self.last_norm(x)
        if c.language_head and not return_hidden:
            x = self._head(table, x)
        x = x.astype(jnp.float32)
        return x if cache is None else (x, cache)

    def layer(self) -> Any:
        """The class of a layer: called with hidden states, `AttentionInputs` and its `LayerInputs`; returns the pair."""
        raise NotImplementedError

    def table(self) -> nn.Embed:
        """The embedding of tokens, which a tied head is."""
        return embedding(self.config, self.config.vocab_size, "embed_tokens")

    def embed(self, table: nn.Embed, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """The first hidden states."""
        return table(tokens)

    def last_norm(self, x: jax.Array) -> jax.Array:
        """The norm before the head."""
        raise NotImplementedError

    def rotary(self, positions: jax.Array) -> Any:
        """What attention needs of the positions `[batch, length]`."""
        return None

    def own(self) -> Any:
        """Arrays with one entry for each layer, which the layer finds as `LayerInputs.own`; None for none."""
        return None

    def logits(self, x: jax.Array) -> jax.Array:
        """What becomes of the head's result, in float32."""
        return x

    def _head(self, table: nn.Embed, x: jax.Array) -> jax.Array:
        c = self.config
        x = table.attend(x) if c.tie_word_embeddings else dense(c, c.vocab_size, False, "lm_head")(x)
        return self.logits(x.astype(jnp.float32))

    def _check_hidden(self, tokens: jax.Array | None) -> None:
        if tokens is not None:
            raise ValueError(f"a {type(self).__name__} reads tokens, or hidden states by from_hidden; got both.")
        if not self.config.language_head:
            raise ValueError("from_hidden wants a model with a head; this one was loaded without.")

    def _attention_inputs(self, positions, segments, cache):
        key_positions, key_segments, index = positions, segments, None
        if cache is not None:
            index, cache = cache.index, attention.extend(self._allocate(cache), positions, segments)
            key_positions, key_segments = cache.positions, cache.segments
        visible = attention.Visible(segments, key_segments, positions, key_positions)
        return AttentionInputs(self.rotary(positions), visible, index), cache

    def _allocate(self, cache: attention.KVCache) -> attention.KVCache:
        if cache.keys is not None:
            return cache
        c = self.config
        blank = jnp.zeros((c.num_hidden_layers, *cache.positions.shape, c.num_key_value_heads, c.head_dim), c.dtype)
        return cache.replace(keys=blank, values=blank)

    def _run_layers(self, x, inputs, cache):
        c = self.config
        window = jnp.array([NO_WINDOW if w is None else w for w in c.windows], jnp.int32) if c.windows else None
        keys, values = (None, None) if cache is None else (cache.keys, cache.values)
        own = LayerInputs(keys, values, window, self.own())
        # Under scan the loop itself keeps XLA from merging the recomputation with the forward pass.
        layer = nn.remat(self.layer(), prevent_cse=not c.scan_layers) if c.remat else self.layer()
        if c.scan_layers:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] (a tuple is documented)
                length=c.num_hidden_layers,
            )
            x, own = stack(c, name=self.stack_name)(x, inputs, own)
        else:
            x, own = self._unrolled(layer, x, inputs, own)
        return x, None if cache is None else cache.replace(keys=own.keys, values=own.values)

    def _unrolled(self, layer, x, inputs, own):
        after = []
        for i in range(self.config.num_hidden_layers):
            mine = jax.tree.map(lambda leaf, i=i: leaf[i], own)
            x, one = layer(self.config, name=f"{self.stack_name}_{i}")(x, inputs, mine)
            after.append(one)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)

    @property
    def stack_name(self) -> str:
        """The word that checkpoints have for the layers."""
        return "layers"
