"""The evolutionary search for GLoRA's configuration: a generation is one compiled evaluation with other numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.core.protocol.hyperparameters import check_hyperparameters, integer, number
from jlora.core.protocol.method import Site
from jlora.core.tree.adapted import Adapted
from jlora.methods.glora.method import CHOICES, KINDS, GLoRA

# How often a search draws anew, for each configuration that it wants, what is known already or too large.
_TRIES = 10
_RANDOM_TRIES = 200


@dataclass(frozen=True)
class GloraSearch:
    """What a search has found so far; `glora_evolve(..., resume=search)` goes on from it.

    Attributes:
        configurations: all that were scored, `[n, matrices, 5]`, in their order.
        scores: their scores, `[n]`.
        sizes: how many trained values each of them reads, `[n]`.
        generation: how many generations are done; 0 for the first, random one.
    """

    configurations: np.ndarray
    scores: np.ndarray
    sizes: np.ndarray
    generation: int

    @property
    def best(self) -> int:
        """The place of the best configuration; of equal ones, of the first."""
        return int(np.argmax(self.scores))


@dataclass(frozen=True)
class _Settings:
    """The numbers of a search, checked."""

    generations: int
    population: int
    keep: int
    mutations: int
    crossovers: int
    rate: float
    limit: int | None

    def __post_init__(self) -> None:
        counts = {name: integer(0) for name in ("generations", "mutations", "crossovers")}
        rate = number(lambda v: 0 <= v <= 1, "between 0 and 1")
        bounds = {**counts, "population": integer(1), "keep": integer(1), "rate": rate, "limit": integer(0)}
        check_hyperparameters(
            self, bounds=bounds if self.limit is not None else {**bounds, "limit": (lambda v: True, "")}
        )


def glora_evolve(
    adapted: Adapted,
    score: Callable[[Adapted], Any],
    key: jax.Array,
    *,
    generations: int = 20,
    population: int = 50,
    keep: int = 10,
    mutations: int = 25,
    crossovers: int = 25,
    rate: float = 0.2,
    limit: int | None = None,
    progress: Callable[[GloraSearch], None] | None = None,
    resume: GloraSearch | None = None,
) -> tuple[Adapted, GloraSearch]:
    """Searches the configuration of a trained `GLoRA(entangled=True)` that scores best, by evolution.

    The first generation is random. Each later one has `mutations` of the best `keep` so far, in which a support of a matrix
    changes with probability `rate`, `crossovers`, which take every support from one of two of the best, and random ones up to
    `population`. Nothing is scored twice. The weights are those of the supernet, and are not trained again.

    Args:
        adapted: the trained supernet.
        score: the quality of a configuration, higher is better, such as the accuracy on validation data; never on test data,
            which is then no longer one. Jit it, with the `Adapted` as argument: configurations are arrays, so that it compiles
            once.
        key: the same key gives the same search.
        generations: after the random one.
        population: configurations of a generation.
        keep: how many of the best have offspring.
        mutations: of a generation.
        crossovers: of a generation.
        rate: probability that a mutation draws a support anew.
        limit: the largest number of trained values that a configuration may read (see `glora_size`).
        progress: called after every generation with all that was found.
        resume: what a search with the same key and numbers had found, to go on from there as if it had not ended.

    Returns:
        The adapters with the best configuration, which can be saved and merged; and all that was found.

    Raises:
        ValueError: for adapters without an entangled GLoRA, numbers out of range, a score that is not a number, and a limit
            that no random configuration keeps.

    Example:
        >>> supernet = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.GLoRA(entangled=True)})  # then train it
        >>> predict = jlora.lift(model.apply)
        >>> score = jax.jit(lambda adapted: jnp.mean(predict({"params": adapted}, tokens).argmax(-1) == tokens))
        >>> best, search = jlora.glora_evolve(supernet, score, key, generations=2, population=8, limit=500)

    Reference:
        Chavan et al. 2023, arXiv:2306.07967; numbers as in the authors' code, which scores on test data.
    """
    settings = _Settings(generations, population, keep, mutations, crossovers, rate, limit)
    places = _places(adapted)
    search = resume or GloraSearch(np.zeros((0, len(places), 5), np.int32), np.zeros(0), np.zeros(0, np.int64), -1)
    if search.configurations.shape[1:] != (len(places), 5):
        raise ValueError(f"resume is of {search.configurations.shape[1]} matrices, but the adapters have {len(places)}")
    seed = np.asarray(jax.random.key_data(key)).tolist()
    while search.generation < generations:
        drawing = _Drawing(np.random.default_rng([*seed, search.generation + 1]), places)
        new = _generation(drawing, search, settings)
        scores = [_scored(score, glora_configured(adapted, configuration)) for configuration in new]
        search = GloraSearch(
            np.concatenate([search.configurations, np.array(new, np.int32).reshape(-1, len(places), 5)]),
            np.concatenate([search.scores, scores]),
            np.concatenate([search.sizes, np.array([drawing.size(each) for each in new], np.int64)]),
            search.generation + 1,
        )
        if progress is not None:
            progress(search)
    return glora_configured(adapted, search.configurations[search.best]), search


def glora_configured(adapted: Adapted, configuration: Any) -> Adapted:
    """Entangled GLoRA adapters with another configuration.

    Args:
        adapted: the adapters.
        configuration: `[matrices, 5]`, for every matrix of the leaves in their order the places of its kinds in "none",
            "constant", "vector", "low-rank"; arrays of one shape make one compiled program.

    Raises:
        ValueError: for another shape.
    """
    places, frozen = _places(adapted), dict(adapted.frozen)
    configuration = np.asarray(configuration, np.int32)
    if configuration.shape != (len(places), 5):
        raise ValueError(f"the configuration must have the shape {(len(places), 5)}, got {configuration.shape}")
    _check_kinds(places, configuration)
    at = 0
    for site in _sites(adapted):
        old = paths.lookup(adapted.frozen, site.keys)["choice"]
        own = configuration[at : at + old.size // 5].reshape(old.shape)
        at += old.size // 5
        frozen = _with(frozen, (*site.keys, "choice"), jax.device_put(jnp.asarray(own), old.sharding))
    return adapted.replace(frozen=frozen)


def glora_configuration(adapted: Adapted) -> np.ndarray:
    """The configuration of entangled GLoRA adapters, `[matrices, 5]` (see `glora_configured`)."""
    _places(adapted)
    found = [np.asarray(paths.lookup(adapted.frozen, site.keys)["choice"]).reshape(-1, 5) for site in _sites(adapted)]
    return np.concatenate(found)


def glora_size(adapted: Adapted, configuration: Any = None) -> int:
    """How many trained values a configuration reads; by default the one that the adapters have.

    A low-rank support counts `rank * (in + out)`, that of the bias `rank * (in + 1)`, a vector its length, a number 1.
    """
    return _size(_places(adapted), np.asarray(glora_configuration(adapted) if configuration is None else configuration))


def _sites(adapted: Adapted) -> list[Site]:
    return [site for site in adapted.plan.sites if isinstance(site.method, GLoRA) and site.method.entangled]


def _places(adapted: Adapted) -> list[Site]:
    """The site of every matrix that has a configuration."""
    places = [site for site in _sites(adapted) for _ in range(int(np.prod(site.batch_shape)))]
    if not places:
        raise ValueError("no leaf is adapted by GLoRA(entangled=True), so that there is no configuration to choose")
    return places


def _with(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of nested dicts with one value replaced."""
    if not keys:
        return value
    return {**tree, keys[0]: _with(tree[keys[0]], keys[1:], value)}


