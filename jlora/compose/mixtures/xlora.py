"""X-LoRA: trained adapters side by side, mixed at every token by a classifier of the base's hidden states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.compose.bank import Bank, Source
from jlora.compose.mixtures.experts import Experts, mixture
from jlora.core.products.contraction import drop
from jlora.core.products.slots import Slots
from jlora.core.products.update import Unfit
from jlora.core.protocol.hyperparameters import BELOW_ONE, NOT_ZERO, POSITIVE, check_hyperparameters, integer, number
from jlora.core.protocol.method import Arrays, Site, Start, View
from jlora.core.tree.adapted import Adapted
from jlora.methods.lora import kaiming, shared_dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled(Slots):
    """A bank's slots, of which a call mixes all by numbers."""

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """That of all slots."""
        return self.a.shape[0] * self.a.shape[2] * (rows + columns)

    def _check_chosen(self) -> None:
        if self.weights is None:
            raise Unfit(
                f"{self.name}: the call must say the adapters' amounts: run the function by jlora.two_passes, or give "
                "on(scalings=...)"
            )


@dataclass(frozen=True)
class XLoRA(Experts):
    """Adapters mixed by numbers that a call tells: `w + Σ_s m_s * scale_s * a_s @ b_s` over all of them.

    `on(scalings=m)`, numbers `[rows, tokens, layers, slots]` (or without tokens, or rows), of which each matrix takes its
    place in `layers`; where `layers` is 1, all take the same. They are made by a classifier that all matrices share:
    `depth` linear maps with ReLU between, from `width` over `size` to `layers * slots`. Trains
    `len(names) * rank * (in + out) if train_adapters else 0` values a matrix. Shares
    `len(names) * layers * ((width if depth == 1 else size) + 1)
    + (0 if depth == 1 else (width + 1 + (depth - 2) * (size + 1)) * size)` trained values.

    Args:
        names, rank, train_adapters: see `Experts`.
        width: of the hidden states.
        layers: the number of matrices that have numbers of their own, or 1.
        depth: linear maps of the classifier.
        size: width between them.
        dropout: probability of dropping an entry behind each ReLU, where a key is given.
        softmax: whether the numbers are a softmax over the adapters.
        temperature: of that softmax.
        top_k: how many of the numbers are kept, the largest; others become 0.
        softmax_top_k: whether the numbers that are not 0 then go through a softmax.
        pass_value: the number of all adapters in the first pass.
        factor: of all numbers in the second.

    Raises:
        ValueError: for a hyperparameter out of range.

    Reference:
        Buehler and Buehler 2024, arXiv:2402.07148; formula and defaults as in PEFT.
    """

    width: int = 8
    layers: int = 1
    depth: int = 1
    size: int = 2048
    dropout: float = 0.2
    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    softmax_top_k: bool = False
    pass_value: float = 0.0
    factor: float = 1.0

    context: ClassVar[frozenset[str]] = frozenset({"scalings"})
    form = Scaled

    def __post_init__(self) -> None:
        super().__post_init__()
        share = number(math.isfinite, "a finite number")
        bounds = {"temperature": POSITIVE, "dropout": BELOW_ONE, "factor": NOT_ZERO, "pass_value": share}
        whole = integer(1, "a positive whole number")
        check_hyperparameters(self, ("width", "layers", "depth", "size"), {**bounds, "top_k": whole})
        if self.top_k is not None and self.top_k > self.slots:
            raise ValueError(f"XLoRA's top_k must be at most the number of adapters, {self.slots}, got {self.top_k}")
        if self.top_k is not None and self.pass_value:
            raise ValueError(
                f"XLoRA's pass_value {self.pass_value} is the number of all adapters, of which top_k={self.top_k} can't "
                "choose; let it be 0"
            )

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {**super().axes, "number": ()}

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """The classifier: kernels `w_n [in, out]` and biases `b_n [out]`."""
        return tuple(f"{name}_{n}" for n in range(self.depth) for name in "wb")

    def check_context(self, context: Arrays) -> None:
        """Refuses numbers of another shape than the classifier gives."""
        m = context.get("scalings")
        if m is None:
            return
        wanted = (self.layers, self.slots)
        if m.ndim not in (2, 3, 4) or m.shape[-2:] != wanted or not jnp.issubdtype(m.dtype, jnp.floating):
            raise ValueError(
                "scalings= takes numbers [rows, tokens, layers, slots], [rows, layers, slots] or [layers, slots] for "
                f"{wanted[0]} layers and {wanted[1]} slots; got {m.dtype} of shape {m.shape}"
            )

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Start:
        """The classifier, kernels and biases uniform in ±1/sqrt(in)."""
        sizes = [self.width, *[self.size] * (self.depth - 1), self.layers * self.slots]
        dtype, made = shared_dtype(sites), {}
        for n, (rows, columns) in enumerate(pairwise(sizes)):
            kernel, bias = jax.random.split(jax.random.fold_in(key, n))
            made[f"w_{n}"] = kaiming(kernel, (rows, columns), dtype)
            made[f"b_{n}"] = kaiming(bias, (rows, columns), dtype)[0]
        return Start(made)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """That of the factors, and the matrix's place in `layers`, which `together` fills in."""
        start = super().start(key, w, site)
        return Start(start.params, {**start.frozen, "number": jnp.zeros((), jnp.int32)})

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """Places in the order of the leaves, and in a stack of its axes."""
        found, first = [], 0
        for start, site in zip(starts, sites, strict=True):
            count = math.prod(site.batch_shape) if self.layers > 1 else 0
            places = first + np.arange(count).reshape(site.batch_shape) if count else np.zeros(site.batch_shape)
            found.append(replace(start, frozen={**start.frozen, "number": jnp.asarray(places, jnp.int32)}))
            first += count
        return found

    def weight(self, view: View) -> jax.Array:
        """That of numbers that are the same for all tokens."""
        return self.update(view).chosen("weight").weight(view.w)

    def update(self, view: View) -> Scaled:
        """The adapters, and the matrix's own numbers where the call tells some."""
        m = view.context.get("scalings")
        m = None if m is None else m.at[..., view.frozen["number"], :].get(mode="fill", fill_value=jnp.nan)
        return Scaled(*self.experts(view), None, None, m, 0 if m is None else m.ndim - 1, view.site.path)

    def scalings(self, classifier: Arrays, hidden: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The numbers `[..., layers, slots]` of hidden states `[..., width]`, with what `top_k` and the factor make of them."""
        z = hidden.astype(classifier["w_0"].dtype)
        for n in range(self.depth):
            z = z @ classifier[f"w_{n}"] + classifier[f"b_{n}"]
            if n < self.depth - 1:
                z = drop(jax.nn.relu(z), self.dropout, None if key is None else jax.random.fold_in(key, n))
        m = z.reshape(*z.shape[:-1], self.layers, self.slots)
        return self.kept(jax.nn.softmax(m / self.temperature) if self.softmax else m)

    def kept(self, m: jax.Array) -> jax.Array:
        """What `top_k`, `softmax_top_k` and the factor make of numbers `[..., slots]`."""
        if self.top_k is not None:
            chosen = jax.lax.top_k(m, self.top_k)[1]
            m = m * jax.nn.one_hot(chosen, self.slots, dtype=m.dtype).sum(-2)
        if not self.softmax_top_k:
            return self.factor * m
        kept = m != 0
        most = jax.lax.stop_gradient(jnp.max(jnp.where(kept, m, -jnp.inf), axis=-1, keepdims=True, initial=-1e30))
        shares = jnp.where(kept, jnp.exp(jnp.where(kept, m - most, 0)), 0)
        return self.factor * shares / jnp.maximum(shares.sum(-1, keepdims=True), jnp.finfo(m.dtype).tiny)


def xlora(
    params: Any,
    adapters: Mapping[str, Source] | Bank,
    width: int,
    *,
    layerwise: bool = False,
    depth: int = 1,
    size: int = 2048,
    dropout: float = 0.2,
    softmax: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    softmax_top_k: bool = False,
    pass_value: float = 0.0,
    factor: float = 1.0,
    train_adapters: bool = False,
    key: jax.Array | None = None,
    names: Any = None,
) -> Adapted:
    """X-LoRA: puts trained adapters side by side, mixed at every token by numbers made of the base's last hidden states.

    At a matrix `w` an input `x` gives `x @ w + Σ_s m_s * scale_s * (x @ a_s) @ b_s` over all adapters. The model is run twice,
    by `jlora.two_passes`: first without the adapters, then with the numbers `m` that a classifier makes of the hidden states of
    the first pass, for each row and token. The classifier is what is trained; it lies in `adapted.params["~shared"]`. It is
    `depth` linear maps with ReLU between, their results over `temperature` through a softmax over the adapters.

    Defaults are PEFT's, whose names of the settings are in brackets.

    Args:
        params: the base.
        adapters: as for `jlora.meteora`; with a gain none is taken.
        width: of the hidden states (`hidden_size`).
        layerwise: every matrix has numbers of its own, in place of one set for all (`layerwise_scalings`).
        depth: linear maps of the classifier (`xlora_depth`).
        size: width between them (`xlora_size`).
        dropout: probability of dropping an entry behind each ReLU, where a key is given (`xlora_dropout_p`).
        softmax: whether there is a softmax (`enable_softmax`).
        temperature: of it (`softmax_temperature`).
        top_k: keep the largest numbers alone, others become 0; None keeps all (`top_k_lora`).
        softmax_top_k: a softmax of the numbers that are not 0 (`enable_softmax_topk`). With `top_k=1` that is 1 whatever the
            classifier says, so that nothing trains it.
        pass_value: every adapter's number in the first pass (`scaling_pass_value`).
        factor: of all numbers (`global_scaling_weight`).
        train_adapters: train the adapters' factors too (`use_trainable_adapters`).
        key: of the classifier's start, uniform in ±1/sqrt(in).
        names: which torch parameter a leaf is, for folders in PEFT's format.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: as `jlora.meteora`, and for a setting out of range.

    Example:
        >>> spec = {r".*/q_proj/kernel": jlora.LoRA(4)}
        >>> sql, chat = (jlora.adapterize(params, spec, jax.random.key(seed)) for seed in range(2))
        >>> adapted = jlora.xlora(params, {"sql": sql, "chat": chat}, width=16)
        >>> apply = jlora.lift(model.apply)  # whose results stand for hidden states here
        >>> logits = jlora.two_passes(apply, hidden=apply)({"params": adapted}, tokens)

    Reference:
        Buehler and Buehler 2024, arXiv:2402.07148; formula and defaults as in PEFT.
    """
    classifier = (depth, size, dropout, softmax, temperature, top_k, softmax_top_k, pass_value, factor)

    def method(names: tuple[str, ...], rank: int, matrices: int) -> XLoRA:
        return XLoRA(names, rank, train_adapters, width, matrices if layerwise else 1, *classifier)

    return mixture(params, adapters, method, key, names)
