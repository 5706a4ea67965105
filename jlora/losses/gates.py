"""The loss of a mixture's gates, where it is known which adapter each token should use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jlora import paths

#: The name by which methods say their gates' logits.
SAID = "gate_logits"


def gate_cross_entropy(said: Any, labels: jax.Array, *, shift: bool = True, ignore: int = -100) -> jax.Array:
    """Cross-entropy of all gates' logits against the adapter that each token should use: MeteoRA's second loss.

    The mean of `-log softmax(logits)[label]` over gates, layers, and the tokens that have a label; every gate of every layer
    counts alike. With `shift` the logits at a token are held against the label of the token that follows, which they help to
    write, and the last token's against none. The authors add 50 times this to the loss of the language model.

    Args:
        said: what `jlora.lift(fn, aux=True)` returns beside the result: `[*layers, rows, tokens, slots]` for each matrix with
            a gate. What else is said there is left alone.
        labels: `[rows, tokens]`, the slot of each token's adapter, such as that of the task which its text is from.
        shift: whether labels are those of tokens that are read, as the tokens of a language model are.
        ignore: a label that asks nothing. Any other that is no slot gives NaN.

    Returns:
        One number; 0 where no token has a label.

    Raises:
        ValueError: where nothing that is said is a gate's logits, or their shape is another than the labels'.

    Example:
        >>> spec = {r".*/q_proj/kernel": jlora.LoRA(4)}
        >>> sql, chat = (jlora.adapterize(params, spec, jax.random.key(seed)) for seed in range(2))
        >>> adapted = jlora.meteora(params, {"sql": sql, "chat": chat})
        >>> logits, said = jlora.lift(model.apply, aux=True)({"params": adapted}, tokens)
        >>> loss = 50 * jlora.losses.gate_cross_entropy(said, jnp.zeros_like(tokens))

    Reference:
        Xu et al. 2024, arXiv:2405.13053; shift, mean and weight as in their code.
    """
    found = {"/".join(keys[:-1]): leaf for keys, leaf in paths.flatten_with_keys(said)[0] if keys[-1] == SAID}
    if not found:
        raise ValueError(
            "no gate said its logits: give what jlora.lift(fn, aux=True) returns beside the result, of a jlora.meteora"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels are slots, whole numbers [rows, tokens]; got {labels.dtype} of shape {labels.shape}")
    for path, logits in found.items():
        if labels.ndim != 2 or logits.shape[-3:-1] != labels.shape:
            raise ValueError(
                f"{path}: its gate's logits have the shape {logits.shape}, and the labels {labels.shape}; wanted "
                "[*layers, rows, tokens, slots] and [rows, tokens]"
            )
    wanted = labels[:, 1:] if shift else labels
    counts = wanted != ignore
    total, gates = jnp.zeros((), jnp.float32), 0
    for logits in found.values():
        sums, layers = _summed(logits[..., :-1, :] if shift else logits, wanted, counts)
        total, gates = total + sums, gates + layers
    return total / jnp.maximum(gates * jnp.sum(counts), 1)


def _summed(logits: jax.Array, wanted: jax.Array, counts: jax.Array) -> tuple[jax.Array, int]:
    """The cross-entropies summed over the tokens that count and the gates in front of them, and the number of these."""
    slots = logits.shape[-1]
    flat = logits.reshape(-1, *logits.shape[-3:]).astype(jnp.float32)
    at = jnp.where((wanted >= 0) & (wanted < slots), wanted, slots)  # beyond the last: NaN
    at = jnp.broadcast_to(jnp.where(counts, at, 0), flat.shape[:-1])[..., None]
    each = -jnp.take_along_axis(jax.nn.log_softmax(flat), at, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    return jnp.sum(jnp.where(counts, each, 0)), flat.shape[0]


def load_balance(said: Any) -> jax.Array:
    """MiLoRA's second loss, of every router: `modules * Σ_i f_i p_i`, 1 where all modules are alike.

    `f_i` is the share of rows for which module `i` is the likeliest, which has no gradient, and `p_i` the mean of its
    probabilities. The authors add 0.01 times it for each layer; whether summed or as a mean is not stated.

    Args:
        said: what `jlora.lift(fn, aux=True)` returns beside the result.

    Returns:
        `[routers]`, in the order of the leaves and layers.

    Raises:
        ValueError: where no router said its probabilities.

    Example:
        >>> said = {"layers": {"q_proj": {"kernel": {"probabilities": jnp.full((2, 3, 7), 1 / 7)}}}}
        >>> loss = 0.01 * jnp.sum(jlora.losses.load_balance(said))

    Reference:
        Zhang et al. 2024, arXiv:2410.18035.
    """
    found = [leaf for keys, leaf in paths.flatten_with_keys(said)[0] if keys[-1] == "probabilities"]
    if not found:
        raise ValueError(
            "no router said its probabilities: give what jlora.lift(fn, aux=True) returns beside the result"
        )
    each = []
    for p in (p.reshape(-1, *p.shape[-2:]) for p in found):
        likeliest = jax.nn.one_hot(jnp.argmax(p, axis=-1), p.shape[-1], dtype=p.dtype)
        each.append(p.shape[-1] * jnp.sum(likeliest.mean(1) * p.mean(1), axis=-1))
    return jnp.concatenate(each)
