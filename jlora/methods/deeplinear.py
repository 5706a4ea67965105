"""Compressed deep linear networks as an adapter: deep factors that start along the gradient's first directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import POSITIVE, check_hyperparameters, check_rank, integer
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Factors, Method, Site, Start, View, factor_labels
from jlora.methods.deeplora import check_sixteen_bits, first_directions
from jlora.methods.lora import trained_dtype


@dataclass(frozen=True)
class DeepLinear(Method):
    """A compressed deep linear network: `w + f1 @ f2 @ f3`, which starts at `eps**depth` along the first gradient.

    There are `depth` factors: `f1 [in, rank]`, the last `[rank, out]`, and `[rank, rank]` between. Where the loss wants the
    weight to go is the negative gradient, `-g = u S v.T`. Of its first `rank` singular vectors the start has `f1 = eps * u`,
    the last `eps * v.T`, and `eps` times the identity between; the singular values are not used. The two outer factors learn
    at `gamma` times the learning rate. So it starts from a gradient, `jlora.prepare(params, spec, loss_fn, batches)`, of as
    many batches as may be had. Trains `rank * (in + out) + (depth - 2) * rank * rank` values a matrix. There is no scale.

    The start is the base's output to `eps**depth`, 1e-6 by default; factors and update are float32 or wider. Gradients start
    at `eps**(depth - 1)`: use Adam, or a large rate.

    Beside `DeepLoRA(compressed=True)`, which compresses a deep product too: there both bases span the invariant subspace of a
    wide product that is drawn at random, of twice as many dimensions as it takes from the gradient, lie outside of the
    `depth` square factors, are of length 1 and move slower than these or not at all. Here the bases are themselves the outer
    ones of the `depth` factors, as small as the others, all their directions are the gradient's, and they move faster. So this
    starts where one step of gradient descent would go. Worth trying where the first gradient is telling: many rows of data, an
    update that is known to be of low rank.

    The paper fits matrices (factorization, completion, sensing) from a surrogate of the target; with a loss of half the squared
    error the negative gradient at zero is that surrogate, up to a factor. Its use on a pretrained weight is jlora's.

    Args:
        rank: inner width; at most the smaller side of the matrix. The paper's runs have twice the rank that they look for.
        depth: number of factors, at least 2.
        eps: size of each factor at the start. (The authors' runs of depth 2 have 1, which starts far from the base.)
        gamma: the learning rate of the two outer factors as a multiple of that of the others (the paper's alpha).
        iterations: 0 for an exact SVD of the gradient; k > 0 for a randomised one with k subspace iterations.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.DeepLinear(rank=8)}
        >>> loss_fn = lambda params, tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)
        >>> prepared = jlora.prepare(params, spec, loss_fn, [tokens], key=key)
        >>> adapted = jlora.adapterize(params, spec, key=key, prepared=prepared)

    Reference:
        Kwon et al. 2023, arXiv:2311.05061.
    """

    rank: int = 8
    depth: int = 3
    eps: float = 1e-2
    gamma: float = 2.0
    iterations: int = 0

    family: ClassVar[str] = "LoRA and its variants"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    # As SHiRA's: the directions of a mean gradient hold for more rows than those of one batch.
    recipe: ClassVar[Recipe] = Recipe(batches=8)

    def __post_init__(self) -> None:
        bounds = {"rank": integer(1), "depth": integer(2), "iterations": integer(0), "eps": POSITIVE, "gamma": POSITIVE}
        check_hyperparameters(self, bounds=bounds)

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """Whether the start is the base's output to about single precision."""
        return self.eps**self.depth < 2e-6

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        names = [f"f{number}" for number in range(1, self.depth + 1)]
        return {**dict.fromkeys(names, ("rank", "rank")), names[0]: ("in", "rank"), names[-1]: ("rank", "out")}

    @property
    def alike(self) -> frozenset[str]:
        """The square factors start at `eps` times the identity."""
        return frozenset(name for name, roles in self.axes.items() if roles == ("rank", "rank"))

    @property
    def needs(self) -> frozenset[str]:
        """The gradient."""
        return frozenset({"gradient"})

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides, and float16, for which the first gradients are zero."""
        check_rank(self, site)
        check_sixteen_bits(self.eps**self.depth, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """The first singular vectors of the negative gradient outside, the identity inside, all times `eps`."""
        dtype = trained_dtype(w)
        u, v = first_directions(key, -statistics["gradient"].astype(dtype), self.rank, self.iterations)
        inner = dict.fromkeys(self.alike, self.eps * jnp.eye(self.rank, dtype=dtype))
        return Start({"f1": self.eps * u, **inner, f"f{self.depth}": self.eps * v.T})

    def weight(self, view: View) -> jax.Array:
        """`w + f1 @ f2 @ f3`."""
        return self.factors(view).weight(view.w)

    def factors(self, view: View) -> Factors:
        """The first factor, and the product of all the others."""
        names = list(self.axes)
        b = view.params[names[-1]]
        for name in reversed(names[1:-1]):
            b = view.params[name] @ b
        return Factors(view.params["f1"], b)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups: the last factor is a `b`, all others are `a`s."""
        return factor_labels(site, {**dict.fromkeys(self.axes, "a"), f"f{self.depth}": "b"})

    def rates(self, site: Site) -> dict[str, float]:
        """`gamma` for the outer factors."""
        return {"f1": self.gamma, f"f{self.depth}": self.gamma}


DeepLinear.CASES = (DeepLinear(rank=4), DeepLinear(rank=2, depth=4, eps=0.25, gamma=0.5, iterations=4))
