"""The seam between methods and the core: a form of update, a value that owns how a weight in that form is used.

A method gives its effective weight as such a value (`Method.update`). Products, lookups, convolutions, experts, norms and
costs ask the value, so that nothing else knows which forms there are. A new form is one file with a subclass of `Update`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax

from jlora.core.products.contraction import Options


@dataclass(frozen=True)
class Linear:
    """A use that is linear in its matrix, such as a convolution, as a form sees it.

    Attributes:
        base: `(x, dtype)`: the use of the base's matrix `w [in, out]`.
        product: `(x, m [in, k], dtype)`: the same use of another matrix, of any width.
        mix: `(y, m [k, n], dtype)`: multiplies the features of such a result by a matrix.
        rescale: `(y, scale [out])`: multiplies each of them by a number.
        out_dtype: dtype of the result.
        rows: rows of the batch that the use keeps apart; None where it knows of none.
        rescale_rows: `(y, scale [rows, k])`: multiplies the features of each row by numbers of its own; in groups of features,
            each of `k`, all by the same.
    """

    base: Callable[[jax.Array, Any], jax.Array]
    product: Callable[[jax.Array, jax.Array, Any], jax.Array]
    mix: Callable[[jax.Array, jax.Array, Any], jax.Array]
    rescale: Callable[[jax.Array, jax.Array], jax.Array]
    out_dtype: Any
    rows: int | None = None
    rescale_rows: Callable[[jax.Array, jax.Array], jax.Array] | None = None


class Unfit(ValueError):
    """A use that a form refuses, with the path of the leaf; the walk adds the place in the function."""


class Update(abc.ABC):
    """The effective weight `v [in, out]` as data beside the base's matrix `w [in, out]`, with its uses.

    A subclass is a frozen dataclass of arrays, registered as a pytree (`jax.tree_util.register_dataclass`); what is no array
    is a static field. It has `dense`, `times` and `cost`, and of the other uses those that it can do without forming `v`.
    For any other the core forms it, by the method's `weight`. In all of them `x` is a float of 16 bits or more, and `key` the
    dropout key or None.

    Class attributes:
        drops: the uses in which a dropout key acts; with a key the others are refused.
        draws: whether a key may decide what becomes of a leaf beside, so that only the product itself can tell.
        alone: the uses that the form has for a method that no weight can stand for.
        refuses_forming: whether `lift(strict=True)` refuses to form the weight, for forms that are made to avoid it.
        chains: whether `dense` and `transposed` take the base's matrix as a `Chain` too.
        sums_matrices: whether the gradients of its arrays are read off a dense gradient of the weight, for which a mesh that
            cuts rows then needs `jlora.core.products.by_rows`.
    """

    drops: ClassVar[frozenset[str]] = frozenset({"dense", "transposed"})
    draws: ClassVar[bool] = False
    alone: ClassVar[frozenset[str]] = frozenset({"dense"})
    refuses_forming: ClassVar[bool] = False
    chains: ClassVar[bool] = False
    sums_matrices: ClassVar[bool] = False

    @classmethod
    def owns(cls, use: str) -> bool:
        """Whether the form has a use of its own by that name."""
        return getattr(cls, use) is not getattr(Update, use)

    @abc.abstractmethod
    def times(self, number: jax.Array) -> Self:
        """The update that beside `number * w` stands for `number * v`; the fields may have batch axes in front."""

    @abc.abstractmethod
    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """Multiply-adds that it adds to those of the base's matrix `[rows, columns]`, for one row of input or one `lookup`."""

    @abc.abstractmethod
    def dense(self, x: jax.Array, w: Any, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., in] @ v`.

        Args:
            x: the activation.
            w: the base's matrix `[in, out]`, as the function has it; with `chains` it may be a `Chain`.
            key: dropout key.
            options: dtype of the result, precision, and the plan that `lift` was asked for.
        """

    def spoken(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> tuple[jax.Array, Any]:
        """`dense`, and what the method says beside it: a dict of arrays. `x`, `w`, `key` and `options` as there."""
        raise NotImplementedError

    def transposed(self, x: jax.Array, w: Any, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., out] @ v.T`: the use of a tied embedding as the head. `w`, `key` and `options` as for `dense`."""
        raise NotImplementedError

    @staticmethod
    def together(x: jax.Array, members: Sequence[tuple[jax.Array, Any]], options: Options) -> list[jax.Array]:
        """`x [..., in] @ v` for several members `(w, update)` of this form (q, k and v), without dropout."""
        raise NotImplementedError

    def lookup(self, base: jax.Array, w: jax.Array, take: Callable[[jax.Array], jax.Array], side: str) -> jax.Array:
        """Rows of `v`, `[*positions, out]`; for the side "out" its columns, `[*positions, in]`. Without dropout.

        Args:
            base: the rows, or columns, of `w`.
            w: the base's matrix.
            take: the same rows of another table: `[in or out, k]` to `[*positions, k]`.
            side: "in" or "out".
        """
        raise NotImplementedError

    def beyond(self) -> jax.Array | None:
        """Rows `[number, out]` that ids from `in` on look up, beyond the last row of `v`; None where there are none."""
        return None

    def convolve(self, x: jax.Array, w: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """A convolution of `x` with `v`.

        Args:
            x: the activation, in the function's axis order.
            w: the base's matrix, the kernel's taps among its rows; in feature groups the rows of one group.
            key: dropout key.
            linear: the convolution, as a map that is linear in its kernel.
        """
        raise NotImplementedError

    def experts(self, x: jax.Array, w: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """The rows of `x` in groups, each with its expert's `v`.

        Args:
            x: `[rows, in]`.
            w: `[experts, in, out]`; the fields too have that axis in front.
            key: dropout key.
            linear: the grouped product, of matrices `[experts, in, k]`.
        """
        raise NotImplementedError

    def norms(self, w: jax.Array) -> jax.Array:
        """`sqrt(sum over in of v²)`, `[out]`, in the fields' dtype."""
        raise NotImplementedError

    def scaled(self, scale: jax.Array) -> Self:
        """The update that stands for `v * scale [out]`."""
        raise NotImplementedError
