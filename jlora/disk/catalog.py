"""The methods that come with jlora, by the names that users give them."""

from __future__ import annotations

import functools
from dataclasses import replace

import jlora.methods
import jlora.prompts
from jlora.core.protocol.job import Recipe, hyperparameters
from jlora.core.protocol.method import Method
from jlora.core.protocol.wrapping import parts

#: The families that a method may state as its `family`, in the order of the pages, with what their methods do.
FAMILIES = {
    "LoRA and its variants": "add a product of small factors to the weight",
    "Weight decomposition": "train the length of the weight's columns apart from their direction",
    "Rank allocation": "give more ranks to some matrices than to others",
    "Chains of adapters": "train one small adapter after another, which add up to a larger update",
    "Continual learning": "learn one task after another and forget little",
    "Shared random projections": "train vectors beside random factors that all matrices share",
    "Structured updates": "add an update of high rank that few numbers make",
    "Shared tensors": "train arrays that all matrices share",
    "Rotations and scales": "multiply the weight, its inputs or its outputs",
    "Bottleneck adapters": "add a small network beside or behind the weight",
    "Prompts": "put trained virtual tokens in front of a text",
    "Around another method": "change how another method is applied",
    "Sparse updates": "train a few entries of the weight",
    "Trained leaves and rows": "train a leaf, or some of its rows, without an adapter",
}


def methods() -> dict[str, type[Method]]:
    """The classes that `jlora/methods/__init__.py` and `jlora/prompts/__init__.py` export, in the order of their names.

    Whatever lists methods lists these: base classes, such as `Gated` and `Around`, are no methods that a user names.
    """
    everything = vars(jlora.methods) | vars(jlora.prompts)
    found = {name: value for name, value in everything.items() if isinstance(value, type)}
    return {name: found[name] for name in sorted(found) if issubclass(found[name], Method)}


def family(method: type[Method]) -> str:
    """The family that a method states: in its own class, since a variant may belong elsewhere than what it is derived from.

    Raises:
        ValueError: for a class that states none, or one that is not in `FAMILIES`.
    """
    stated = vars(method).get("family")
    if stated not in FAMILIES:
        raise ValueError(
            f"{method.__name__} must state its family in its class body, one of {', '.join(map(repr, FAMILIES))}; "
            f"got {stated!r}"
        )
    return stated


def recipes() -> dict[str, Recipe]:
    """What `jlora finetune --method` takes, by name: the recipes of all methods.

    Raises:
        ValueError: for a name that two methods have.
    """
    return dict(_recipes(tuple(methods().values())))


@functools.lru_cache(maxsize=4)
def _recipes(classes: tuple[type[Method], ...]) -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for cls in classes:
        own = cls.recipes()
        if twice := set(own) & set(found):
            raise ValueError(f"the training job's name {min(twice)!r} is that of {cls.__name__} and of another method")
        found |= own
    return {name: replace(found[name], takes=_takes(found[name])) for name in sorted(found)}


def _takes(recipe: Recipe) -> frozenset[str]:
    """The settings that what a recipe makes has as fields, outside or inside, where it does not say."""
    if recipe.takes is not None:
        return recipe.takes
    has = {name for part in parts(recipe.make(recipe.rank or 8, None)) for name in hyperparameters(type(part))}
    return frozenset(has & {"rank", "alpha", "dropout", "links"})
