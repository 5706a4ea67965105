"""Adapters inside of a Linen module, for trainers that make and keep the params themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import subtract_filters

from jlora import paths
from jlora.core.transforms.lift import lift
from jlora.core.transforms.sites import sites
from jlora.core.tree.adapted import Adapted
from jlora.core.tree.adapterize import adapterize
from jlora.core.tree.merge import merge

#: The collection in which arrays lie that a method keeps and never trains.
CONSTANTS = "lora_constants"


class Lifted(nn.Module):
    """A Linen model with adapters, whose params are `{"base": …, "lora": …}`.

    Formula: at the start `Lifted(model, spec).apply(v, x) == model.apply({"params": v["params"]["base"]}, x)`, for methods with
    an exact start; afterwards as with `jlora.lift`. The base gets gradients of zero; give it no optimizer state either, by an
    optimizer for the params below "lora" alone. The model's other collections are the module's own, and so are its random
    streams; a stream "dropout" switches the adapters' dropout on.

    Constants of a method, such as VeRA's projections, are in a collection of their own, `lora_constants`.

    Args:
        model: any Linen module, as it would be given `init` and `apply`.
        spec: mapping from pattern to method, as for `adapterize`; paths are those of the model's own params.

    Raises:
        TypeError: (when called) for a model that is no Linen module, or a spec of the wrong kind.
        ValueError: (when called) for a spec that can't do what it says; for a call that reads the model's weights otherwise
            than the one by which the adapters were made.

    Example:
        >>> lifted = jlora.linen.Lifted(model, {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=2)})
        >>> variables = jax.jit(lifted.init)(key, tokens)
        >>> logits = lifted.apply(variables, tokens)
    """

    model: nn.Module
    spec: Mapping[Any, Any]

    def __post_init__(self) -> None:
        # As pairs: Linen sorts the keys of a mapping, and takes texts alone for keys.
        spec = tuple(self.spec.items()) if isinstance(self.spec, Mapping) else self.spec
        object.__setattr__(self, "spec", spec)
        super().__post_init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call, with adapters."""
        adapted, call = self._ready(args, kwargs)
        out, changed = lift(call)(adapted)
        for collection, values in changed.items():
            self.put_variable(collection, "base", values)
        return out

    def adapted(self, *args: Any, **kwargs: Any) -> Adapted:
        """The adapters on their base, of a call with these inputs: `lifted.apply(variables, x, method="adapted")`."""
        return self._ready(args, kwargs)[0].replace(context={})

    def merged(self, *args: Any, **kwargs: Any) -> Any:
        """Merged params for the plain model: `lifted.apply(variables, x, method="merged")`."""
        return merge(self.adapted(*args, **kwargs))

    def _ready(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Adapted, Callable[[Any], Any]]:
        """The adapters, and the model's call as a function of its params; both are made first where they are not there yet."""
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"Lifted takes a Linen module, got {type(self.model).__name__}")
        assert self.scope is not None
        model = self.model.clone(parent=None)
        rngs = {name: self.make_rng(name) for name in self.scope.rngs}
        self._require("base", lambda: jax.jit(lambda: model.init(rngs, *args, **kwargs))())
        rest = {name: held["base"] for name, held in self.variables.items() if name != "params" and "base" in held}
        mutable = subtract_filters(self.scope.mutable, ["params", CONSTANTS])

        def call(params: Any) -> Any:
            return model.apply({"params": params, **rest}, *args, rngs=rngs, mutable=mutable, **kwargs)

        base = jax.lax.stop_gradient(self.get_variable("params", "base"))
        report = sites(lambda params: call(params)[0], base)
        key = self.make_rng("params") if self.has_rng("params") else None
        spec = dict(self.spec) if isinstance(self.spec, tuple) else self.spec
        start = lambda: adapterize(base, spec, key, report)  # noqa: E731
        self._require("lora", lambda: _collections(jax.jit(start)()))
        adapted = self._held(jax.eval_shape(start), base)
        if self.has_rng("dropout") and any(site.method.uses_key for site in adapted.plan.sites):
            adapted = adapted.replace(context={"dropout": self.make_rng("dropout")})
        return adapted, call

    def _require(self, name: str, make: Callable[[], Mapping[str, Any]]) -> None:
        """Makes what is not among the params yet, if the params may be written.

        Raises:
            ValueError: where they may not.
        """
        if self.has_variable("params", name):
            return
        if not self.is_mutable_collection("params"):
            found = sorted(self.variables.get("params", {}))
            raise ValueError(
                f'the params of a jlora.linen.Lifted are {{"base": …, "lora": …}}, got {found}: take those that its init '
                "makes; to start from trained params, init by "
                'lifted.apply({"params": {"base": params}}, *inputs, rngs={"params": key}, mutable=True)[1]'
            )
        for collection, values in make().items():
            self.put_variable(collection, name, values)

    def _held(self, shapes: Adapted, base: Any) -> Adapted:
        """The adapters that the variables hold, of the plan that this call gives.

        Raises:
            ValueError: for others.
        """
        params = self.get_variable("params", "lora")
        frozen = self.get_variable(CONSTANTS, "lora", {})
        wanted = paths.shapes({"params": shapes.params, CONSTANTS: shapes.frozen})
        found = paths.shapes({"params": params, CONSTANTS: frozen})
        if wanted != found:
            path = min(path for path in {**wanted, **found} if wanted.get(path) != found.get(path))
            raise ValueError(
                f"by this call the adapters would be others than those in the variables: {path} would be {wanted.get(path)}, "
                f"but is {found.get(path)}; name the leaves in the spec, so that it doesn't depend on the call, and pass the "
                f"collection {CONSTANTS!r} too"
            )
        return Adapted(base, params, frozen, {}, shapes.plan)

    def __kontext_keys__(self) -> Any:
        """The model's own names of inputs, for kauldron, which asks for them."""
        from kauldron import kontext  # pyright: ignore[reportMissingImports]  # it is there where it asks

        return kontext.get_keypaths(self.model)


def _collections(adapted: Adapted) -> dict[str, Any]:
    """What is put into which collection at the start."""
    return {"params": adapted.params, **({CONSTANTS: adapted.frozen} if adapted.frozen else {})}
