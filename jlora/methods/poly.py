"""Poly: skills that all tasks share, and for each task a router that mixes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.products.routed import Routed
from jlora.core.products.slots import check_choice, taken
from jlora.core.protocol.hyperparameters import check_hyperparameters, check_rank
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Method, Site, Start, View, factor_labels
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.core.protocol.plain import PlainLoRA
from jlora.methods.lora import kaiming, trained_dtype
from jlora.methods.melora import check_blocks


@dataclass(frozen=True)
class Poly(Method):
    """Polytropon: `w + a_t @ b_t / rank` for a task `t`, whose factors are mixed from those of `skills` that all tasks share.

    `a_t = Σ_s m_ts * a_s` and `b_t = Σ_s m_ts * b_s`, with `a [skills, in, rank]`, `b [skills, rank, out]` and
    `m_t = sigmoid(router[t])` made to sum to 1 over the skills. With `splits` above 1 (multi-head routing) the rows of `a` and
    the columns of `b` come in that many parts, which are mixed each by numbers of its own: `router [tasks, splits, skills]`.

    The call names the task, `adapted.on(task=3)`, or one for each row of a batch, `adapted.on(task=ids)` with whole numbers
    `[rows]`; with one task it need not. Where it gives a dropout key, as training does, each row's `m` is a relaxed
    Bernoulli draw of temperature 1, but where the matrix is looked up. `merge` and `compact` give the model of one task. Trains
    `skills * rank * (in + out) + tasks * splits * skills` values a matrix.

    Worth trying for many tasks at once, and for a new one with few examples: its router alone is then to be learned. Costs in a
    step what LoRA does, and `skills * rank * (in + out)` multiplications for each row to mix the factors.

    Args:
        rank: columns of every `a_s`; at most the smaller side of the matrix.
        tasks: number of tasks.
        skills: number of skills.
        splits: parts of both sides with routing of their own; must divide the sides of every matrix.

    Raises:
        ValueError: for a hyperparameter out of range, sides that the splits don't divide (by `adapterize`), and a call that
            names no task where there are several.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.Poly(rank=4, tasks=8)})
        >>> of_rows = adapted.on(task=jnp.array([0, 7, 3]))

    Reference:
        Ponti et al. 2022, arXiv:2202.13914; splits: Caccia et al. 2022, arXiv:2211.03831; formula and defaults as in PEFT.
    """

    rank: int = 8
    tasks: int = 1
    skills: int = 4
    splits: int = 1

    family: ClassVar[str] = "LoRA and its variants"
    context: ClassVar[frozenset[str]] = frozenset({"task"})
    form = Routed
    recipe: ClassVar[Recipe] = Recipe(rank_means="rank of every skill")
    peft_kind: ClassVar[PeftKind] = PeftKind(
        "POLY",
        tensors=(
            PeftTensor("poly_lora_A", "a", layout_of=lambda method: (method.split_rows, _whole_rows)),
            PeftTensor("poly_lora_B", "b", layout_of=lambda method: (method.split_columns, _whole_columns)),
            PeftTensor("poly_router.module_logits", "router", layout_of=lambda method: (_flat, method.by_split)),
        ),
        settings=(
            PeftSetting("r", "rank", 8),
            PeftSetting("n_tasks", "tasks", 1),
            PeftSetting("n_skills", "skills", 4),
            PeftSetting("n_splits", "splits", 1),
        ),
        only={"poly_type": "poly"},
        unused=("init_weights",),
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "tasks", "skills", "splits"))

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"a": ("", "in", "rank"), "b": ("", "rank", "out"), "router": ("", "", "")}

    @property
    def uses_key(self) -> bool:
        return True

    @property
    def must_be_told(self) -> str:
        return "the task of each row" if self.tasks > 1 else ""

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides, and sides that the splits don't divide."""
        check_rank(self, site)
        check_blocks(self.splits, site, "splits")

    def check_context(self, context: Arrays) -> None:
        """Refuses tasks that are no whole numbers below `tasks`."""
        if (task := context.get("task")) is not None:
            check_choice("task", task, self.tasks, most=1)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Every skill's `a` as LoRA's, uniform in ±1/sqrt(rows of a split), `b` zero; the router uniform in ±0.001."""
        dtype, (rows, columns) = trained_dtype(w), w.shape
        key_a, key_router = jax.random.split(key)
        a = kaiming(key_a, (rows // self.splits, self.splits * self.skills * self.rank), dtype)
        router = jax.random.uniform(key_router, (self.tasks, self.splits, self.skills), dtype, -1e-3, 1e-3)
        b = jnp.zeros((self.skills, self.rank, columns), dtype)
        return Start({"a": a.reshape(self.skills, rows, self.rank), "b": b, "router": router})

    def weight(self, view: View) -> jax.Array:
        """`w + a_t @ b_t / rank` of the one task of all rows."""
        return self.update(view).chosen("weight").weight(view.w)

    def update(self, view: View) -> Routed:
        """The skills, and what the call's tasks make of them."""
        own, task = view.params, view.context.get("task")
        if task is None and self.tasks == 1:
            task = jnp.zeros((), jnp.int32)
        return Routed(
            own["a"], own["b"] / self.rank, None if task is None else taken(own["router"], task), view.site.path
        )

    def plain(self, view: View) -> PlainLoRA:
        """LoRA by the factors of one task."""
        factors = self.update(view).chosen("weight")
        return PlainLoRA(factors.a, jnp.ones(self.rank, factors.a.dtype), factors.b, 1.0)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; the router learns as B does and never decays."""
        return factor_labels(site, {"a": "a", "b": "b"}) | {"router": "vector"}

    def split_rows(self, a: np.ndarray) -> np.ndarray:
        """`a` as PEFT has it, `[splits, skills, in / splits, rank]`."""
        return a.reshape(self.skills, self.splits, -1, self.rank).swapaxes(0, 1)

    def split_columns(self, b: np.ndarray) -> np.ndarray:
        """`b` as PEFT has it, `[splits, skills, rank, out / splits]`."""
        return np.stack(np.split(b, self.splits, axis=-1))

    def by_split(self, router: np.ndarray) -> np.ndarray:
        """The router from PEFT's, `[tasks, splits * skills]`."""
        return router.reshape(self.tasks, self.splits, self.skills)


def _whole_rows(parts: np.ndarray) -> np.ndarray:
    """PEFT's `[splits, skills, in / splits, rank]` with the splits below each other."""
    return parts.swapaxes(0, 1).reshape(parts.shape[1], -1, parts.shape[-1])


def _whole_columns(parts: np.ndarray) -> np.ndarray:
    """PEFT's `[splits, skills, rank, out / splits]` with the splits beside each other."""
    return np.concatenate(list(parts), axis=-1)


def _flat(router: np.ndarray) -> np.ndarray:
    """The router as PEFT has it, `[tasks, splits * skills]`."""
    return router.reshape(len(router), -1)


Poly.CASES = (Poly(rank=2, skills=2), Poly(rank=2, skills=3, splits=2))
