"""Chain: one adapter after another on a base that stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.event import Event
from jlora.core.protocol.gated import Gated
from jlora.core.protocol.hyperparameters import check_hyperparameters, integer
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Factors, Method, Site, Start, View
from jlora.core.protocol.plain import PlainLoRA
from jlora.core.protocol.renewal import Renewal
from jlora.core.protocol.wrapping import Around
from jlora.methods.lora import LoRA
from jlora.optimize.restart import LinkEnds


@dataclass(frozen=True)
class Chain(Around):
    """A chain of adapters: `v + past_a @ past_b`, with `v [in, out]` the inner method's weight.

    A link is an adapter of the inner method. When one is done, `jlora.restart` writes it into `past_a [in, (links - 1) * r]`
    and `past_b [(links - 1) * r, out]`, constants that start as zeros, and draws a new one. So a sequence of small adapters
    becomes an update of rank `links * r`, the base's bits never change, and no link is rounded away, whatever the base's
    dtype. Trains `count(inner)` values a matrix. Costs memory and products for `links * r` ranks from the first step, since
    shapes are fixed, and no optimizer memory for finished links. It is saved as it is, and exported as plain LoRA of the
    links that it has by then (`compact`, `save_peft`).

    COLA is `Chain(LoRA(...))`, RAC-LoRA `Chain(RACLoRA(...))`, boosting `Chain(XGBLoRA(...))`, and ReLoRA
    `Chain(LoRA(...), prune=0.99)` with `jlora.restart_schedule`. Without Chain, `restart` adds each link to the base.

    Args:
        inner: a method whose weight is `w + a @ b`: `LoRA(...)`, `RACLoRA(...)`, `XGBLoRA(...)`, ...
        links: the number of links, the last included.
        steps: optimizer steps of the whole run, cut into links of one length by `jlora.run_events`; the training job fills
            in its own. None: you call `jlora.restart` yourself.
        prune: share of the optimizer's moments that a restart sets to zero; 1 also starts its step count anew.
        by: which moments become zero where `prune` is below 1: "random" ones, or those where the first moment is smallest in
            "magnitude".
        ranks: the rank of each link, at most the inner method's, for chains whose links become smaller; by default all of
            them. What a link does not use gets no gradient from the loss and is not kept, so the finished links take
            `sum(ranks[:-1])` columns. The scale stays the inner method's.

    With dropout the finished links' input is dropped too, as they are part of the adapter. An inner start that is taken from
    the weight (PiSSA) is taken from the weight with the finished links.

    Raises:
        TypeError: for an inner method that is no low-rank sum, has arrays that leaves share, or can't begin anew.
        ValueError: for links, ranks, steps, prune or by out of range.

    Example:
        >>> jlora.Chain(jlora.LoRA(rank=8, alpha=16), links=4)

    Reference:
        COLA: Xia et al. 2024, arXiv:2401.04151; ReLoRA: Lialin et al. 2023, arXiv:2307.05695. Both add each link to the
        base; keeping the links apart is jlora's, and gives the same weight.
    """

    inner: Method = field(default_factory=LoRA)
    links: int = 4
    steps: int | None = None
    prune: float = 1.0
    by: str = "random"
    ranks: tuple[int, ...] | None = None

    family: ClassVar[str] = "Chains of adapters"

    def __post_init__(self) -> None:
        inner = self.inner
        if (
            not isinstance(inner, Method)
            or inner.form is not Factors
            or isinstance(inner, Chain)
            or inner.shared_fields
        ):
            raise TypeError(
                "Chain goes around a method whose weight is w + a @ b with factors of its own, such as LoRA(8); got "
                f"{inner!r}. jlora.restart adds links of any method to a float32 base"
            )
        if inner.optimizer_rule is not None or inner.event is not None:
            raise TypeError(f"Chain can't begin {inner} anew: it follows a schedule of its own over the whole run")
        if isinstance(inner, Gated):
            raise TypeError(f"Chain can't begin {inner} anew: its ranks are given out once, over all layers")
        if inner.needs or not inner.exact_start:
            what = "from data" if inner.needs else "elsewhere than at the base"
            raise TypeError(f"Chain can't begin {inner} anew: it starts {what}")
        check_hyperparameters(self, bounds={"links": integer(1, "a positive integer")}, of=Chain)
        if self.ranks is not None:
            self._check_ranks(self.ranks)
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < self.links):
            raise ValueError(f"Chain's steps must be at least its {self.links} links, got {self.steps!r}")
        self.renewal  # noqa: B018  (says what is wrong with prune and by)

    def _check_ranks(self, ranks: Any) -> None:
        most = getattr(self.inner, "rank", None)
        whole = isinstance(ranks, tuple) and all(type(rank) is int and rank >= 1 for rank in ranks)
        if not whole or len(ranks) != self.links:
            raise ValueError(f"Chain's ranks must be {self.links} positive whole numbers, one a link, got {ranks!r}")
        whole_start = getattr(self.inner, "from_weight", False) or getattr(self.inner, "init", None) == "orthogonal"
        if whole_start or most is None or max(ranks) > most:
            raise ValueError(
                f"Chain's ranks {ranks!r} must be within the rank of an inner method whose factors have that many columns, "
                f"one of them zero at the start (no PiSSA, OLoRA or orthogonal start); got {self.inner}"
            )

    @classmethod
    def recipes(cls) -> dict[str, Recipe]:
        """COLA, and ReLoRA, whose paper prunes 99 of 100 moments by magnitude; the other chains clear them."""
        return {**chained("cola", LoRA), **chained("relora", LoRA, prune=0.99, by="magnitude")}

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The inner method's, and those of the finished links; `link`, the number of the present one from 0, has none."""
        past = {"past_a": ("in", "rank"), "past_b": ("rank", "out"), "link": ()}
        return {**self.inner.axes, **(past if self.links > 1 else {})}

    @property
    def kept_fields(self) -> tuple[str, ...]:
        return ("past_a", "past_b", "link")

    @property
    def renewal(self) -> Renewal:
        """As `prune` and `by` say."""
        return Renewal(self.prune, self.by)

    @property
    def event(self) -> Event | None:
        """The ends of the links, where the number of steps is known."""
        if self.steps is None or self.links == 1:
            return None
        return LinkEnds(self.links, self.steps, self.prune, self.by)

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """The first link, and room for those that will be finished.

        Raises:
            TypeError: for an inner method whose weight is not `w + a @ b`.
        """
        inner = self.inner.start(key, w, site, **statistics)
        found: Any = jax.eval_shape(self.inner.update, View(w, inner.params, inner.frozen, site))
        if found is None or found.scale is not None:
            raise TypeError(f"Chain goes around a method whose weight is w + a @ b; that of {self.inner} is another")
        if self.links == 1:
            return inner
        room = (self.links - 1) * found.a.shape[1] if self.ranks is None else sum(self.ranks[:-1])
        past = {
            "past_a": jnp.zeros((w.shape[0], room), found.a.dtype),
            "past_b": jnp.zeros((room, w.shape[1]), found.b.dtype),
            "link": jnp.zeros((), jnp.int32),
        }
        return Start(inner.params, {**inner.frozen, **past})

    def finished(self, view: View) -> Arrays:
        """The constants after a restart, with the present link written among the finished ones."""
        link, found = view.frozen["link"], self._link(view)
        rank = found.a.shape[1]
        used = self._used(link, rank)
        # All `rank` columns are written, with zeros for the ranks that the link does not use. A column too many lies where a
        # later link will be written, or behind the end of the array, where mode="drop" leaves it out.
        columns = self._finished_ranks(link, rank) + jnp.arange(rank)
        return {
            "past_a": view.frozen["past_a"].at[:, columns].set(found.a * used.astype(found.a.dtype), mode="drop"),
            "past_b": view.frozen["past_b"].at[columns].set(found.b, mode="drop"),
            "link": link + 1,
        }

    def _used(self, link: jax.Array | int, rank: int) -> jax.Array:
        """1 for the ranks of a link and 0 for the others, `[rank]`."""
        return (jnp.arange(rank) < jnp.asarray(self.ranks or (rank,) * self.links)[link]).astype(jnp.float32)

    def _finished_ranks(self, link: jax.Array | int, rank: int) -> jax.Array:
        """The ranks of all links before one, whose columns those of the finished links are."""
        return jnp.asarray(np.cumsum([0, *(self.ranks or (rank,) * self.links)]), jnp.int32)[link]

    def _link(self, view: View) -> Factors:
        found = self.inner.update(view)
        assert isinstance(found, Factors)
        if self.ranks is None:
            return found
        # One factor is enough: where `b` is zero, `a` has no gradient either.
        used = self._used(view.frozen.get("link", 0), found.b.shape[0])
        return replace(found, b=found.b * used.astype(found.b.dtype)[:, None])

    def weight(self, view: View) -> jax.Array:
        """`v + past_a @ past_b`."""
        v = self.inner.weight(view) if self.ranks is None else self._link(view).weight(view.w)
        return v if self.links == 1 else v + view.frozen["past_a"] @ view.frozen["past_b"]

    def factors(self, view: View) -> Factors:
        """`[a | past_a]` and `[b ; past_b]`, with `a @ b` the present link."""
        found = self._link(view)
        if self.links == 1:
            return found
        past_a, past_b = jax.lax.stop_gradient((view.frozen["past_a"], view.frozen["past_b"]))
        a, b = jnp.concatenate([found.a, past_a], axis=1), jnp.concatenate([found.b, past_b])
        return replace(found, a=a, b=b, constants=past_a.shape[1])

    def plain(self, view: View) -> PlainLoRA:
        """The links so far, with gates of 1; those of the links to come are 0."""
        found, link = self.factors(view), view.frozen.get("link", 0)
        room = view.frozen["past_a"].shape[1] if self.links > 1 else 0
        rank = found.a.shape[1] - room
        finished = jnp.arange(room) < self._finished_ranks(link, rank)
        gates = jnp.concatenate([self._used(link, rank), finished])
        return PlainLoRA(found.a, gates.astype(found.a.dtype), found.b, dropout=found.dropout)


def chained(
    name: str, inner: type[Method], rank: int | None = None, links: int = 4, **pruning: Any
) -> dict[str, Recipe]:
    """A recipe of the training job that trains links of equal shares of the run, on a base that stays as it is."""

    def make(rank: int, steps: int | None, links: int = links, **options: Any) -> Chain:
        return Chain(inner.job(rank, steps, **options), links, steps, **pruning)

    return {name: replace(inner.recipe, make=make, rank=rank, links=links)}


Chain.CASES = (
    Chain(LoRA(rank=2, alpha=4), links=3),
    Chain(LoRA(rank=2, dropout=0.25, init="pissa"), links=2, prune=0.9),
    Chain(LoRA(rank=2, alpha=4), links=3, ranks=(2, 2, 1)),
)
