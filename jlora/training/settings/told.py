"""What help texts say of the methods of `--method`: found in the catalogue, so that there is no list to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jlora.core.protocol.job import Recipe
from jlora.core.protocol.statistics import RESIDUAL
from jlora.disk import catalog
from jlora.methods.lora import INITS, PATTERNS
from jlora.stored.names import NAMES

#: The method of a run that names none, and the job's own word for training a classifier's head alone.
DEFAULT, PROBE = "lora", "probe"


def names(holds: Callable[[Recipe], Any] = lambda recipe: True) -> tuple[str, ...]:
    """The names of `--method` whose recipes have something, the default's first."""
    found = [name for name, recipe in catalog.recipes().items() if holds(recipe)]
    return tuple(sorted(found, key=lambda name: name != DEFAULT))


def method_names() -> tuple[str, ...]:
    """All that `--method` takes."""
    return (*names(), PROBE)


def method_help() -> str:
    """What `--method` may be."""
    whole = ", ".join(names(lambda recipe: recipe.targets == "all"))
    told = f"{', '.join(names())} ({whole}: every weight) or {PROBE} (the head alone)"
    return f"{told} ({DEFAULT}); `jlora inspect --method NAME` tells more"


def quantize_help() -> str:
    """What `--quantize` may be."""
    codes = ", ".join(f"{name} ({str(code).removesuffix('()')})" for name, code in NAMES.items())
    return (
        f"keep the base's linear weights, but the head, as a code: {codes}; nf4 is QLoRA's (default: as in the files)"
    )


def rank_help() -> str:
    """What `--rank` is, and its defaults."""
    own = _grouped(lambda recipe: recipe.rank or None)
    means = [f"{', '.join(who)}: {text}" for text, who in _grouped(lambda recipe: recipe.rank_means or None).items()]
    defaults = "; ".join(["8", "shipped model: 16", *(f"{', '.join(who)}: {rank}" for rank, who in own.items())])
    return "; ".join([f"rank of the adapters ({defaults})", *means])


def targets_help() -> str:
    """What `--targets` may be, and its defaults."""
    usual = Recipe.targets
    other = _grouped(lambda recipe: recipe.targets if recipe.targets not in (usual, "all") else None)
    defaults = "; ".join([usual, *(f"{', '.join(who)}: {targets}" for targets, who in other.items())])
    return f"regex that matches whole weight paths, or all-linear, or embedding: the token embeddings ({defaults})"


def links_help() -> str:
    """What `--links` is for, and its defaults."""
    chains = names(lambda recipe: recipe.has("links"))
    usual = Recipe.links
    other = _grouped(lambda r: r.links if r.has("links") and r.links != usual else None)
    defaults = "; ".join([str(usual), *(f"{', '.join(who)}: {links}" for links, who in other.items())])
    return f"{', '.join(chains)}: adapters trained one after another, in equal shares of the run ({defaults})"


def rate_help() -> str:
    """The defaults of `--learning-rate`."""
    usual = Recipe.learning_rate
    rates = _grouped(lambda recipe: recipe.learning_rate if recipe.learning_rate != usual else None)
    told = "; ".join(f"{', '.join(who)}: {_short(rate)}" for rate, who in sorted(rates.items()))
    return f"peak learning rate ({_short(usual)}; {told}; {PROBE}: 5e-3; shipped model: 1e-2)"


def init_help() -> str:
    """What `--init` may be."""
    names = ", ".join((*INITS, *PATTERNS))
    return f"how the adapters start, where the method has a choice: {names}, as LoRA's init; {RESIDUAL}: LoftQ, with --quantize"


def _grouped(value: Callable[[Recipe], Any]) -> dict[Any, list[str]]:
    """Names by what their recipes have, where that is not None."""
    found: dict[Any, list[str]] = {}
    for name, recipe in catalog.recipes().items():
        if (own := value(recipe)) is not None:
            found.setdefault(own, []).append(name)
    return found


def _short(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")
