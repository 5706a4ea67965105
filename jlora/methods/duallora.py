"""DualLoRA: a branch that old tasks' inputs don't see, and a branch for each task, gated by the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import ABOVE_ZERO_TO_ONE, check_hyperparameters, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.lifelong import Lifelong
from jlora.core.protocol.method import Arrays, Site, Start, View
from jlora.methods.lora import LoRA, kaiming, trained_dtype

GATES = ("energy", "relative", "open")
# Directions with less than this share of the inputs' energy are rounding error.
_LEAST = 1e-6


@dataclass(frozen=True)
class DualLoRA(Lifelong):
    """Dual low-rank adaptation: `y = x w + x P a b + Σ_k c_k(x) (x f_k) u_k`: what earlier tasks don't see, and gated parts.

    `f_k [in, directions]` are orthonormal directions of the inputs of task `k`, orthogonal to those of the tasks before it.
    `P = 1 - f fᵀ`, over the `f` of the tasks before the present one, takes them out of the *orthogonal branch* `a [in, rank]`,
    `b [rank, out]`: what it learns is zero for inputs in their span, whatever the optimizer does. The *residual branch* has a
    matrix `u_k [directions, out]` for each task, which only that task trains, and a gate `c_k(x)`: with `e_k = ‖x f_k‖² /
    ‖x‖²`, the share of the input (of a token, each for itself) that lies in the task's directions, it is `e_k` with gate
    "energy", `e_k / max_j e_j` with "relative", and 1 with "open".

    `jlora.next_task` ends a task, given the covariance of the next one's inputs (`jlora.input_covariance`): `P a b` and `u` are
    kept, new directions are found, `a` is drawn anew, `b` and `u` start at zero. With the gates "energy" and "open" the output
    is what it was; with "relative" a new task's directions compete with the old.

    Starts at the base exactly. Needs the covariance of the first task's inputs (`jlora.prepare`). Trains
    `rank * (in + out) + directions * out` values a matrix. Costs products for `tasks * (rank + directions)` ranks, twice for
    directions of the tasks before.

    Args:
        rank: columns of `a`.
        directions: at most so many directions of each task are kept.
        tasks: how many tasks there is room for, the last included. The directions of all need room in the inputs:
            `tasks * directions` is at most `in`.
        energy: the fewest directions are taken with which all so far hold this share of the inputs' energy (the trace of their
            covariance), if `directions` are enough. The first `directions` at 1.
        gate: "energy", "relative" or "open". With "open" the method is a weight, and can be merged.

    Raises:
        ValueError: for a hyperparameter out of range, or a matrix too small for the directions.

    Example:
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.DualLoRA(rank=2, directions=2, tasks=3)}
        >>> loss_fn = lambda params, tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)
        >>> adapted = jlora.adapterize(params, spec, prepared=jlora.prepare(params, spec, loss_fn, [tokens]))
        >>> tx = jlora.optimizer(adapted, optax.adam, learning_rate=1e-3)
        >>> _, inputs = jlora.observe(loss_fn, jlora.input_covariance)(adapted, tokens)
        >>> adapted, opt_state = jlora.next_task(adapted, tx.init(adapted.params), tx, key, inputs=inputs)

    Reference:
        Chen et al. 2024, arXiv:2411.00623. No code is public: branches and memory are written down from the paper's abstract
        and summaries of it. That the projection is a part of the function, the three gates, and the rule for the number of
        directions (as in GPM, Saha et al. 2021, arXiv:2103.09762) are this library's. The paper's calibration of the logits by
        the predicted task is left to the user.
    """

    rank: int = 8
    directions: int = 8
    tasks: int = 10
    energy: float = 0.95
    gate: str = "energy"

    family: ClassVar[str] = "Continual learning"
    recipe: ClassVar[Recipe] = Recipe(batches=8)

    def __post_init__(self) -> None:
        bounds = {"energy": ABOVE_ZERO_TO_ONE, "gate": one_of(GATES)}
        check_hyperparameters(self, ("rank", "directions", "tasks"), bounds, DualLoRA)

    @property
    def needs(self) -> frozenset[str]:
        """The covariance, whose eigenvectors the directions are."""
        return frozenset({"covariance"})

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Whether the gates are open: else they depend on the input."""
        return self.gate == "open"

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        trained = {"a": ("in", "rank"), "b": ("rank", "out"), "u": ("rank", "out")}
        kept = {"f": ("in", "rank"), "past_u": ("rank", "out"), "task": ()}
        return trained | kept | ({"past_a": ("in", "rank"), "past_b": ("rank", "out")} if self.tasks > 1 else {})

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides, and more directions than there are inputs."""
        LoRA(self.rank).check(site)
        if site.kind == "gather":
            raise ValueError("DualLoRA keeps directions of inputs, and a lookup has none; leave the leaf out")
        if self.tasks * self.directions > site.in_size:
            raise ValueError(
                f"{self.tasks} tasks of {self.directions} directions are more than the {site.in_size} inputs; use at most "
                f"{site.in_size // self.directions} tasks, or {site.in_size // self.tasks} directions"
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site, *, covariance: jax.Array) -> Start:
        """The first task's directions, and room for what is to be kept.

        Args:
            key: for `a`, kaiming; `b` and `u` are zero.
            w: the matrix.
            site: where it is.
            covariance: of the first task's inputs, `[in, in]`.
        """
        dtype = trained_dtype(w)
        zeros = lambda *shape: jnp.zeros(shape, dtype)  # noqa: E731
        (inputs, outputs), ranks = w.shape, (self.tasks - 1) * self.rank
        a, b = kaiming(key, (inputs, self.rank), dtype), zeros(self.rank, outputs)
        f = zeros(inputs, self.tasks * self.directions)
        f = f.at[:, : self.directions].set(new_directions(covariance, f, self.directions, self.energy).astype(dtype))
        kept = {"f": f, "past_u": zeros(f.shape[1], outputs), "task": jnp.zeros((), jnp.int32)}
        if self.tasks > 1:
            kept |= {"past_a": zeros(inputs, ranks), "past_b": zeros(ranks, outputs)}
        return Start({"a": a, "b": b, "u": zeros(self.directions, outputs)}, kept)

    def _unseen(self, params: Arrays, frozen: Arrays) -> jax.Array:
        """`P a`, of one matrix."""
        earlier = jnp.arange(frozen["f"].shape[1]) < frozen["task"] * self.directions
        f = jnp.where(earlier, frozen["f"], 0)
        return params["a"] - f @ (f.T @ params["a"])

    def _low_rank(self, view: View) -> tuple[jax.Array, jax.Array]:
        """The orthogonal branches of all tasks, as factors."""
        a, b = self._unseen(view.params, view.frozen), view.params["b"]
        if self.tasks == 1:
            return a, b
        return jnp.concatenate([a, view.frozen["past_a"]], 1), jnp.concatenate([b, view.frozen["past_b"]])

    def _u(self, params: Arrays, frozen: Arrays) -> jax.Array:
        """The matrices `u` of all tasks, `[tasks * directions, out]`."""
        place = frozen["task"] * self.directions
        return jax.lax.dynamic_update_slice_in_dim(frozen["past_u"], params["u"], place, 0)

    def gates(self, hidden: jax.Array, x: jax.Array, task: jax.Array) -> jax.Array:
        """`c`, `[..., tasks]`, from `x f [..., tasks * directions]` and `x [..., in]`; zero for tasks to come."""
        known = jnp.arange(self.tasks) <= task
        if self.gate == "open":
            return jnp.broadcast_to(known.astype(hidden.dtype), (*hidden.shape[:-1], self.tasks))
        parts = jnp.sum(hidden.reshape(*hidden.shape[:-1], self.tasks, self.directions) ** 2, -1)
        whole = jnp.sum(x * x, -1, keepdims=True) if self.gate == "energy" else jnp.max(parts, -1, keepdims=True)
        return parts / jnp.where(whole > 0, whole, 1)

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """The base's product and both branches."""
        y, (a, b) = product(x), self._low_rank(view)
        x = x.astype(a.dtype)
        hidden = x @ view.frozen["f"]
        gates = jnp.repeat(self.gates(hidden, x, view.frozen["task"]), self.directions, axis=-1)
        return y.astype(a.dtype) + (x @ a) @ b + (hidden * gates) @ self._u(view.params, view.frozen)

    def weight(self, view: View) -> jax.Array:
        """`w + P a b + Σ_k f_k u_k`, with open gates."""
        a, b = self._low_rank(view)
        return view.w.astype(a.dtype) + a @ b + view.frozen["f"] @ self._u(view.params, view.frozen)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups."""
        return {"a": "a", "b": "b", "u": "b"}

    def task(self, frozen: Arrays, shared: Arrays) -> jax.Array:
        return jnp.max(frozen["task"])

    def after(
        self, now: list[Start], fresh: list[Start], shared: Start, sites: tuple[Site, ...], inputs: list[Any]
    ) -> tuple[list[Start], Start]:
        """With both branches kept, and the directions of the next task."""
        starts = []
        for start, new, site, covariance in zip(now, fresh, sites, inputs, strict=True):
            kept = self._kept
            for _ in site.batch_axes:
                kept = jax.vmap(kept)
            starts.append(replace(new, frozen=kept(start.params, start.frozen, covariance)))
        return starts, shared

    def _kept(self, params: Arrays, frozen: Arrays, covariance: jax.Array) -> Arrays:
        """The constants of one matrix for the next task."""
        task, f, put = frozen["task"], frozen["f"], jax.lax.dynamic_update_slice_in_dim
        found = new_directions(covariance, f, self.directions, self.energy).astype(f.dtype)
        return {
            "f": put(f, found, (task + 1) * self.directions, 1),
            "past_u": self._u(params, frozen),
            "past_a": put(frozen["past_a"], self._unseen(params, frozen), task * self.rank, 1),
            "past_b": put(frozen["past_b"], params["b"], task * self.rank, 0),
            "task": task + 1,
        }


def new_directions(covariance: jax.Array, known: jax.Array, count: int, energy: float) -> jax.Array:
    """Orthonormal directions `[in, count]` of the inputs beyond the known ones; zeros for those that are not needed.

    The first eigenvectors of `Q c Q`, with `Q = 1 - known knownᵀ`: the fewest with which known and new directions hold the
    share `energy` of the trace of the covariance `c`.

    Args:
        covariance: `c [in, in]`.
        known: `[in, k]`, orthonormal columns or zeros.
        count: the most that are taken.
        energy: the share.
    """
    c, known = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (covariance, known))
    with jax.default_matmul_precision("highest"):
        left = lambda m: m - known @ (known.T @ m)  # noqa: E731
        rest = left(left(c).T)
        values, vectors = jnp.linalg.eigh((rest + rest.T) / 2)
        values, vectors = jnp.maximum(values[::-1][:count], 0), left(vectors[:, ::-1][:, :count])
        vectors = vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=0), _LEAST)
    whole = jnp.trace(c)
    before = (whole - jnp.trace(rest)) + jnp.cumsum(values) - values
    wanted = (before < energy * whole) & (values > _LEAST * whole)
    return jnp.where(wanted, vectors, 0)


DualLoRA.CASES = (
    DualLoRA(rank=2, directions=2, tasks=2),
    DualLoRA(rank=2, directions=2, tasks=3, energy=1.0, gate="open"),
    DualLoRA(rank=2, directions=2, tasks=2, gate="relative"),
)
