"""A method around another one: what it does not change is the inner method's."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import jax

from jlora.core.protocol.job import hyperparameters
from jlora.core.protocol.method import Arrays, Method, OptimizerRule, Site, Start
from jlora.optimize.events import Event


@dataclass(frozen=True)
class Around(Method):
    """Base of methods that go around another method and change its weight.

    Args:
        inner: the method inside.
    """

    inner: Method

    @property
    def exact_start(self) -> bool:  # type: ignore[override]
        """As the inner method."""
        return self.inner.exact_start

    @property
    def local(self) -> frozenset[str]:  # type: ignore[override]
        """As the inner method."""
        return self.inner.local

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """As the inner method."""
        return self.inner.axes

    @property
    def alike(self) -> frozenset[str]:
        """As the inner method."""
        return self.inner.alike

    @property
    def uses_key(self) -> bool:
        """As the inner method."""
        return self.inner.uses_key

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """As the inner method."""
        return self.inner.shared_fields

    @property
    def needs(self) -> frozenset[str]:
        """As the inner method."""
        return self.inner.needs

    @property
    def optimizer_rule(self) -> OptimizerRule | None:
        """As the inner method."""
        return self.inner.optimizer_rule

    @property
    def event(self) -> Event | None:
        """As the inner method."""
        return self.inner.event

    def check(self, site: Site) -> None:
        """As the inner method."""
        self.inner.check(site)

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Arrays:
        """As the inner method."""
        return self.inner.shared(key, self._inside(sites))

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """As the inner method."""
        return self.inner.together(key, starts, self._inside(sites))

    def _inside(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites as the inner method knows them."""
        return tuple(replace(site, method=self.inner) for site in sites)

    def labels(self, site: Site) -> dict[str, str]:
        """As the inner method."""
        return self.inner.labels(site)

    def rates(self, site: Site) -> dict[str, float]:
        """As the inner method."""
        return self.inner.rates(site)

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
    """The method inside all those that are around it, or itself."""
    return innermost(method.inner) if isinstance(method, Around) else method


def with_innermost(method: Method, new: Method) -> Method:
    """The same methods around another innermost one."""
    return replace(method, inner=with_innermost(method.inner, new)) if isinstance(method, Around) else new
