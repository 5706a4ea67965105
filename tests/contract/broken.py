"""Methods that are wrong in one way each, and the check that must reject them. `Sound` is what they are made from."""

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.method import Factors, Method, Start
from jlora.methods.lora import kaiming


@dataclass(frozen=True)
class Sound(Method):
    """Nothing is wrong: `w + strength * a @ b`.

    Trains `2 * (in + out)` values.
    """

    strength: float = 2.0
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    @property
    def axes(self):
        return {"a": ("in", "rank"), "b": ("rank", "out")}

    def start(self, key, w, site):
        return Start({"a": kaiming(key, (w.shape[0], 2), jnp.float32), "b": jnp.zeros((2, w.shape[1]))})

    def weight(self, view):
        a, b = view.params["a"], view.params["b"]
        return view.w.astype(a.dtype) + self.strength * a @ b

    def factors(self, view):
        return Factors(view.params["a"], self.strength * view.params["b"])

    def labels(self, site):
        return {"a": "a", "b": "b"}


BROKEN: list[tuple[type[Sound], str, type[Exception]]] = []


def rejected_by(check, error=AssertionError):
    """Makes a broken method of a class: says which check rejects it, and by which error."""

    def register(cls):
        cls = dataclass(frozen=True)(cls)
        if cls.__doc__ is None or cls.__doc__.startswith(cls.__name__ + "("):
            cls.__doc__ = Sound.__doc__
        BROKEN.append((cls, check, error))
        return cls

    return register


@rejected_by("check_start")
class StartsElsewhere(Sound):
    def start(self, key, w, site):
        return Start({"a": kaiming(key, (w.shape[0], 2), jnp.float32), "b": jnp.ones((2, w.shape[1]))})


@rejected_by("check_start")
class DeclaresAnInexactStart(Sound):
    exact_start: ClassVar[bool] = False


@rejected_by("check_agree")
class FactorsScaledTwice(Sound):
    def factors(self, view):
        return Factors(self.strength * view.params["a"], self.strength * view.params["b"])


@rejected_by("check_agree")
class FactorsWithoutGradient(Sound):
    def factors(self, view):
        return Factors(jax.lax.stop_gradient(view.params["a"]), self.strength * view.params["b"])


@rejected_by("check_merge")
class MergesWithoutScale(Sound):
    factors = Sound.factors  # its own: a class that overrides `weight` alone is computed by that

    def weight(self, view):
        return view.w + view.params["a"] @ view.params["b"]


@rejected_by("check_learn")
class LearnsTooLittle(Sound):
    def weight(self, view):
        b = view.params["b"]
        return Sound.weight(self, replace(view, params={**view.params, "b": _deaf(b)}))

    def factors(self, view):
        return Factors(view.params["a"], self.strength * _deaf(view.params["b"]))


def _deaf(b):
    """`b`, of which the first row alone has a gradient."""
    return jnp.concatenate([b[:1], jax.lax.stop_gradient(b[1:])])


@rejected_by("check_gradient")
class DeadField(Sound):
    def weight(self, view):
        return view.w + self.strength * jax.lax.stop_gradient(view.params["a"]) @ view.params["b"]

    factors = FactorsWithoutGradient.factors


@rejected_by("check_gradient")
class TrainsAFrozenArray(Sound):
    def start(self, key, w, site):
        start = Sound.start(self, key, w, site)
        return replace(start, frozen={"a": start.params["a"]})


@rejected_by("check_trace_once")
class HashedByIdentity(Sound):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@rejected_by("check_dtype")
class AdaptersInTheBasesDtype(Sound):
    def start(self, key, w, site):
        start = Sound.start(self, key, w, site)
        return Start(jax.tree.map(lambda leaf: leaf.astype(w.dtype), start.params))


@rejected_by("check_dtype", jax.errors.TypePromotionError if hasattr(jax.errors, "TypePromotionError") else ValueError)
class PromotesInSilence(Sound):
    def weight(self, view):
        return view.w + self.strength * view.params["a"] @ view.params["b"]


@rejected_by("check_vmap", jax.errors.TracerBoolConversionError)
class DecidesOnTheHost(Sound):
    def start(self, key, w, site):
        start = Sound.start(self, key, w, site)
        return start if start.params["a"][0, 0] > 0 else replace(start)


@rejected_by("check_keys")
class SameKeyEverywhere(Sound):
    def start(self, key, w, site):
        return Sound.start(self, jax.random.key(0), w, site)


@rejected_by("check_keys")
class SameFrozenArrayEverywhere(Sound):
    def start(self, key, w, site):
        return replace(Sound.start(self, key, w, site), frozen={"c": jnp.arange(4.0)})


@rejected_by("check_keys")
class DeclaresAlikeWhatIsDrawn(Sound):
    @property
    def alike(self):
        return frozenset({"a"})


@rejected_by("check_mesh")
class ClaimsToBeLocal(Sound):
    def weight(self, view):
        w = Sound.weight(self, view)
        return w / jax.lax.stop_gradient(jnp.linalg.norm(w))

    def factors(self, view):
        n = jax.lax.stop_gradient(jnp.linalg.norm(Sound.weight(self, view)))
        return replace(Sound.factors(self, view), scale=jnp.full(view.w.shape[1], 1 / n))


@rejected_by("check_mesh", TypeError)
class CutsNothing(Sound):
    @property
    def axes(self):
        return {"a": ("", "rank"), "b": ("rank", "")}


@rejected_by("check_lift")
class ReadsTheLeafsShape(Sound):
    def factors(self, view):
        correction = view.site.shape[-1] / view.w.shape[-1]
        return Factors(view.params["a"], correction * self.strength * view.params["b"])


@rejected_by("check_labels")
class MissingLabel(Sound):
    def labels(self, site):
        return {"a": "a"}


@rejected_by("check_labels")
class UnknownGroup(Sound):
    def labels(self, site):
        return {"a": "a", "b": "fast"}


@rejected_by("check_labels")
class TurnedLabels(Sound):
    def labels(self, site):
        return {"a": "b", "b": "a"}


@rejected_by("check_labels")
class AxesOfAnotherShape(Sound):
    @property
    def axes(self):
        return {"a": ("in",), "b": ("rank", "out")}


@rejected_by("check_io")
class KeepsStateOutsideTheDrawers(Sound):
    """Trains `2 * (in + out)` values."""

    def __post_init__(self):
        object.__setattr__(self, "hidden", next(_NUMBERS))

    def factors(self, view):
        return Factors(view.params["a"], self.hidden * view.params["b"])


_NUMBERS = iter(np.linspace(1, 2, 1000).tolist())


@rejected_by("check_count")
class CountsWrong(Sound):
    """Trains `2 * in + out` values."""


@rejected_by("check_count")
class StatesNoCount(Sound):
    """Says nothing."""


@rejected_by("check_serialisation", ValueError)
class HoldsAFunction(Sound):
    activation: Any = field(default=functools.partial(math.pow, 2))


@rejected_by("check_serialisation")
class ChangesItsHyperparameters(Sound):
    def __post_init__(self):
        object.__setattr__(self, "strength", 2 * self.strength)
