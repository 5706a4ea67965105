"""LoKr: an update that is the Kronecker product of two small matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.added import Added
from jlora.core.protocol.hyperparameters import NOT_ZERO, check_hyperparameters, number, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import kaiming, trained_dtype

_FACTOR = number(lambda v: isinstance(v, int) and (v == -1 or v > 0), "-1, or a positive whole number")


@dataclass(frozen=True)
class LoKr(Method):
    """Low-rank Kronecker product adaptation: `w + (alpha / rank) * kron(w1, w2)`, with `w1 [i1, o1]`, `w2 [i2, o2]`.

    `i1 * i2 = in` and `o1 * o2 = out`, each pair as close to each other as can be, the smaller first. Where `rank` is below
    half of the larger side of `w2`, that is a product `a2 [i2, rank] @ b2 [rank, o2]`; with `decompose_both` so is `w1`.
    `w1` or `b1` starts at zero (with "lycoris" `w2` or `a2`), so the start is the base's output. The scale is `alpha /
    rank` even where no factor has that rank. Trains `number(in, out)` values.

    Very few values, in an update of full rank; two small products instead of the large one.

    Args:
        rank: inner width of the factors that are products.
        alpha: numerator of the scale.
        decompose_both: whether `w1` may be a product too.
        decompose_factor: the smaller of the two sizes of a side, where it divides it, and at most that where it does not;
            -1 for the square root.
        init: "default", or "lycoris", where `w2` starts at zero in the place of `w1`.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoKr(rank=8)})

    Reference:
        Edalati et al. 2022, arXiv:2212.10650; LyCORIS, Yeh et al. 2023, arXiv:2309.14859; sizes and starts as in PEFT.
    """

    rank: int = 8
    alpha: float = 8.0
    decompose_both: bool = False
    decompose_factor: int = -1
    init: str = "default"

    family: ClassVar[str] = "Structured updates"
    form: ClassVar[type[Added]] = Added
    optional: ClassVar[frozenset[str]] = frozenset({"w1", "a1", "b1", "w2", "a2", "b2"})
    recipe: ClassVar[Recipe] = Recipe(rank=8)

    # PEFT drops output rows, or whole modules, in training where these are on.
    peft_kind: ClassVar[PeftKind] = PeftKind(
        "LOKR",
        tensors=(
            PeftTensor("lokr_w1", "w1", "transposed"),
            PeftTensor("lokr_w1_a", "b1", "transposed"),
            PeftTensor("lokr_w1_b", "a1", "transposed"),
            PeftTensor("lokr_w2", "w2", "transposed"),
            PeftTensor("lokr_w2_a", "b2", "transposed"),
            PeftTensor("lokr_w2_b", "a2", "transposed"),
        ),
        settings=(
            PeftSetting("r", "rank", 8, pattern="rank_pattern"),
            PeftSetting("alpha", "alpha", 8.0, pattern="alpha_pattern"),
            PeftSetting("decompose_both", "decompose_both", False),
            PeftSetting("decompose_factor", "decompose_factor", -1),
        ),
        unused=("use_effective_conv2d", "rank_dropout_scale"),
        training=("rank_dropout", "module_dropout"),
    )

    def __post_init__(self) -> None:
        bounds = {"alpha": NOT_ZERO, "decompose_factor": _FACTOR, "init": one_of(("default", "lycoris"))}
        check_hyperparameters(self, ("rank",), bounds)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Of all that a matrix may have; which of them it has depends on its sizes. A part of a side is no slice of it."""
        return dict.fromkeys(("w1", "a1", "b1", "w2", "a2", "b2"), ("", ""))

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, int]]:
        """The factors of a matrix `[rows, columns]` by name."""
        (i1, i2), (o1, o2) = (divided(side, self.decompose_factor) for side in (rows, columns))
        found: dict[str, tuple[int, int]] = {}
        for n, (i, o), may in (("1", (i1, o1), self.decompose_both), ("2", (i2, o2), True)):
            parts = may and self.rank < max(i, o) / 2
            found |= {f"a{n}": (i, self.rank), f"b{n}": (self.rank, o)} if parts else {f"w{n}": (i, o)}
        return found

    def number(self, rows: int, columns: int) -> int:
        """Values of a matrix `[rows, columns]`."""
        return sum(map(math.prod, self.shapes(rows, columns).values()))

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Uniform within the bounds of torch's linear layers, but for the factor that is zero."""
        shapes, dtype = self.shapes(*w.shape), trained_dtype(w)
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        drawn = {name: kaiming(keys[name], shape, dtype) for name, shape in shapes.items()}
        return Start(drawn | {name: jnp.zeros(shapes[name], dtype) for name in self._zeros & shapes.keys()})

    def weight(self, view: View) -> jax.Array:
        """`w + (alpha / rank) * kron(w1, w2)`."""
        w1, w2 = _pair(view.params)
        update = jnp.kron(w1, w2)
        return view.w.astype(update.dtype) + self.alpha / self.rank * update

    def update(self, view: View) -> Added:
        """Formed for the input, cut into pieces for the gradients of its own arrays."""
        return Added(view)

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """The base's product and that of `x [.., i1, i2]` with `w2`, then with `w1`; the Kronecker product is never formed."""
        y, (w1, w2) = product(x), _pair(view.params)
        z = x.reshape(*x.shape[:-1], w1.shape[0], w2.shape[0])
        z = jnp.einsum("...io,ip->...po", z @ w2.astype(x.dtype), (self.alpha / self.rank * w1).astype(x.dtype))
        return y + z.reshape(y.shape).astype(y.dtype)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups: what starts at zero is this method's B."""
        return {name: "b" if name in self._zeros else "a" for name in self.shapes(site.in_size, site.out_size)}

    @property
    def _zeros(self) -> set[str]:
        """The factor that starts at zero: the whole one, or the last of a product."""
        return {"w1", "b1"} if self.init == "default" else {"w2", "a2"}


def divided(side: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is a side, the smaller first.

    As close to each other as can be, with the smaller at most `factor` if that is positive; `factor` itself is the first
    where it divides the side, also if it is the larger.
    """
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    most = math.isqrt(side) if factor == -1 else min(factor, math.isqrt(side))
    small = max(n for n in range(1, most + 1) if side % n == 0)
    return small, side // small


def _pair(params: Arrays) -> tuple[jax.Array, jax.Array]:
    """`w1` and `w2`, multiplied out where they are products."""
    w1, w2 = (
        params[f"w{n}"] if f"w{n}" in params else jnp.matmul(params[f"a{n}"], params[f"b{n}"], precision="highest")
        for n in "12"
    )
    return w1, w2


LoKr.CASES = (LoKr(rank=1, alpha=3.0), LoKr(rank=1, decompose_both=True, init="lycoris"))
