"""MiLoRA: LoRA at several matrices of a layer, of which a router chooses a few for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.acting import Acting
from jlora.core.products.update import Unfit
from jlora.core.protocol.hyperparameters import check_hyperparameters, check_rank, integer, one_of
from jlora.core.protocol.layers import stated_layers
from jlora.core.protocol.method import Arrays, Method, Site, Start, View, factor_labels
from jlora.methods.lora import kaiming, trained_dtype

POOLINGS = ("attention", "last", "mean", "max")
AMOUNTS = ("straight_through", "one", "probability")
#: Coefficients of powers from 0, and from 1, by which `rational` is GELU within 0.08 up to ±5 (least squares).
NUMERATOR = (-0.00265, 0.49979, 0.45242, 0.1213, -0.00034, -0.00436, -0.00045)
DENOMINATOR = (0.07786, 0.17741, 0.01902, -0.01092, 7e-05)
#: The matrices of a layer in the order of the products, by the names of Llama.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routable(Acting):
    """A LoRA that rows have or do without."""

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """That of the LoRA, and of scoring an input at the router; a prompt's choice is made once."""
        own = self.view.params
        return own["a"].shape[-1] * (rows + columns) + (rows if "pool" in own else 0)


@dataclass(frozen=True)
class MiLoRA(Method):
    """Mixture of low-rank adaptation: `x @ w + g * alpha / rank * x @ a @ b`, where `g` is 0 for what a prompt does without.

    A layer has `modules` such matrices, and one router that reads the prompt. It stands at the first (`module=0`), where of the
    inputs `x` at the prompt's tokens it makes `h`, by "attention" `Σ_t softmax(x_t @ pool)_t x_t`, and
    `p = softmax(act(h) @ router)` over the modules, `act` a trained rational function that starts near GELU. The `k` largest
    of `p` have their LoRA, for all tokens of the row; `g` is told the other matrices of the layer. This is not the MiLoRA that
    starts LoRA from minor singular vectors.

    A call says which tokens are the prompt's, `adapted.on(prompt=mask)`, or the choices themselves, `adapted.on(routing=...)`,
    as decoding keeps them: see `jlora.prompt_routed`. Says at the router `routed [rows, modules]`, the values of `g`, and
    `probabilities`. Trains
    `rank * (in + out) + (in * (modules + 1) + 12 if module == 0 else 0)` values a matrix.

    The paper's router reads the layer's input. No product of a layer does where a norm comes first, so that this one reads what
    the first matrix does. Not stated are the starts of router and pooler, here uniform in ±1/sqrt(in), and whether `g` is `p`
    (`amounts`). That the coefficients of `act` are trained on other data than the rest is left to the training loop: they are
    `numerator` and `denominator`.

    Args:
        rank: columns of `a`.
        alpha: numerator of the scale; the paper states none.
        modules: matrices of a layer.
        module: which of them this is; the first product of a layer must be that of 0.
        k: how many have their LoRA.
        pooling: "attention", "last", "mean" or "max" over the prompt's tokens.
        amounts: `g` of what is chosen: "one", which gives the router no gradient; "straight_through", 1 with the gradient of
            `p`; "probability", `p`.

    Raises:
        ValueError: for a hyperparameter out of range, and a leaf that is in no layer (by `adapterize`).

    Example:
        >>> layers = {"layers_0": params["layer"]}
        >>> adapted = jlora.adapterize(layers, jlora.MiLoRA.spec(("q_proj", "v_proj"), rank=2, k=1))

    Reference:
        Zhang et al. 2024, arXiv:2410.18035; there is no public code.
    """

    rank: int = 32
    alpha: float = 32.0
    modules: int = 7
    module: int = 0
    k: int = 3
    pooling: str = "attention"
    amounts: str = "straight_through"

    mergeable: ClassVar[bool] = False
    context: ClassVar[frozenset[str]] = frozenset({"prompt", "routing"})
    tells: ClassVar[frozenset[str]] = frozenset({"routed"})
    form = Routable

    def __post_init__(self) -> None:
        names = {"pooling": one_of(POOLINGS), "amounts": one_of(AMOUNTS), "module": integer(0)}
        check_hyperparameters(self, ("rank", "modules", "k"), names)
        if self.module >= self.modules or self.k > self.modules:
            raise ValueError(
                f"MiLoRA's module must be below its modules, and k at most these, got module={self.module}, "
                f"modules={self.modules}, k={self.k}"
            )

    @classmethod
    def spec(cls, modules: Sequence[str] = MODULES, **hyperparameters: Any) -> dict[str, MiLoRA]:
        """A spec for the matrices of every layer.

        Args:
            modules: names of the matrices in the order of the products; the router stands at the first.
            **hyperparameters: of `MiLoRA`, but `module` and `modules`.
        """
        each = [cls(modules=len(modules), module=n, **hyperparameters) for n in range(len(modules))]
        return {rf"(.*/)?{name}/kernel": method for name, method in zip(modules, each, strict=True)}

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        axes: dict[str, tuple[str, ...]] = {"a": ("in", "rank"), "b": ("rank", "out"), "number": ()}
        if self.module:
            return axes
        return {**axes, "router": ("in", ""), "pool": ("in",), "numerator": ("",), "denominator": ("",)}

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        check_rank(self, site)

    def check_context(self, context: Arrays) -> None:
        """Refuses a mask of prompts, and choices, of other shapes."""
        prompt, routing = context.get("prompt"), context.get("routing")
        if prompt is not None and prompt.ndim != 2:
            raise ValueError(f"prompt= takes a mask [rows, tokens], got shape {prompt.shape}")
        if routing is not None and (routing.ndim != 3 or routing.shape[-1] != self.modules):
            raise ValueError(
                f"routing= takes [layers, rows, modules] for {self.modules} modules, got shape {routing.shape}"
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """LoRA's start; router and pooler uniform in ±1/sqrt(in)."""
        dtype, (rows, columns) = trained_dtype(w), w.shape
        keys = jax.random.split(key, 3)
        made = {"a": kaiming(keys[0], (rows, self.rank), dtype), "b": jnp.zeros((self.rank, columns), dtype)}
        if not self.module:
            made |= {
                "router": kaiming(keys[1], (rows, self.modules), dtype),
                "pool": kaiming(keys[2], (rows, 1), dtype)[:, 0],
            }
            made |= {"numerator": jnp.array(NUMERATOR, dtype), "denominator": jnp.array(DENOMINATOR, dtype)}
        return Start(made, {"number": jnp.zeros((), jnp.int32)})

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """The number of every matrix's layer."""
        numbers = stated_layers(sites)
        return [
            replace(start, frozen={"number": jnp.asarray(n, jnp.int32)})
            for start, n in zip(starts, numbers, strict=True)
        ]

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> tuple[jax.Array, Arrays]:
        """The product, and the LoRA of rows that have it.

        Raises:
            Unfit: where no router chose before it, rows are others than those that it chose for, and nothing says which tokens
                are the prompt's.
        """
        own, said = view.params, {}
        if "routing" in view.context:
            routed = view.context["routing"].at[view.frozen["number"]].get(mode="fill", fill_value=jnp.nan)
        elif not self.module:
            routed, probabilities = self._routed(x, view)
            said = {"routed": routed, "probabilities": probabilities}
        elif "routed" in view.context:
            routed = view.context["routed"]
        else:
            raise Unfit(
                f"{view.site.path}: no router of its layer came before this product: module 0 must be the layer's first, in "
                "the same body of a loop or checkpoint"
            )
        if x.ndim != 3 or x.shape[0] != routed.shape[0]:
            raise Unfit(
                f"{view.site.path}: choices for {routed.shape[0]} rows, but an input of shape {x.shape}; wanted [rows, tokens, "
                "in]"
            )
        amounts = routed[:, self.module, None, None].astype(own["a"].dtype)
        change = amounts * self.alpha / self.rank * ((x.astype(own["a"].dtype) @ own["a"]) @ own["b"])
        return product(x).astype(change.dtype) + change, said

    def update(self, view: View) -> Routable:
        """What `apply` does."""
        return Routable(view)

    def _routed(self, x: jax.Array, view: View) -> tuple[jax.Array, jax.Array]:
        """`g` and `p`, `[rows, modules]`."""
        mask = view.context.get("prompt")
        if mask is None or mask.shape != x.shape[:-1]:
            raise Unfit(
                f"{view.site.path}: the call must say which tokens are the prompt's, on(prompt=mask) of shape {x.shape[:-1]}"
                + ("" if mask is None else f"; got {mask.shape}")
            )
        own = view.params
        h = pooled(x.astype(own["pool"].dtype), mask != 0, own["pool"], self.pooling)
        p = jax.nn.softmax(rational(h, own["numerator"], own["denominator"]) @ own["router"])
        chosen = jax.nn.one_hot(jax.lax.top_k(p, self.k)[1], self.modules, dtype=p.dtype).sum(-2)
        if self.amounts == "straight_through":
            return chosen + (p * chosen - jax.lax.stop_gradient(p * chosen)), p
        return chosen if self.amounts == "one" else p * chosen, p

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; the router learns as A does."""
        router = (
            {} if self.module else {"router": "a", "pool": "vector", "numerator": "vector", "denominator": "vector"}
        )
        return factor_labels(site, {"a": "a", "b": "b"}) | router


def pooled(x: jax.Array, mask: jax.Array, pool: jax.Array, pooling: str) -> jax.Array:
    """One vector for each row of `x [rows, tokens, in]`, of the tokens where `mask [rows, tokens]` is true. NaN for none."""
    if pooling == "last":
        last = x.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        found = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return jnp.where(jnp.any(mask, axis=1)[:, None], found, jnp.nan)
    if pooling == "max":
        found = jnp.max(jnp.where(mask[..., None], x, -jnp.inf), axis=1)
        return jnp.where(jnp.any(mask, axis=1)[:, None], found, jnp.nan)
    scores = x @ pool if pooling == "attention" else jnp.zeros(mask.shape, x.dtype)
    return jnp.einsum("rt,rti->ri", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), x)


def rational(x: jax.Array, numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """`Σ_j n_j x^j / (1 + |Σ_i d_i x^i|)`, `j` from 0 and `i` from 1."""
    return jnp.polyval(numerator[::-1], x) / (1 + jnp.abs(x * jnp.polyval(denominator[::-1], x)))
