"""A method as its author would write it, in one file: weight, rule that gives out ranks, event, PEFT's form, recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from jlora import paths
from jlora.core.protocol.gated import Gated
from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Site, Start
from jlora.core.protocol.peft import Peft
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class Cut:
    """From step `at` on, only the `target` ranks a matrix, on average, with the largest gates have one."""

    target: int
    at: int

    def wrap(self, tx: optax.GradientTransformation, sites: tuple[Site, ...]) -> optax.GradientTransformation:
        """Gates out of use become exactly zero."""
        inner = optax.with_extra_args_support(tx)

        def update(updates: Any, state: Any, params: Any = None, **more: Any) -> Any:
            number, updates, within = state[0] + 1, *inner.update(updates, state[1], params, **more)
            updates, size = jax.tree.map(lambda leaf: leaf, updates), 0
            steps = [paths.lookup(updates, site.keys) for site in sites]
            old = [paths.lookup(params, site.keys)["g"] for site in sites]
            gates = jnp.concatenate([jnp.abs(g + step["g"]).reshape(-1) for g, step in zip(old, steps)])
            matrices = sum(g.size // g.shape[-1] for g in old)
            kept = jnp.argsort(jnp.argsort(-gates, stable=True)) < self.target * matrices
            for g, step in zip(old, steps):
                mask = kept[size : size + g.size].reshape(g.shape) | (number < self.at)
                step["g"], size = jnp.where(mask, step["g"], -g), size + g.size
            return updates, (number, within)

        return optax.GradientTransformationExtraArgs(lambda p: (jnp.zeros((), jnp.int32), inner.init(p)), update)


@dataclass(frozen=True)
class Marked:
    """The event of the cut: its leaves are marked, and the learning rate rises anew."""

    at: int

    @property
    def restarts(self) -> tuple[int, ...]:
        """After the cut."""
        return (self.at,)

    def due(self, step: int) -> bool:
        """At the cut."""
        return step == self.at

    def happen(self, context: Any) -> Any:
        """Marks the leaves."""
        frozen = jax.tree.map(lambda leaf: leaf, context.adapted.frozen)
        for site in context.sites:
            fields = paths.lookup(frozen, site.keys)
            fields["mark"] = fields["mark"] + 1
        context.say("the ranks are given out")
        return context.adapted.replace(frozen=frozen), context.opt_state


@dataclass(frozen=True)
class Rehearsal(Gated):
    """Ranks that are cut once: `w + s * (a * g) @ b` with `a [in, rank]`, `g [rank]`, `b [rank, out]`, `s = alpha / rank`.

    Trains `rank * (in + out + 1)` values a matrix. Costs a sort of all gates in a step.

    Args:
        rank: ranks at the start.
        target: ranks a matrix that are left, on average.
        alpha: numerator of the scale.
        steps: optimizer steps of the whole run; the cut is in its middle.
        dropout: as LoRA's.

    Raises:
        ValueError: for a hyperparameter out of range.

    Reference:
        None: a rehearsal.
    """

    rank: int = 4
    target: int = 2
    alpha: float = 8.0
    steps: int | None = None
    dropout: float = 0.0

    gate: ClassVar[str] = "g"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=2e-3, rank_means="mean rank after half of the run")

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "target"))

    @classmethod
    def job(cls, rank: int, steps: int | None, **options: Any) -> Rehearsal:
        """Twice the ranks until the cut."""
        return cls(2 * rank, rank, steps=steps, **options)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The factors', the gate's, and the mark's: one number a matrix."""
        return {**super().axes, "mark": ()}

    @property
    def alike(self) -> frozenset[str]:
        """Gates are one, and no matrix is marked."""
        return frozenset({"g", "mark"})

    @property
    def optimizer_rule(self) -> Cut | None:
        """The cut."""
        return Cut(self.target, self.steps // 2) if self.steps else None

    @property
    def event(self) -> Marked | None:
        """The mark."""
        return Marked(self.steps // 2) if self.steps else None

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` kaiming, gates one, `b` zero."""
        dtype = trained_dtype(w)
        a, b = kaiming(key, (w.shape[0], self.rank), dtype), jnp.zeros((self.rank, w.shape[1]), dtype)
        return Start({"a": a, "g": jnp.ones(self.rank, dtype), "b": b}, {"mark": jnp.zeros((), dtype)})

    def labels(self, site: Site) -> dict[str, str]:
        """Gates are vectors."""
        return {**super().labels(site), "g": "vector"}

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft:
        """PEFT's LoRA, with the gates in `a`."""
        a = params["a"] * params["g"][..., None, :]
        return Peft("lora", {"a": a, "b": params["b"]}, {"a": ("a", "g")}, self.alpha, dropout=self.dropout)


Rehearsal.CASES = (Rehearsal(rank=4, target=4, steps=2000),)
