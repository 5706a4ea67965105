"""LoRA-Mini: LoRA whose large outer factors are constants, with small trained ones between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.method import Factors, Method, Site, Start, View, factor_labels
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class LoRAMini(Method):
    """LoRA with each factor split in two: `w + s * a_aux @ a @ b @ b_aux`, of which `a` and `b` alone are trained.

    `a_aux [in, in_width]` and `b_aux [out_width, out]` are random constants, `a [in_width, rank]` and `b [rank, out_width]`
    what is trained, and `s = alpha / rank`. So all updates of a matrix have their columns in the span of `a_aux` and their
    rows in that of `b_aux`. `b` starts at zero, so the start is the base's output. Trains
    `rank * (in_width + out_width)` values a matrix, however large it is.

    Worth trying where the optimizer's state or what is sent between machines must be small. Costs what LoRA of the same rank
    does in a step. The constants are as large as the factors of a LoRA of rank `in_width` and `out_width`, and are saved with
    the adapter, since no generator is promised to stay the same forever.

    The paper's starting values, scale and widths could not be read; those here are LoRA's, and widths for which a
    768-wide matrix trains 24 times fewer values than LoRA of the same rank (the paper says up to 20 times).

    Args:
        rank: columns of `a`; at most the smaller width.
        in_width: columns of `a_aux` (the paper's a); at most the matrix's rows.
        out_width: rows of `b_aux` (the paper's b); at most the matrix's columns.
        alpha: numerator of the scale.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, a rank above a width, or (by `adapterize`) a width above its side.

    Reference:
        Singh et al. 2024, arXiv:2411.15804.
    """

    rank: int = 8
    in_width: int = 32
    out_width: int = 32
    alpha: float = 8.0
    dropout: float = 0.0

    family: ClassVar[str] = "LoRA and its variants"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "in_width", "out_width"))
        if self.rank > min(self.in_width, self.out_width):
            raise ValueError(
                f"LoRAMini's rank {self.rank} is above its smaller width {min(self.in_width, self.out_width)}; use a "
                "smaller rank, or a larger in_width and out_width"
            )

    @property
    def scale(self) -> float:
        """`s = alpha / rank`."""
        return self.alpha / self.rank

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"a_aux": ("in", ""), "a": ("", "rank"), "b": ("rank", ""), "b_aux": ("", "out")}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    def check(self, site: Site) -> None:
        """Refuses widths above the matrix's sides, beyond which they buy nothing."""
        for name, width, side in (
            ("in_width", self.in_width, site.in_size),
            ("out_width", self.out_width, site.out_size),
        ):
            if width > side:
                raise ValueError(
                    f"{name} {width} is above that side of the {site.in_size} x {site.out_size} matrix; use {side} or less"
                )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """All factors as LoRA's `a`, by their own number of rows, but for `b`, which is zero."""
        dtype = trained_dtype(w)
        key_a_aux, key_a, key_b_aux = jax.random.split(key, 3)
        a = kaiming(key_a, (self.in_width, self.rank), dtype)
        outer = {
            "a_aux": kaiming(key_a_aux, (w.shape[0], self.in_width), dtype),
            "b_aux": kaiming(key_b_aux, (self.out_width, w.shape[1]), dtype),
        }
        return Start({"a": a, "b": jnp.zeros((self.rank, self.out_width), dtype)}, outer)

    def weight(self, view: View) -> jax.Array:
        """`w + s * a_aux @ a @ b @ b_aux`."""
        a, b = view.params["a"], view.params["b"]
        inner = view.frozen["a_aux"] @ (a @ b)
        return view.w.astype(a.dtype) + self.scale * (inner @ view.frozen["b_aux"])

    def factors(self, view: View) -> Factors:
        """`a_aux @ a` and `s * b @ b_aux`, which cost little to form."""
        a, b = view.frozen["a_aux"] @ view.params["a"], (self.scale * view.params["b"]) @ view.frozen["b_aux"]
        return Factors(a, b, dropout=self.dropout)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups of the factors."""
        return factor_labels(site, {"a": "a", "b": "b"})


LoRAMini.CASES = (LoRAMini(rank=2, in_width=5, out_width=4), LoRAMini(4, 4, 8, alpha=2, dropout=0.25))
