"""The optimizers that a run can name, each as a factory with AdamW's arguments: a rate and a decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

import jlora
from jlora import paths
from jlora.core.tree.adapted import SHARED

Factory = Callable[..., optax.GradientTransformation]
# The root mean square of a step of Muon, as that of AdamW usually is: so both take the same rates (Liu et al. 2025,
# arXiv:2502.16982).
_MUON_RMS = 0.2


def adafactor(learning_rate: Any, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Adafactor with a rate that is given: steps are not scaled by the arrays' own size, since adapters start at zero.

    Second moments of matrices with two sides of 128 or more are kept as those of rows and columns; steps are clipped to a
    root mean square of 1, and decay is AdamW's.

    Reference:
        Shazeer & Stern 2018, arXiv:1804.04235.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion(learning_rate: Any, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Lion: steps are signs, so that its rates are lower than AdamW's (Chen et al. 2023, arXiv:2302.06675)."""
    return optax.lion(learning_rate, weight_decay=weight_decay)


def muon(adapted: jlora.Adapted) -> Factory:
    """Muon for the matrices that `adapted` trains, each of a stack by itself; for everything else, embeddings
    included, AdamW with Nesterov momentum.

    Reference:
        Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    from optax.contrib import MuonDimensionNumbers
    from optax.contrib import muon as make

    stacked = {site.keys: len(site.batch_axes) for site in adapted.plan.sites if site.kind != "gather"}

    def axes(keys: tuple[str, ...], leaf: Any) -> Any:
        batch = (
            0 if keys[0] == SHARED else next((stacked[keys[:n]] for n in range(len(keys)) if keys[:n] in stacked), None)
        )
        return MuonDimensionNumbers(batch, batch + 1) if batch is not None and leaf.ndim - batch == 2 else None

    def numbers(trained: Any) -> Any:
        leaves, treedef = paths.flatten_with_keys(trained)
        return jax.tree.unflatten(treedef, [axes(keys, leaf) for keys, leaf in leaves])

    def factory(learning_rate: Any, weight_decay: float = 0.0) -> optax.GradientTransformation:
        decay: dict[str, Any] = {"weight_decay": weight_decay, "adam_weight_decay": weight_decay}
        return make(learning_rate, muon_weight_dimension_numbers=numbers, consistent_rms=_MUON_RMS, **decay)

    return factory


def factory_of(name: str, adapted: jlora.Adapted) -> Factory:
    """The factory of an optimizer's name."""
    if name == "muon":
        return muon(adapted)
    return {"adamw": optax.adamw, "lion": lion, "adafactor": adafactor}[name]