def _kinds(site: Site) -> list[list[int]]:
    """The numbers of the kinds that each support may have at a site; what changes a bias is left away where there is none."""
    allowed = {name: kinds if site.beside or name in "ab" else ("none",) for name, kinds in CHOICES.items()}
    return [[KINDS.index(kind) for kind in kinds] for kinds in allowed.values()]


def _check_kinds(places: list[Site], configuration: np.ndarray) -> None:
    for site, choice in zip(places, configuration):
        for name, code, kinds in zip(CHOICES, choice, CHOICES.values()):
            if not 0 <= code < len(KINDS) or KINDS[code] not in kinds:
                wanted = [KINDS.index(kind) for kind in kinds]
                raise ValueError(
                    f"{site.path}: the kind of {name} must be one of {wanted} ({', '.join(kinds)}), got {code}"
                )


def _size(places: list[Site], configuration: np.ndarray) -> int:
    return int(np.sum(np.take_along_axis(_sizes(places), np.asarray(configuration)[..., None], axis=-1)))


def _sizes(places: list[Site]) -> np.ndarray:
    """How many trained values each kind of each support reads, `[matrices, 5, kinds]`."""

    def one(site: Site, name: str, kind: str) -> int:
        if kind not in CHOICES[name]:
            return 0
        alone = GLoRA(site.method.rank, **{**dict.fromkeys(CHOICES, "none"), name: kind})  # pyright: ignore
        return alone.number(site.in_size, site.out_size, bool(site.beside))

    by_site = {site: [[one(site, name, kind) for kind in KINDS] for name in CHOICES] for site in dict.fromkeys(places)}
    return np.array([by_site[site] for site in places])


