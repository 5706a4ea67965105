"""The methods of `--method`: what the catalogue's recipes make of the settings, with the user's own hyperparameters."""

from __future__ import annotations

from typing import Any

import jlora
from jlora.core.protocol.job import Recipe
from jlora.disk import catalog
from jlora.methods.lora import INITS
from jlora.training.errors import SettingError, nearest
from jlora.training.settings.fields import Settings
from jlora.training.settings.hyperparameters import checked, replaced
from jlora.training.settings.told import DEFAULT, PROBE


def recipe_of(settings: Settings) -> Recipe | None:
    """What the job knows of the method of `--method`; None for the probe, which has none."""
    return None if settings.method == PROBE else catalog.recipes()[settings.method or DEFAULT]


def named(settings: Settings) -> jlora.Method:
    """The method of `--method` for (resolved) settings.

    Raises:
        SettingError: for a hyperparameter that the method has not, or refuses.
    """
    method, given = chosen(settings), dict(settings.set)
    own = checked(method, given | ({} if settings.init is None else {"init": settings.init}))
    try:
        return replaced(method, own)
    except ValueError as error:
        if given:
            raise SettingError("set", f"{_told(own)}: {error}") from error
        near = nearest(str(settings.init), INITS)
        raise SettingError("init", f"{settings.init}: {error}" + (f"; did you mean {near}?" if near else "")) from error


def _told(given: dict[str, Any]) -> str:
    return " ".join(f"{name}={','.join(map(str, v)) if isinstance(v, list) else v}" for name, v in given.items())


def chosen(settings: Settings) -> jlora.Method:
    """The method as the job chooses it, without `--set` and `--init`."""
    recipe = recipe_of(settings)
    assert recipe is not None
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("alpha", "links") if recipe.has(name)}
    if recipe.has("dropout"):
        options["dropout"] = settings.dropout or 0.0
    return recipe.make(settings.rank, settings.steps, **{n: v for n, v in options.items() if v is not None})
