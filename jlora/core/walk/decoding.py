"""Where leaves that are kept in the form of a code are decoded: inside of the product that uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jlora.core.walk.weight import Weight


def decoding(use: Callable[..., Any], values: Any) -> Callable[..., Any]:
    """A function of some values, among them weights, that decodes those which are kept as a code anew in every pass.

    Kept from the forward to the backward pass, decoded matrices would cost a dense copy of the model. The codes are tied to the
    other operands: else a compiler is free to decode all layers before the first of them is used.
    """
    if not any(_is_coded(value) for value in jax.tree.leaves(values, is_leaf=_is_weight)):
        return use

    def tied(*values: Any) -> Any:
        flat, treedef = jax.tree.flatten(values, is_leaf=_is_weight)
        # No gradient goes through the tie: codes have none, and the operands go their own way.
        operands = [jax.lax.stop_gradient(value) for value in flat if not _is_weight(value)]
        codes = [(value.codes, value.common) if _is_coded(value) else () for value in flat]
        codes = jax.lax.optimization_barrier((operands, codes))[1]
        flat = [replace(value, codes=c[0], common=c[1]) if c else value for value, c in zip(flat, codes, strict=True)]
        return use(*jax.tree.unflatten(treedef, flat))

    return jax.checkpoint(tied)


def _is_weight(value: Any) -> bool:
    return isinstance(value, Weight)


def _is_coded(value: Any) -> bool:
    return isinstance(value, Weight) and value.code is not None