def _scored(score: Callable[[Adapted], Any], adapted: Adapted) -> float:
    found = np.asarray(score(adapted))
    if found.shape != () or np.isnan(found):
        raise ValueError(f"score must return one number for each configuration, got {found}")
    return float(found)


@dataclass(frozen=True)
class _Drawing:
    """Draws configurations of some matrices, and knows their sizes."""

    rng: np.random.Generator
    places: list[Site]

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """By matrix, support and kind."""
        return _sizes(self.places)

    @functools.cached_property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """The kinds that there are, `[matrices, 5, most]`, and how many."""
        kinds = [_kinds(site) for site in self.places]
        counts = np.array([[len(each) for each in one] for one in kinds])
        return np.array([[np.resize(each, len(KINDS)) for each in one] for one in kinds], np.int32), counts

    def random(self) -> np.ndarray:
        """Any configuration."""
        table, counts = self.tables
        return np.take_along_axis(table, self.rng.integers(counts)[..., None], axis=-1)[..., 0]

    def mutated(self, best: np.ndarray, rate: float) -> np.ndarray:
        """One of the best, with some supports drawn anew."""
        parent = best[self.rng.integers(len(best))]
        return np.where(self.rng.random(parent.shape) < rate, self.random(), parent)

    def crossed(self, best: np.ndarray) -> np.ndarray:
        """Every support from one of two of the best."""
        one, other = best[self.rng.integers(len(best), size=2)]
        return np.where(self.rng.random(one.shape) < 0.5, one, other)

    def size(self, configuration: np.ndarray) -> int:
        """How many trained values it reads."""
        return int(np.sum(np.take_along_axis(self.sizes, configuration[..., None], axis=-1)))


def _generation(drawing: _Drawing, search: GloraSearch, settings: _Settings) -> list[np.ndarray]:
    """The configurations of the next generation, none of which was scored before."""
    seen = {each.tobytes() for each in search.configurations}
    new: list[np.ndarray] = []

    def fill(draw: Callable[[], np.ndarray], wanted: int, tries: int) -> None:
        enough = len(new) + wanted
        for _ in range(wanted * tries):
            drawn = draw()
            if drawn.tobytes() not in seen and (settings.limit is None or drawing.size(drawn) <= settings.limit):
                seen.add(drawn.tobytes())
                new.append(drawn)
            if len(new) == enough:
                return

    if len(search.scores):
        best = search.configurations[np.argsort(-search.scores, kind="stable")[: settings.keep]]
        fill(lambda: drawing.mutated(best, settings.rate), settings.mutations, _TRIES)
        fill(lambda: drawing.crossed(best), settings.crossovers, _TRIES)
    fill(drawing.random, settings.population - len(new), _RANDOM_TRIES)
    if not new and not len(search.scores):
        least = min(drawing.size(drawing.random()) for _ in range(100))
        raise ValueError(
            f"no random configuration reads at most {settings.limit} trained values; the smallest of a hundred reads "
            f"{least}: raise limit, or adapt fewer leaves"
        )
    return new
