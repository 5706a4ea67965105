"""Methods that go around another method, such as DoRA, and access to the one inside."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import jax

from jlora.core.protocol.event import Event
from jlora.core.protocol.job import hyperparameters
from jlora.core.protocol.method import Arrays, Method, OptimizerRule, Site, Start


@dataclass(frozen=True)
class Around(Method):
    """Base of methods that go around another method and change its weight.

    Everything that a subclass does not override is the inner method's.

    Args:
        inner: the method inside.
    """

    inner: Method

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        return self.inner.exact_start

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        return self.inner.mergeable

    @property
    def beside(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.beside

    @property
    def context(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.context

    @property
    def local(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.local

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return self.inner.axes

    @property
    def alike(self) -> frozenset[str]:
        return self.inner.alike

    @property
    def uses_key(self) -> bool:
        return self.inner.uses_key

    @property
    def shared_fields(self) -> tuple[str, ...]:
        return self.inner.shared_fields

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    @property
    def optimizer_rule(self) -> OptimizerRule | None:
        return self.inner.optimizer_rule

    @property
    def event(self) -> Event | None:
        return self.inner.event

    def check(self, site: Site) -> None:
        self.inner.check(site)

    def check_context(self, context: Arrays) -> None:
        self.inner.check_context(context)

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Start | Arrays:
        return self.inner.shared(key, self._inside(sites))

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        return self.inner.together(key, starts, self._inside(sites))

    def _inside(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites as the inner method knows them."""
        return tuple(replace(site, method=self.inner) for site in sites)

    def labels(self, site: Site) -> dict[str, str]:
        return self.inner.labels(site)

    def rates(self, site: Site) -> dict[str, float]:
        return self.inner.rates(site)

    def shared_labels(self, trained: Arrays) -> dict[str, str]:
        return self.inner.shared_labels(trained)

    def shared_rates(self) -> dict[str, float]:
        return self.inner.shared_rates()

    @classmethod
    def job(cls, rank: int | None, steps: int | None, **options: Any) -> Method:
        """Around what the training job makes of the default inner method.

        Raises:
            TypeError: for a class whose `inner` has no default.
        """
        inner: Any = next(each for each in fields(cls) if each.name == "inner")
        default = inner.default if inner.default_factory is MISSING else inner.default_factory()
        if default is MISSING:
            raise TypeError(f"{cls.__name__} needs a default inner method, or a `job` that makes one")
        own = {"steps": steps} if steps is not None and "steps" in hyperparameters(cls) else {}
        return cls(inner=type(default).job(rank, steps, **options), **own)


def parts(method: Method) -> list[Method]:
    """The method, the one that it is around, and so on."""
    return [method, *parts(method.inner)] if isinstance(method, Around) else [method]


def innermost(method: Method) -> Any:
    """The method inside all the methods around it: `LoRA(8)` of `DoRA(LoRA(8))`; a method that is around none is its own."""
    return innermost(method.inner) if isinstance(method, Around) else method


def with_innermost(method: Method, new: Method) -> Method:
    """A copy of `method` with `new` in place of its innermost method."""
    return replace(method, inner=with_innermost(method.inner, new)) if isinstance(method, Around) else new
