"""Deep LoRA: a product of three or more tiny factors, narrow from the start or compressed by the first gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.data_starts import randomised_svd
from jlora.core.protocol.hyperparameters import NOT_NEGATIVE, POSITIVE, check_hyperparameters, integer
from jlora.core.protocol.method import Arrays, Factors, Method, Site, Start, View, factor_labels
from jlora.methods.lora import trained_dtype

# What float16 can't tell from zero.
_FLOAT16_TINIEST = 2.0**-24


@dataclass(frozen=True)
class DeepLoRA(Method):
    """Deep low-rank adaptation: `w + f3 @ f2 @ f1`, a product of `depth` factors that starts at size `eps**depth`.

    Gradient descent on a deep product of small factors grows few directions and leaves the others where they are, so the
    update finds a rank of its own, often well below `rank`. Two forms:

    Narrow (`compressed=False`): `f1 [rank, out]`, `f2 .. [rank, rank]`, the last `[in, rank]`, each (semi-)orthogonal
    times `eps`.

    Compressed: `w + left @ m3 @ m2 @ m1 @ right.T` with `left [in, rank]`, `right [out, rank]`, and `depth` matrices
    `m1 .. [rank, rank]` that start at `eps` times the identity. It follows the training of the *wide* product, whose inner
    width is `max(in, out)`, and which is never formed. All that training moves in the wide product lies in a space that the
    first gradient determines: its first `rank / 2` left and right singular vectors, and their images under the wide start.
    `left` and `right` span it. So it starts from a gradient, `jlora.prepare(params, spec, loss_fn, batches[:1])`, of the
    first training batch. `left` and `right` learn at `gamma` times the learning rate, and with `gamma=0` they are
    constants; where the loss sees only a part of the weight, as in matrix completion, they have to move.

    Trains `rank * (in + out) * (gamma > 0 or not compressed) + (depth if compressed else depth - 2) * rank * rank` values
    a matrix. There is no scale. The start is the base's output to `eps**depth`, 1e-9 by default; factors and update are
    float32 or wider, and only the sum with the base is rounded to the base's dtype.

    Worth trying where there are few examples, and where a rank can't be tuned. Use Adam: gradients start at `eps**(depth - 1)`.

    Args:
        rank: inner width; for the compressed form even, and at most the smaller side of the matrix, for the narrow one at
            most the larger side (with which it is the wide product itself).
        depth: number of factors; at least 3 for the compressed form. Depth 2 is the authors' "vanilla LoRA": `f1` standard
            normal, `f2` zero, no scale, as `LoRA(rank, alpha=rank, init="embedding")`.
        eps: size of the factors at the start.
        compressed: whether the form is the compressed one; else it is the narrow one.
        gamma: the learning rate of `left` and `right` as a fraction of that of the others.
        iterations: 0 for an exact SVD of the gradient; k > 0 for a randomised one with k subspace iterations, which forms
            nothing of the gradient's size.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.DeepLoRA(rank=8, compressed=True)}
        >>> loss_fn = lambda params, tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)
        >>> prepared = jlora.prepare(params, spec, loss_fn, [tokens], key=key)
        >>> adapted = jlora.adapterize(params, spec, key=key, prepared=prepared)

    Reference:
        Yaras et al. 2024, arXiv:2406.04112.
    """

    rank: int = 8
    depth: int = 3
    eps: float = 1e-3
    compressed: bool = False
    gamma: float = 1e-2
    iterations: int = 0

    family: ClassVar[str] = "LoRA and its variants"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    def __post_init__(self) -> None:
        counts = {"rank": integer(1), "depth": integer(2), "iterations": integer(0)}
        gamma = (NOT_NEGATIVE[0], "finite and not negative")
        check_hyperparameters(self, bounds={**counts, "eps": POSITIVE, "gamma": gamma}, of=DeepLoRA)
        if self.compressed and self.depth < 3:
            raise ValueError(f"compressed DeepLoRA's depth must be an integer of at least 3, got {self.depth}")
        if self.compressed and self.rank % 2:
            raise ValueError(f"compressed DeepLoRA needs an even rank, got {self.rank}")

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """Whether the start is the base's output to single precision."""
        return self.starts_at < 1e-6

    @property
    def starts_at(self) -> float:
        """The spectral norm of the update at the start."""
        return 0.0 if self.depth == 2 else self.eps**self.depth

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        if self.compressed:
            return {"left": ("in", "rank"), "right": ("out", "rank"), **dict.fromkeys(self._square, ("rank", "rank"))}
        middle = dict.fromkeys(self._square, ("rank", "rank"))
        return {"f1": ("rank", "out"), **middle, f"f{self.depth}": ("in", "rank")}

    @property
    def _square(self) -> list[str]:
        """Names of the square factors, that of the output's side first."""
        if self.compressed:
            return [f"m{number}" for number in range(1, self.depth + 1)]
        return [f"f{number}" for number in range(2, self.depth)]

    @property
    def alike(self) -> frozenset[str]:
        """The compressed form's square factors start at `eps` times the identity."""
        return frozenset(self._square if self.compressed else ())

    @property
    def needs(self) -> frozenset[str]:
        """The compressed form starts from the gradient of the first batch."""
        return frozenset({"gradient"} if self.compressed else ())

    def check(self, site: Site) -> None:
        """Refuses ranks that the matrix can't have, and a start that 16 bits take for zero."""
        sides = site.in_size, site.out_size
        most, side = (min(sides), "smaller") if self.compressed else (max(sides), "larger")
        if self.rank > most:
            raise ValueError(
                f"rank {self.rank} is above the {side} side of the {sides[0]} x {sides[1]} matrix; use {most} or less"
            )
        check_sixteen_bits(self.starts_at, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """The narrow form's factors drawn, or the compressed form's found by the gradient."""
        dtype = trained_dtype(w)
        if not self.compressed:
            return Start(self._narrow(key, w.shape, dtype))
        left, right = bases(key, statistics["gradient"].astype(dtype), self.rank // 2, self.iterations)
        inner = {name: self.eps * jnp.eye(self.rank, dtype=dtype) for name in self._square}
        outer = {"left": left, "right": right}
        return Start({**inner, **outer}) if self.gamma else Start(inner, outer)

    def _narrow(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Arrays:
        sizes = {"in": shape[0], "out": shape[1], "rank": self.rank}
        shapes = {name: (sizes[first], sizes[second]) for name, (first, second) in self.axes.items()}
        if self.depth == 2:
            return {"f1": jax.random.normal(key, shapes["f1"], dtype), "f2": jnp.zeros(shapes["f2"], dtype)}
        draw = jax.nn.initializers.orthogonal(self.eps)
        keys = jax.random.split(key, self.depth)
        return {name: draw(each, shape, dtype) for each, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def weight(self, view: View) -> jax.Array:
        """`w + f3 @ f2 @ f1`, or `w + left @ m3 @ m2 @ m1 @ right.T`."""
        return self.factors(view).weight(view.w)

    def factors(self, view: View) -> Factors:
        """The factor on the input's side, and the product of all the others, `[rank, out]`, which costs little to form."""
        fields = {**view.frozen, **view.params}
        names = reversed(self._square)
        if self.compressed:
            inner = jnp.linalg.multi_dot([fields[name] for name in names])
            return Factors(fields["left"], inner @ fields["right"].T)
        b = fields["f1"]
        for name in self._square:
            b = fields[name] @ b
        return Factors(fields[f"f{self.depth}"], b)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups: the factor on the output's side is a `b`, all others are `a`s."""
        trained = set(self.axes) - ({"left", "right"} if self.compressed and not self.gamma else set())
        return factor_labels(site, {name: "b" if "out" in self.axes[name] else "a" for name in trained})

    def rates(self, site: Site) -> dict[str, float]:
        """`gamma` for the outer factors of the compressed form."""
        return {"left": self.gamma, "right": self.gamma} if self.compressed and self.gamma else {}


def check_sixteen_bits(starts_at: float, site: Site) -> None:
    """Refuses a start that 16 bits take for zero.

    Raises:
        ValueError: saying so.
    """
    if site.dtype == "float16" and 0 < starts_at < _FLOAT16_TINIEST:
        raise ValueError(
            f"the start of size eps**depth = {starts_at:g} is zero in float16, and so are its gradients; use "
            "bfloat16 or float32 params"
        )


def bases(key: jax.Array, gradient: jax.Array, half: int, iterations: int = 0) -> tuple[jax.Array, jax.Array]:
    """`left [in, 2 half]` and `right [out, 2 half]` of the compressed form, from the gradient `[in, out]`.

    The wide product starts at `eps**depth * e` with `e` a random matrix with orthonormal rows (for `in <= out`). To leading
    order its first factor's gradient is, up to `eps`, `pᵀ gradient` with `e = p q`, so what training reaches on the output's
    side is the span of `v` and `eᵀ u`, where `u [in, half]` and `v [out, half]` are the first singular vectors of the
    gradient; on the input's side it is the image of that under `e`. The reference forms all wide factors, and gets the same
    span as the complement of an intersection of two null spaces. But only the images of `u` and `v` under `e` matter, and
    these can be drawn alone: `eᵀ u = x` is a uniformly random orthonormal frame, and with `right = [x, z]` orthonormal,
    `z` the part of `v` that `x` lacks, `left = e right = [u, t]`, where `t` is random in what `u` leaves free. For `in > out`
    the sides change places, as the authors have it.
    """
    rows, columns = gradient.shape
    if rows > columns:
        right, left = bases(key, gradient.T, half, iterations)
        return left, right
    key_svd, key_x, key_t = jax.random.split(key, 3)
    u, v = first_directions(key_svd, gradient, half, iterations)
    x = _orthonormal(jax.random.normal(key_x, (columns, half), gradient.dtype))
    # `e` is the first `in` rows of an orthogonal matrix [out, out], and `t` those rows of an image of `z` under it.
    padded = jnp.pad(u, ((0, columns - rows), (0, 0)))
    t = _beside(padded, jax.random.normal(key_t, (columns, half), gradient.dtype))[:rows]
    return jnp.concatenate([u, t], axis=1), jnp.concatenate([x, _beside(x, v)], axis=1)


def first_directions(key: jax.Array, gradient: jax.Array, count: int, iterations: int) -> tuple[jax.Array, jax.Array]:
    """The first left and right singular vectors, `[in, count]` and `[out, count]`; of a stack one matrix at a time."""

    # One matrix after the other, cut to `count` at once, so that a stack of many layers never holds all singular vectors of
    # more than one matrix.
    @jax.custom_batching.sequential_vmap
    def one(key: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        if iterations:
            u, _, vt = randomised_svd(key, gradient, count, iterations)
        else:
            u, _, vt = jnp.linalg.svd(gradient, full_matrices=False)
        return u[:, :count], vt[:count].T

    return one(key, gradient)


def _orthonormal(matrix: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns' span; of a Gaussian matrix uniformly random, since no sign is preferred."""
    q, r = jnp.linalg.qr(matrix)
    return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)


def _beside(frame: jax.Array, matrix: jax.Array) -> jax.Array:
    """An orthonormal basis of what the columns of `matrix` add to those of `frame`, which are orthonormal."""
    return _orthonormal(jnp.concatenate([frame, matrix], axis=1))[:, frame.shape[1] :]


DeepLoRA.CASES = (
    DeepLoRA(rank=4),
    DeepLoRA(rank=4, compressed=True, gamma=0.5),
    DeepLoRA(rank=2, depth=4, eps=0.25, compressed=True, gamma=0, iterations=4),
)
