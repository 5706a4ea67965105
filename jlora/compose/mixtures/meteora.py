"""MeteoRA: trained adapters side by side, of which a gate at every matrix gives each token the few that it uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.compose.bank import Bank, Source
from jlora.compose.mixtures.experts import Experts, mixture
from jlora.core.products.of_tokens import OfTokens
from jlora.core.protocol.hyperparameters import POSITIVE, check_hyperparameters, integer
from jlora.core.protocol.method import Arrays, Site, Start, View
from jlora.core.tree.adapted import Adapted
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class MeteoRA(Experts):
    """A gate that chooses among adapters for every token: `x @ w + Σ_j g_j * scale_j * (x @ a_j) @ b_j` over `k` of them.

    With `l = x @ gate`, `gate [in, slots]`, these are the `k` adapters with the largest logits, and `g = softmax(l / tau)`
    over them alone. Says its logits, as `gate_logits [..., slots]`. Trains
    `len(names) * (in + (rank * (in + out) if train_adapters else 0))` values a matrix.

    Args:
        names: those of the adapters; the place of a name is its slot.
        rank: columns of every `a_s`.
        train_adapters: whether the factors are trained beside the gates.
        k: adapters that a token uses.
        tau: temperature of the amounts; the choice does not depend on it.

    Raises:
        ValueError: for a hyperparameter out of range, and more choices than adapters.

    Reference:
        Xu et al. 2024, arXiv:2405.13053.
    """

    k: int = 2
    tau: float = 1.0

    mergeable: ClassVar[bool] = False
    form = OfTokens

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hyperparameters(self, bounds={"k": integer(1), "tau": POSITIVE})
        if self.k > self.slots:
            raise ValueError(f"MeteoRA's k must be at most the number of adapters, {self.slots}, got {self.k}")

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {**super().axes, "gate": ("in", "")}

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """The gate uniform in ±1/sqrt(in)."""
        key, key_gate = jax.random.split(key)
        start = super().start(key, w, site)
        gate = kaiming(key_gate, (w.shape[0], self.slots), trained_dtype(w))
        return Start({**start.params, "gate": gate}, start.frozen)

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> tuple[jax.Array, Arrays]:
        """The formula, over all adapters with amounts of zero for those that are not chosen."""
        a, b = self.experts(view)
        logits, chosen, amounts = self.update(view).choices(x)
        shares = jnp.sum(jax.nn.one_hot(chosen, self.slots) * amounts[..., None], axis=-2)
        change = jnp.einsum("...s,...i,sir,sro->...o", shares, x.astype(a.dtype), a, b)
        return product(x).astype(change.dtype) + change, {"gate_logits": logits}

    def update(self, view: View) -> OfTokens:
        """The adapters and the gate."""
        return OfTokens(*self.experts(view), view.params["gate"], self.k, self.tau, view.site.path)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; the gate learns as A does."""
        return {**super().labels(site), "gate": "a"}


def meteora(
    params: Any,
    adapters: Mapping[str, Source] | Bank,
    k: int = 2,
    *,
    tau: float = 1.0,
    train_adapters: bool = False,
    key: jax.Array | None = None,
    names: Any = None,
) -> Adapted:
    """MeteoRA: puts trained adapters side by side, with a gate at every matrix by which each token uses `k` of them.

    At a matrix `w` an input `x` gives `x @ w + Σ_j g_j * s_j * (x @ a_j) @ b_j`, where `j` runs over the `k` largest of the
    logits `l = x @ gate`, and `g = softmax(l / tau)` over these. The gates are to be trained: by the task's loss, for which
    `k` must be 2 or more, since one choice has the amount 1 whatever its logit; and by `jlora.losses.gate_cross_entropy` of
    the logits, which `jlora.lift(fn, aux=True)` returns, against the adapter that each token should use.

    What it does is no change of a weight: it can't be merged, and stands at products `x @ w` alone.

    Args:
        params: the base.
        adapters: by name, each an `Adapted`, a directory, or a folder in PEFT's format; or a `Bank`, whose factors are copied.
            What can be in a bank can be here, but what has a gain. Ranks and leaves may differ: an adapter that leaves a
            matrix alone can be chosen there, and changes nothing. The place of a name is the adapter's slot, and its label.
        k: adapters that a token uses at a matrix.
        tau: temperature; the authors have 15 to 30 for texts of several tasks.
        train_adapters: train the adapters' factors too, as the authors' script does. Else they stay as they are.
        key: of the gates' start, uniform in ±1/sqrt(in).
        names: which torch parameter a leaf is, for folders in PEFT's format: `jlora.models.peft_names(model)`.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: as `Bank.of`, for adapters with a gain, such as DoRA, and for `k` above their number.

    Example:
        >>> spec = {r".*/q_proj/kernel": jlora.LoRA(4)}
        >>> sql, chat = (jlora.adapterize(params, spec, jax.random.key(seed)) for seed in range(2))
        >>> adapted = jlora.meteora(params, {"sql": sql, "chat": chat}, k=1)
        >>> logits, said = jlora.lift(model.apply, aux=True)({"params": adapted}, tokens)
        >>> gates = jlora.losses.gate_cross_entropy(said, jnp.zeros_like(tokens))

    Reference:
        Xu et al. 2024, arXiv:2405.13053.
    """

    def method(names: tuple[str, ...], rank: int, matrices: int) -> MeteoRA:
        return MeteoRA(names, rank, train_adapters, k, tau)

    return mixture(params, adapters, method, key, names)


MeteoRA.CASES = (
    MeteoRA(("sql", "chat"), rank=2, train_adapters=True),
    MeteoRA(("sql", "chat", "code"), rank=2, train_adapters=True, tau=2.0),
)
