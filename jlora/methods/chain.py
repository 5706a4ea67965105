"""Chain: one adapter after another on a base that stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.gated import Gated
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Factors, Method, Site, Start, View
from jlora.core.protocol.wrapping import Around
from jlora.methods.lora import LoRA
from jlora.optimize.events import Event


@dataclass(frozen=True)
class Chain(Around):
    """A chain of adapters: `v + past_a @ past_b`, with `v [in, out]` the inner method's weight.

    A link is an adapter of the inner method. When one is done, `jlora.restart` writes it into `past_a [in, (links - 1) * r]`
    and `past_b [(links - 1) * r, out]`, constants that start as zeros, and draws a new one. So a sequence of small adapters
    becomes an update of rank `links * r`, the base's bits never change, and no link is rounded away, whatever the base's
    dtype. Trains `count(inner)` values a matrix. Costs memory and products for `links * r` ranks from the first step, since
    shapes are fixed, and no optimizer memory for finished links. It is saved as it is, and ships as plain LoRA of the links
    that it has by then (`compact`, `save_peft`).

    COLA is `Chain(LoRA(...))`, RAC-LoRA `Chain(RACLoRA(...))`, boosting `Chain(XGBLoRA(...))`, and ReLoRA
    `Chain(LoRA(...), prune=0.99)` with `jlora.restart_schedule`. Without Chain, `restart` adds each link to the base.

    Args:
        inner: a method whose weight is `w + a @ b`: `LoRA(...)`, `RACLoRA(...)`, `XGBLoRA(...)`, ...
        links: the number of links, the last included.
        steps: optimizer steps of the whole run, cut into links of one length by `jlora.run_events`; the training job fills
            in its own. None: you call `jlora.restart` yourself.
        prune: share of the optimizer's moments that a restart sets to zero; 1 also starts its step count anew.
        by: which of them, if not all: "random", or the smallest by "magnitude" of the first moment.
        ranks: the rank of each link, at most the inner method's, for chains whose links become smaller; by default all of
            them. What a link does not use gets no gradient from the loss and is not kept, so the finished links take
            `sum(ranks[:-1])` columns. The scale stays the inner method's.

    With dropout the finished links' input is dropped too, as they are part of the adapter. An inner start that is taken from
    the weight (PiSSA) is taken from the weight with the finished links.

    Raises:
        TypeError: for an inner method that is no low-rank sum, keeps constants that leaves share, or can't begin anew.
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

    def __post_init__(self) -> None:
        inner = self.inner
        if not isinstance(inner, Method) or not inner.low_rank or isinstance(inner, Chain) or inner.shared_fields:
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
        if not isinstance(self.links, int) or isinstance(self.links, bool) or self.links < 1:
            raise ValueError(f"Chain's links must be a positive integer, got {self.links!r}")
        if self.ranks is not None:
            self._check_ranks(self.ranks)
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < self.links):
            raise ValueError(f"Chain's steps must be at least its {self.links} links, got {self.steps!r}")
        check_pruning(self.prune, self.by)

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
        """The inner method's, and those of the finished links."""
        past = {"past_a": ("in", "rank"), "past_b": ("rank", "out"), "link": ()}
        return {**self.inner.axes, **(past if self.links > 1 else {})}

    @property
    def kept_fields(self) -> tuple[str, ...]:
        """The finished links."""
        return ("past_a", "past_b", "link")

    @property
    def event(self) -> Event | None:
        """The ends of the links, where the number of steps is known."""
        from jlora.optimize.restart import LinkEnds  # which adapts, and so knows the methods

        if self.steps is None or self.links == 1:
            return None
        return LinkEnds(self.links, self.steps, self.prune, self.by)

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """The first link, and room for those that will be finished.

        Raises:
            TypeError: for an inner method whose weight is not `w + a @ b`.
        """
        inner = self.inner.start(key, w, site, **statistics)
        found = jax.eval_shape(self.inner.factors, View(w, inner.params, inner.frozen, site))
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
        """The constants with the present link among the finished ones."""
        link, found = view.frozen["link"], self._link(view)
        rank = found.a.shape[1]
        used = self._used(link, rank)
        starts = np.cumsum([0, *(self.ranks or (rank,) * self.links)])
        # Columns out of use go nowhere: those behind the last are dropped, the others are those of later links.
        columns = jnp.asarray(starts, jnp.int32)[link] + jnp.arange(rank)
        return {
            "past_a": view.frozen["past_a"].at[:, columns].set(found.a * used.astype(found.a.dtype), mode="drop"),
            "past_b": view.frozen["past_b"].at[columns].set(found.b, mode="drop"),
            "link": link + 1,
        }

    def _used(self, link: jax.Array | int, rank: int) -> jax.Array:
        """1 for the ranks of a link and 0 for the others, `[rank]`."""
        return (jnp.arange(rank) < jnp.asarray(self.ranks or (rank,) * self.links)[link]).astype(jnp.float32)

    def _link(self, view: View) -> Factors:
        found = self.inner.factors(view)
        assert found is not None
        if self.ranks is None:
            return found
        # On one factor is enough: then neither gets a gradient there.
        used = self._used(view.frozen.get("link", 0), found.b.shape[0])
        return replace(found, b=found.b * used.astype(found.b.dtype)[:, None])

    def in_use(self, link: int, width: int) -> np.ndarray:
        """Which of the `width` columns of the factors hold something in a link, the first being 0."""
        ranks = self.ranks or (width // self.links,) * self.links
        present = width - sum(ranks[:-1])
        return np.concatenate([np.arange(ranks[link]), present + np.arange(sum(ranks[:link]))])

    def weight(self, view: View) -> jax.Array:
        """`v + past_a @ past_b`."""
        if self.ranks is None:
            v = self.inner.weight(view)
        else:
            found = self._link(view)
            v = view.w.astype(found.a.dtype) + found.a @ found.b
        return v if self.links == 1 else v + view.frozen["past_a"] @ view.frozen["past_b"]

    def factors(self, view: View) -> Factors:
        """The present link beside the finished ones."""
        found = self._link(view)
        if self.links == 1:
            return found
        a = jnp.concatenate([found.a, view.frozen["past_a"]], axis=1)
        return replace(found, a=a, b=jnp.concatenate([found.b, view.frozen["past_b"]]))


def chained(
    name: str, inner: type[Method], rank: int | None = None, links: int = 4, **pruning: Any
) -> dict[str, Recipe]:
    """A recipe of the training job that trains links of equal shares of the run, on a base that stays as it is."""

    def make(rank: int, steps: int | None, links: int = links, **options: Any) -> Chain:
        return Chain(inner.job(rank, steps, **options), links, steps, **pruning)

    return {name: replace(inner.recipe, make=make, rank=rank, links=links)}


def check_pruning(prune: float, by: str) -> None:
    """Refuses a share of moments or a choice that makes no sense.

    Raises:
        ValueError: for a share outside of 0 to 1, or an unknown choice.
    """
    if not isinstance(prune, int | float) or not 0 <= prune <= 1:
        raise ValueError(f"prune is the share of the moments that become zero, from 0 to 1; got {prune!r}")
    if by not in ("random", "magnitude"):
        raise ValueError(f'moments are pruned by "random" or by "magnitude", got {by!r}')


Chain.CASES = (
    Chain(LoRA(rank=2, alpha=4), links=3),
    Chain(LoRA(rank=2, dropout=0.25, init="pissa"), links=2, prune=0.9),
    Chain(LoRA(rank=2, alpha=4), links=3, ranks=(2, 2, 1)),
)
