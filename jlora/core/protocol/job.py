"""What the training job must know of a method, so that `jlora finetune --method NAME` takes it; it stands on the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol


def _nothing(rank: int | None, steps: int | None, **options: Any) -> Any:
    """Stands for `Recipe.make` until `Method.recipes` puts the method's own function in its place."""
    raise NotImplementedError("a recipe of no method: Method.recipes gives those of one")


@dataclass(frozen=True)
class Recipe:
    """One name of `--method`: what it makes, and what the job chooses where the user leaves a setting open.

    Attributes:
        make: `make(rank, steps, **options)`, the method for a run of `steps` steps (None where that is not known yet);
            `rank` is `--rank`, and the options are those of alpha, dropout and links that `takes` names, or none.
        takes: which of the settings rank, alpha, dropout and links it takes; None for those that the method has as fields.
        rank: default of `--rank`; None for the job's own, 0 for a method that does without.
        rank_means: what `--rank` is, in a few words, where it is not the rank of every adapter.
        alpha: default of `--alpha`, as a multiple of `--rank`.
        links: default of `--links`.
        learning_rate: default of the peak learning rate.
        targets: what is adapted by default: "all-linear", "embedding" (what tokens are looked up in), or "all", every
            weight, as it is in `full`.
        asks: hyperparameters that have no sensible default: the user has to give them by `--set`.
        batches: how many batches of training data `Method.needs` is taken from.
    """

    make: Callable[..., Any] = _nothing
    takes: frozenset[str] | None = None
    rank: int | None = None
    rank_means: str = ""
    alpha: float = 2.0
    links: int = 4
    learning_rate: float = 5e-4
    targets: str = "all-linear"
    asks: tuple[str, ...] = ()
    batches: int = 1

    def has(self, name: str) -> bool:
        """Whether it takes a setting, of a recipe of the catalogue."""
        return self.takes is not None and name in self.takes


class Calibration(Protocol):
    """What a job lets a method find in its training data before the run (see `Method.found`)."""

    @property
    def budget(self) -> int | None:
        """`--rank`, or None where the method stands in a `[spec]` table."""
        ...

    @property
    def sites(self) -> tuple[Any, ...]:
        """The `Site` of every leaf that the method adapts."""
        ...

    def dimensions(self) -> Sequence[float]:
        """The intrinsic dimensions of the hidden states before every layer, and after the last."""
        ...


class KnownToTheJob:
    """The part of `Method` that the training job asks; a method overrides what it needs.

    Class attributes:
        recipe: what the job chooses for the method where the user does not.
        measured: the hyperparameter that `found` takes from the training data of a job; "" for none.
    """

    recipe: ClassVar[Recipe] = Recipe()
    measured: ClassVar[str] = ""

    @classmethod
    def recipes(cls) -> dict[str, Recipe]:
        """The names under which `jlora finetune --method` knows the class: its own in small letters, unless it says others."""
        return {cls.__name__.lower(): replace(cls.recipe, make=cls.job)}

    @classmethod
    def job(cls, rank: int | None, steps: int | None, **options: Any) -> Any:
        """The method for a run of the training job (see `Recipe.make`): phases as shares of the run, and the like.

        By default the class, given those of `rank` and `steps` that it has as fields.
        """
        own, given = hyperparameters(cls), {"rank": rank or None, "steps": steps}
        return cls(**{name: value for name, value in given.items() if value is not None and name in own}, **options)

    @property
    def must_be_told(self) -> str:
        """What every call has to tell the method (`Method.context`), in a few words: a job, which tells nothing, refuses it."""
        return ""

    def found(self, data: Calibration) -> Any:
        """The method with its `measured` hyperparameter, which the job asks for before a run."""
        raise NotImplementedError(f"{type(self).__name__} finds nothing in data")


def hyperparameters(cls: Any) -> tuple[str, ...]:
    """The names of what a method's class is called with; what it computes from these is none."""
    return tuple(each.name for each in fields(cls) if each.init)


def half_as_many_again(rank: int) -> int:
    """The ranks to start with where ranks are taken away: as in AdaLoRA's paper."""
    return math.ceil(1.5 * rank)


def allocating(steps: int | None) -> dict[str, Any]:
    """Phases as shares of the run: a tenth to learn what matters, and three tenths with the ranks that are left."""
    number = steps or 0
    return {
        "steps": steps,
        "start_steps": number // 10,
        "final_steps": 3 * number // 10,
        "interval": max(1, number // 100),
    }
