"""ZipLoRA: adapters put together by a trained gain for every input feature of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.compose import plain
from jlora.compose.combine import check_one_base
from jlora.core.protocol.plain import PlainLoRA
from jlora.core.tree.adapted import Adapted, Plan
from jlora.methods.lora import LoRA

PENALTIES = ("dot", "elementwise")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Zipped:
    """Adapters on one base, with the gains that put them together; made by `zip_adapters`.

    Attributes:
        base: the params tree.
        gains: what is trained: for each adapter `[*batch, in]` at each of its leaves, by path.
        parents: the adapters' factors at their leaves, by path; never trained.
        plan: the leaves that any of them changes; static.
    """

    base: Any
    gains: list[dict[str, jax.Array]]
    parents: list[dict[str, PlainLoRA]]
    plan: Plan = field(metadata={"static": True})

    def replace(self, **changes: Any) -> Zipped:
        """A copy with some fields replaced, as in `pair.replace(gains=new_gains)`."""
        return replace(self, **changes)

    def adapted(self) -> Adapted:
        """The adapters put together: `w + Σ_i diag(gain_i) s_i a_i b_i`, as LoRA of the sum of the ranks, with scale 1."""
        return self._of(range(len(self.parents)), self.gains)

    def parent(self, number: int) -> Adapted:
        """One of the adapters by itself, as LoRA with scale 1 at all leaves that any of them changes."""
        ones = [{path: jnp.ones_like(gain) for path, gain in gains.items()} for gains in self.gains]
        return self._of([number], ones)

    def penalty(self, form: str = "dot") -> jax.Array:
        """How much the gains of different adapters meet at one feature, summed over leaves, matrices and pairs of adapters.

        Args:
            form: "dot" is `|Σ_k m_i[k] m_j[k]|` of each matrix, as in the paper, which entries of both signs can make vanish;
                "elementwise" the mean over `k` of `|m_i[k] m_j[k]|`, as in the public code.

        Raises:
            ValueError: for another form.
        """
        if form not in PENALTIES:
            raise ValueError(f"form must be one of {PENALTIES}, got {form!r}")
        total = jnp.zeros(())
        for n, gains in enumerate(self.gains):
            for other in self.gains[n + 1 :]:
                for path in gains.keys() & other.keys():
                    met = gains[path] * other[path]
                    each = jnp.abs(met.sum(-1)) if form == "dot" else jnp.abs(met).mean(-1)
                    total += jnp.sum(each)
        return total

    def loss(
        self, fn: Callable[[Adapted, Any], jax.Array], inputs: Sequence[Any], weight: float = 0.01, form: str = "dot"
    ) -> jax.Array:
        """ZipLoRA's objective: together they do on each one's inputs what it does alone, and don't meet.

        `Σ_i mean (fn(adapted, x_i) - fn(parent_i, x_i))² + weight * penalty`; the parents' outputs get no gradient.

        Args:
            fn: of an `Adapted` and inputs: a lifted function.
            inputs: those of each adapter's own task, with their noise and times where the model draws any.
            weight: of the penalty.
            form: as for `penalty`.

        Raises:
            ValueError: for another number of inputs than of adapters.
        """
        if len(inputs) != len(self.parents):
            raise ValueError(f"wanted inputs for each of {len(self.parents)} adapters, got {len(inputs)}")
        together, total = self.adapted(), weight * self.penalty(form)
        for number, x in enumerate(inputs):
            alone = jax.lax.stop_gradient(fn(self.parent(number), x))
            total += jnp.mean(jnp.square(fn(together, x) - alone))
        return total

    def _of(self, numbers: Sequence[int], gains: list[dict[str, jax.Array]]) -> Adapted:
        """The adapter of some parents with gains; of ranks 1 and zero where none of them changes a leaf."""
        params: dict[str, Any] = {}
        sites = []
        for site in self.plan.sites:
            found = [(gains[n][site.path], self.parents[n][site.path]) for n in numbers if site.path in self.parents[n]]
            sides = [(gain[..., None] * one.scale * one.a * one.gates[..., None, :], one.b) for gain, one in found]
            if not sides:
                other = next(each[site.path] for each in self.parents if site.path in each)
                sides = [(jnp.zeros_like(other.a[..., :1]), jnp.zeros_like(other.b[..., :1, :]))]
            a, b = (jnp.concatenate(side, axis) for side, axis in zip(zip(*sides), (-1, -2)))
            paths.insert(params, site.keys, {"a": a, "b": b})
            sites.append(replace(site, method=LoRA(a.shape[-1], float(a.shape[-1]))))
        return Adapted(self.base, params, {}, {}, Plan(tuple(sites)))


def zip_adapters(adapters: Sequence[Adapted]) -> Zipped:
    """Adapters of one base, to be put together by gains that are trained until they don't disturb each other (ZipLoRA).

    All gains are 1 at the start, where the result is the sum of the changes. Trains `in` values for each adapter and matrix.

    Args:
        adapters: on equal bases, of methods that are plain LoRA exactly, such as one of a subject and one of a style.

    Returns:
        A pytree: train its `gains` by its `loss`, and take its `adapted()`.

    Raises:
        ValueError: for less than two adapters, different bases, and leaves that one of them reads in another way.
        TypeError: for a method without factors.

    Example:
        >>> pair = jlora.zip_adapters([adapted, adapted])
        >>> apply = lambda adapted, x: jlora.lift(model.apply)({"params": adapted}, x)
        >>> loss = lambda gains, pair: pair.replace(gains=gains).loss(apply, [tokens, tokens])
        >>> gradients = jax.grad(loss)(pair.gains, pair)

    Reference:
        Shah et al. 2023, arXiv:2311.13600.
    """
    if len(adapters) < 2:
        raise ValueError(f"zip_adapters puts two adapters or more together, got {len(adapters)}")
    check_one_base(adapters)
    parents: list[dict[str, PlainLoRA]] = []
    sites: dict[str, Any] = {}
    for order, adapted in enumerate(adapters):
        parents.append({})
        for site, weight in zip(adapted.plan.sites, adapted.weights(), strict=True):
            factors = plain.factors(weight)
            if factors is None:
                raise TypeError(f"{site.path}: {site.method} has no factors whose inputs could get gains")
            first = sites.setdefault(site.path, replace(site, beside=()))
            roles = [(one.batch_axes, one.in_axes, one.out_axes) for one in (first, site)]
            if roles[0] != roles[1]:
                raise ValueError(
                    f"{site.path}: adapter {order} reads its axes (batch, in, out) as {roles[1]}, not {roles[0]}"
                )
            parents[-1][site.path] = factors
    gains = [{path: jnp.ones(one.a.shape[:-1], one.a.dtype) for path, one in each.items()} for each in parents]
    return Zipped(adapters[0].base, gains, parents, Plan(tuple(sites.values())))
