"""SD-LoRA: directions that stay, one a task, and magnitudes that go on learning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.hyperparameters import NOT_NEGATIVE, NOT_ZERO, POSITIVE, check_hyperparameters, one_of
from jlora.core.protocol.lifelong import Lifelong
from jlora.core.protocol.method import Arrays, Factors, Site, Start, View
from jlora.core.protocol.plain import PlainLoRA
from jlora.methods.lora import LoRA, kaiming, shared_dtype, trained_dtype

NORMS = ("product", "factors")


@dataclass(frozen=True)
class SDLoRA(Lifelong):
    """Scalable decoupled LoRA: `w + Σ_k m_k * a_k @ b_k / n_k`, one direction `k` a task, with magnitudes `m` for all matrices.

    `a_k [in, rank]`, `b_k [rank, out]`, and `n_k = sqrt(‖a_k @ b_k‖² + eps²)` (Frobenius), so that a direction has length one.
    The present task trains its `a`, `b` and the magnitudes of all tasks so far; the directions of earlier tasks are constants.
    `jlora.next_task` ends a task: the direction goes among the finished ones, and the lifted function gives what it gave
    before. No data of earlier tasks are kept, no task is told at inference, and `jlora.compact` makes one plain LoRA of all
    tasks.

    Starts at the base exactly. Trains `rank * (in + out)` values a matrix. Shares `tasks` trained values, the magnitudes; those
    of tasks to come have no gradient and no decay. Costs memory and products for `tasks * rank` ranks from the first step,
    since shapes are fixed, and no optimizer memory for finished directions.

    Args:
        rank: columns of `a`.
        tasks: how many tasks there is room for, the last included.
        ranks: the rank of each task, at most `rank`: SD-LoRA-RR, whose later directions are smaller. By default all have
            `rank`.
        absorb: SD-LoRA-KD: a direction that the earlier ones make up, to a relative squared error of at most this, is not
            kept. Their magnitudes take its part, `m_k += m_t * β_k` with the least-squares `β` over all matrices together (the
            method's magnitudes are common to them), and the next task has its place. None keeps every direction. The authors'
            value is 9e-4. The function changes by no more than the error that was allowed.
        magnitude: where a magnitude starts.
        norm: "product", `‖a @ b‖`; or "factors", `‖a‖ ‖b‖`, as in the authors' code.
        normalize_current: whether the present task's direction has length one too, as the paper writes. The authors' code has
            it so only when the task is over: then the output jumps there.
        carry: whether magnitudes go on from task to task, as in the paper; the authors' code sets all of them back to
            `magnitude` for each task, another jump.
        eps: keeps the direction of `b = 0` finite. Up to a product of about this length its gradient is that of a plain sum.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    The authors' code is `SDLoRA(rank=10, magnitude=0.8, norm="factors", normalize_current=False, carry=False)`. It takes the
    cross-entropy over the present task's classes alone; which rows of a head learn is a matter of your loss.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.SDLoRA(rank=2, tasks=5)})
        >>> tx = jlora.optimizer(adapted, optax.adam, learning_rate=1e-3)
        >>> opt_state = tx.init(adapted.params)
        >>> adapted, opt_state = jlora.next_task(adapted, opt_state, tx, jax.random.fold_in(key, 1))

    Reference:
        Wu et al. 2025, arXiv:2501.13198.
    """

    rank: int = 8
    tasks: int = 10
    ranks: tuple[int, ...] | None = None
    absorb: float | None = None
    magnitude: float = 1.0
    norm: str = "product"
    normalize_current: bool = True
    carry: bool = True
    eps: float = 1e-2
    dropout: float = 0.0

    family: ClassVar[str] = "Continual learning"

    def __post_init__(self) -> None:
        bounds = {"absorb": NOT_NEGATIVE, "magnitude": NOT_ZERO, "norm": one_of(NORMS), "eps": POSITIVE}
        check_hyperparameters(self, ("rank", "tasks"), bounds, SDLoRA)
        if self.ranks is not None:
            whole = isinstance(self.ranks, tuple) and all(type(rank) is int for rank in self.ranks)
            if not whole or len(self.ranks) != self.tasks or not all(1 <= rank <= self.rank for rank in self.ranks):
                raise ValueError(
                    f"SDLoRA's ranks must be {self.tasks} whole numbers from 1 to its rank {self.rank}, one a task, got "
                    f"{self.ranks!r}"
                )

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        one = {"a": ("in", "rank"), "b": ("rank", "out")}
        return {**one, **({"past_a": one["a"], "past_b": one["b"]} if self.tasks > 1 else {})}

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """The magnitudes, and the number of the present task."""
        return ("magnitudes", "task")

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        LoRA(self.rank).check(site)

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Start:
        """All magnitudes at their start, and task 0."""
        magnitudes = jnp.full((self.tasks,), self.magnitude, shared_dtype(sites))
        return Start({"magnitudes": magnitudes}, {"task": jnp.zeros((), jnp.int32)})

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` kaiming, `b` zero, and room for the directions to be finished."""
        dtype = trained_dtype(w)
        params = {"a": kaiming(key, (w.shape[0], self.rank), dtype), "b": jnp.zeros((self.rank, w.shape[1]), dtype)}
        if self.tasks == 1:
            return Start(params)
        room = self._ends[-2]
        return Start(
            params, {"past_a": jnp.zeros((w.shape[0], room), dtype), "past_b": jnp.zeros((room, w.shape[1]), dtype)}
        )

    @property
    def _ends(self) -> np.ndarray:
        """The columns at which directions begin and end, `[tasks + 1]`."""
        return np.cumsum([0, *(self.ranks or (self.rank,) * self.tasks)])

    @property
    def _owners(self) -> np.ndarray:
        """The task of each column of the finished directions."""
        return np.repeat(np.arange(self.tasks - 1), np.diff(self._ends[:-1]))

    def _used(self, task: jax.Array, dtype: Any) -> jax.Array:
        """1 for the ranks that a task uses and 0 for the others, `[rank]`."""
        ranks = jnp.asarray(self.ranks or (self.rank,) * self.tasks)
        return (jnp.arange(self.rank) < ranks[task]).astype(dtype)

    def _direction(self, a: jax.Array, b: jax.Array, task: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The present task's factors with the ranks that it does not use at zero, and `1 / n`, `[*batch]`."""
        a = a * self._used(task, a.dtype)
        if self.norm == "product":
            inner = jnp.einsum("...ir,...is->...rs", a, a) * jnp.einsum("...ro,...so->...rs", b, b)
            square = jnp.maximum(jnp.sum(inner, (-2, -1)), 0)
        else:
            used = b * self._used(task, b.dtype)[:, None]
            square = jnp.sum(a * a, (-2, -1)) * jnp.sum(used * used, (-2, -1))
        return a, jax.lax.rsqrt(square + self.eps**2)

    def factors(self, view: View) -> Factors:
        """`[a | past_a]` and the rows of `b` and `past_b`, each times its magnitude."""
        task, magnitudes = view.shared["task"], view.shared["magnitudes"].astype(view.params["a"].dtype)
        a, length = self._direction(view.params["a"], view.params["b"], task)
        b = view.params["b"] * (magnitudes[task] * (length if self.normalize_current else 1))
        if self.tasks == 1:
            return Factors(a, b, dropout=self.dropout)
        each = magnitudes[self._owners]
        past_a, past_b = jax.lax.stop_gradient((view.frozen["past_a"], view.frozen["past_b"]))
        return Factors(
            jnp.concatenate([a, past_a], 1), jnp.concatenate([b, each[:, None] * past_b]), dropout=self.dropout
        )

    def weight(self, view: View) -> jax.Array:
        """`w + Σ_k m_k * a_k @ b_k / n_k`."""
        return self.factors(view).weight(view.w)

    def plain(self, view: View) -> PlainLoRA:
        """The directions so far, with gates of 1; those of the tasks to come are 0."""
        found, task = self.factors(view), view.shared["task"]
        gates = self._used(task, found.a.dtype)
        if self.tasks > 1:
            finished = jnp.arange(self._ends[-2]) < jnp.asarray(self._ends)[task]
            gates = jnp.concatenate([gates, finished.astype(gates.dtype)])
        return PlainLoRA(found.a, gates, found.b, dropout=found.dropout)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; magnitudes are vectors, which never decay."""
        return {"a": "a", "b": "b"}

    def task(self, frozen: Arrays, shared: Arrays) -> jax.Array:
        return shared["task"]

    def renewed_entries(self, shared: Start) -> dict[str, jax.Array]:
        """The magnitude of the next task; of all, where none is carried on."""
        entries = jnp.arange(self.tasks)
        return {"magnitudes": (entries == shared.frozen["task"]) if self.carry else entries >= 0}

    def after(
        self, now: list[Start], fresh: list[Start], shared: Start, sites: tuple[Site, ...], inputs: list[Any]
    ) -> tuple[list[Start], Start]:
        """With the direction among the finished ones, or in their magnitudes where these make it up."""
        task, magnitudes = shared.frozen["task"], shared.params["magnitudes"]
        units = []
        for start in now:
            a, length = self._direction(start.params["a"], start.params["b"], task)
            units.append((a, start.params["b"] * length[..., None, None].astype(a.dtype)))
        absorbed, parts = jnp.zeros((), bool), jnp.zeros_like(magnitudes)
        if self.absorb is not None:
            pairs = [self._pairs(start, unit) for start, unit in zip(now, units)]
            between, withs, square = jax.tree.map(lambda *each: sum(each), *pairs)
            parts, error = made_up(between, withs, square, jnp.arange(self.tasks - 1) < task)
            absorbed, parts = error <= self.absorb, jnp.append(parts, 0).astype(magnitudes.dtype)
        begins = task + jnp.where(absorbed, 0, 1)
        magnitudes = magnitudes + jnp.where(absorbed, magnitudes[task] * parts, 0)
        new = (jnp.arange(self.tasks) == begins) if self.carry else jnp.ones(self.tasks, bool)
        magnitudes = jnp.where(new, jnp.asarray(self.magnitude, magnitudes.dtype), magnitudes)
        kept = [self._kept(start, unit, task, absorbed) for start, unit in zip(now, units)]
        starts = [replace(each, frozen=past) for each, past in zip(fresh, kept)]
        return starts, Start({"magnitudes": magnitudes}, {"task": begins.astype(jnp.int32)})

    def _kept(self, start: Start, unit: tuple[jax.Array, jax.Array], task: jax.Array, absorbed: jax.Array) -> Arrays:
        """The finished directions with one more, unless that is absorbed."""
        # All `rank` columns are written, with zeros for those that the task does not use; what lies behind the end of the array
        # is left out, and a column of a later task is written again by it.
        columns = jnp.asarray(self._ends)[task] + jnp.arange(self.rank)
        columns = jnp.where(absorbed, self._ends[-1], columns)
        a, b = unit
        return {
            "past_a": start.frozen["past_a"].at[..., columns].set(a, mode="drop"),
            "past_b": start.frozen["past_b"].at[..., columns, :].set(b, mode="drop"),
        }

    def _pairs(self, start: Start, unit: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Inner products of directions, over all matrices of a leaf: of finished ones `[t, t]`, with the new `[t]`, of that."""
        a, b, past_a, past_b = (x.astype(jnp.float32) for x in (*unit, start.frozen["past_a"], start.frozen["past_b"]))

        def products(one: Any, other: Any) -> jax.Array:
            found = jnp.einsum("...ir,...is->...rs", one[0], other[0], precision="highest")
            found = found * jnp.einsum("...ro,...so->...rs", one[1], other[1], precision="highest")
            return jnp.sum(found.reshape(-1, *found.shape[-2:]), 0)

        of = jax.nn.one_hot(self._owners, self.tasks - 1, dtype=jnp.float32)
        past = (past_a, past_b)
        between = jnp.einsum("rt,rs,su->tu", of, products(past, past), of, precision="highest")
        withs = jnp.einsum("rt,rs->t", of, products(past, (a, b)), precision="highest")
        return between, withs, jnp.sum(products((a, b), (a, b)))


def made_up(between: jax.Array, withs: jax.Array, square: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `β` of the least `‖d - Σ_k β_k d_k‖²`, zero for directions that are not `known`, and that error by `‖d‖²`.

    Args:
        between: `⟨d_j, d_k⟩`, `[t, t]`.
        withs: `⟨d_k, d⟩`, `[t]`.
        square: `‖d‖²`.
        known: truths `[t]`.
    """
    both = known[:, None] & known[None, :]
    gram = jnp.where(both, between, jnp.eye(len(known), dtype=between.dtype))
    parts = jnp.linalg.lstsq(gram, jnp.where(known, withs, 0))[0]
    parts = jnp.where(known, parts, 0)
    error = square - 2 * parts @ jnp.where(known, withs, 0) + parts @ jnp.where(both, between, 0) @ parts
    # A direction of zeros is made up of nothing; one without any before it is not.
    return parts, jnp.where(square > 0, jnp.maximum(error, 0) / jnp.where(square > 0, square, 1), 0)


SDLoRA.CASES = (
    SDLoRA(rank=2, tasks=3),
    SDLoRA(rank=3, tasks=3, ranks=(3, 2, 1), absorb=9e-4, dropout=0.25),
    SDLoRA(rank=2, tasks=2, magnitude=0.8, norm="factors", normalize_current=False, carry=False),
)
