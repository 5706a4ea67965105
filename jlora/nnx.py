"""Adapters inside of an NNX module, for trainers that ask a model for its `nnx.LoRAParam`s."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from jlora import paths
from jlora.core.transforms.lift import check_options, lift
from jlora.core.transforms.sites import sites
from jlora.core.tree.adapted import Adapted
from jlora.core.tree.adapterize import adapterize
from jlora.core.tree.merge import merge
from jlora.core.tree.spec import Spec


class Constant(nnx.Param):
    """An array that a method keeps and never trains, such as VeRA's projections; a call gives it no gradient."""


class Lifted(nnx.Module):
    """An NNX model that runs with adapters; made by `adapt` or `attach`.

    It is called as the model is, and has the model's attributes. The model's methods run with the adapters too. What a call
    writes into the model's variables (batch statistics, caches, counts of random keys) is there after it. A submodule that
    is taken out and called by itself is the base's own, without adapters.

    `train()` and `eval()` switch the adapters' dropout on and off together with the model's.

    Attributes:
        base: the model, a module of its own that has its `nnx.Param`s in common with the one that was given, and no other
            state.
        lora: the trained arrays as `nnx.LoRAParam`s, laid out like `jlora.Adapted.params`.
    """

    def __init__(self, model: nnx.Module, adapted: Adapted, options: dict[str, Any]):
        self.base = model
        self.lora = nnx.data(jax.tree.map(nnx.LoRAParam, adapted.params))
        self._constants = nnx.data(jax.tree.map(Constant, adapted.frozen))
        self._plan = adapted.plan
        self._options = tuple(options.items())
        self.deterministic = False
        drawn = any(site.method.uses_key for site in adapted.plan.sites)
        self._rngs = nnx.data(nnx.Rngs(dropout=adapted.context.get("dropout", 0)) if drawn else None)

    @property
    def __call__(self) -> Callable[..., Any]:  # a property, so that the signature is the model's own
        return self._method("__call__")

    def __getattr__(self, name: str) -> Any:
        if name == "__signature__" and "base" in vars(self):
            return inspect.signature(self.__call__)
        if "base" not in vars(self) or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        found = getattr(self.base, name)
        return self._method(name) if inspect.ismethod(found) and found.__self__ is self.base else found

    def adapted(self) -> Adapted:
        """The adapters on their base, for `jlora.save`, `jlora.optimizer` and whatever else takes them."""
        frozen = jax.tree.map(jax.lax.stop_gradient, _values(self._constants))
        return Adapted(nnx.state(self.base, nnx.Param), _values(self.lora), frozen, {}, self._plan)

    def merged(self) -> nnx.Module:
        """The model with merged weights: a module of its own class, without adapters.

        Raises:
            ValueError: for a method that no weight can stand for.
        """
        graph, _, rest = nnx.split(self.base, nnx.Param, ...)
        return nnx.merge(graph, merge(self.adapted()), rest, copy=True)

    def _method(self, name: str) -> Callable[..., Any]:
        """A method of the model that runs with the adapters."""
        method = getattr(self.base, name)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._run(name, args, kwargs)

        return call

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graph, _, rest = nnx.split(self.base, nnx.Param, ...)
        outside: list[Any] = []

        def call(params: nnx.State) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            leaves, treedef = jax.tree.flatten(getattr(model, name)(*args, **kwargs))
            # What is no array, such as a setting that a method returns, doesn't go through the trace.
            outside.extend((treedef, [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]))
            outside.append(nnx.graphdef(model))
            return [leaf for leaf in leaves if isinstance(leaf, jax.Array)], _changes(model, params, rest)

        adapted = self.adapted()
        if self._rngs is not None and not self.deterministic:
            adapted = adapted.replace(context={"dropout": self._rngs.dropout()})
        options = dict(self._options)
        options |= {} if name == "__call__" else {"unread": "allow"}
        arrays, changed = lift(call, **options)(adapted)
        if changed:
            nnx.update(self.base, nnx.from_flat_state(changed))
        treedef, leaves, after = outside
        if nnx.graphdef(self.base) != after:
            raise ValueError(
                f"{type(self.base).__name__}.{name} changes attributes that are no nnx.Variable, which a lifted call can't "
                "keep; keep in a Variable what a call is to remember"
            )
        left = iter(arrays)
        return jax.tree.unflatten(treedef, [next(left) if leaf is None else leaf for leaf in leaves])


def adapt(model: nnx.Module, spec: Spec, *inputs: Any, key: jax.Array | None = None, **named: Any) -> Lifted:
    """An NNX model with adapters, for any loop or trainer that trains `nnx.LoRAParam`s.

    Formula: at the start `adapt(model, spec, x)(x) == model(x)`, for methods with an exact start; afterwards as with
    `jlora.lift`.

    Args:
        model: any `nnx.Module`; it is not changed, and has its `nnx.Param`s in common with the result. Where both are arguments
            of one `nnx.grad`, give `nnx.clone(model)`.
        spec: mapping from pattern to method, as for `adapterize`; paths are those of `nnx.state(model, nnx.Param)`.
        *inputs: the inputs of a call, as arrays or `jax.ShapeDtypeStruct`s; they are traced once, to see how the model reads
            its weights. Nothing is computed.
        key: random key of the starting values (default: `jax.random.key(0)`).
        **named: inputs by name.

    Returns:
        A `Lifted`. Call it under `nnx.jit`: it traces the model whenever it is called.

    Raises:
        TypeError: for a model that is no `nnx.Module`, or without inputs; for a spec of the wrong kind.
        ValueError: for a model that has `nnx.LoRAParam`s of its own; for a spec that can't do what it says, as by
            `adapterize`.

    Example:
        >>> model = jlora.nnx.adapt(network, {jlora.ALL_LINEAR: jlora.LoRA(rank=2)}, x)
        >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)
    """
    _check(model)
    if not inputs and not named:
        raise TypeError(
            "adapt(model, spec, *inputs) needs the inputs of one call, arrays or jax.ShapeDtypeStructs: they show how the "
            "model reads its weights"
        )
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def call(params: nnx.State, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[jax.Array]:
        out = nnx.merge(graph, params, rest, copy=True)(*inputs, **named)
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    return attach(model, adapterize(params, spec, key, sites(call, params, inputs, named)))


def attach(
    model: nnx.Module, adapted: Adapted, *, strict: bool = False, unread: str = "error", plan: str = "auto"
) -> Lifted:
    """An NNX model with adapters that were made, prepared or loaded already.

    Args:
        model: the model; it is not changed.
        adapted: adapters on `nnx.state(model, nnx.Param)`, from `adapterize`, `load` or `load_peft`. A key in its `context`
            is where the keys of dropout come from.
        strict: as in `lift`.
        unread: as in `lift`, for calls of the model; its other methods may leave adapted leaves unread.
        plan: as in `lift`.

    Raises:
        TypeError: for a model that is no `nnx.Module`, or adapters that are no `Adapted`.
        ValueError: for adapters on other params than the model's, or a model that has `nnx.LoRAParam`s of its own.

    Example:
        >>> adapted = jlora.adapterize(nnx.state(network, nnx.Param), {r"up/kernel": jlora.LoRA(rank=2)})
        >>> model = jlora.nnx.attach(network, adapted)
    """
    check_options(unread, plan)
    _check(model)
    if not isinstance(adapted, Adapted):
        raise TypeError(f"attach(model, adapted) takes a jlora.Adapted, got {type(adapted).__name__}")
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    wanted, found = paths.shapes(params), paths.shapes(adapted.base)
    if not isinstance(adapted.base, nnx.State) or wanted != found:
        differing = sorted(path for path in {**wanted, **found} if wanted.get(path) != found.get(path))
        raise ValueError(
            f"the adapters are on other params than nnx.state(model, nnx.Param) of this {type(model).__name__}"
            + (f": {differing[0]} is {found.get(differing[0])}, not {wanted.get(differing[0])}" if differing else "")
        )
    options = {"strict": strict, "unread": unread, "plan": plan}
    # Where the arrays are the model's own, so are the variables: nnx.jit gives every variable a new array, and a base in two
    # sets of variables would be there twice after a step.
    own = all(map(operator.is_, jax.tree.leaves(params), jax.tree.leaves(adapted.base)))
    rest = jax.tree.map(lambda array: array, rest)
    return Lifted(nnx.merge(graph, params if own else adapted.base, rest), adapted, options)


def on_state(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer of `adapted.params` as one of a module's `nnx.LoRAParam`s.

    Args:
        tx: such as `jlora.optimizer(model.adapted(), …)`, with its groups and the rank allocation of its methods.

    Raises:
        ValueError: (by its `init` and `update`) for a state that holds other variables than a `Lifted`'s LoRAParams.

    Example:
        >>> model = jlora.nnx.adapt(network, {jlora.ALL_LINEAR: jlora.AdaLoRA(rank=2, target=1, steps=100)}, x)
        >>> tx = jlora.nnx.on_state(jlora.optimizer(model.adapted(), optax.adamw, learning_rate=1e-3))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return inner.init(_adapters(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        params = None if params is None else _adapters(params)
        new, state = inner.update(_adapters(updates), state, params, **extra)
        return _as_state(new, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _adapters(state: Any) -> dict[str, Any]:
    """The arrays of a `Lifted`'s LoRAParams as `adapted.params` has them."""
    names = sorted(state)
    if names != ["lora"]:
        raise ValueError(
            f'on_state wants the state of a jlora.nnx module with wrt=nnx.LoRAParam, {{"lora": …}}; got {names}'
        )
    return nnx.to_pure_dict(state)["lora"]


def _as_state(adapters: Any, state: Any) -> Any:
    """Arrays that are laid out like `adapted.params`, laid out like a state; by path, since a state's order is its own."""
    found, treedef = paths.flatten_with_keys(state)
    return jax.tree.unflatten(treedef, [paths.lookup(adapters, keys[1:]) for keys, _ in found])


def _check(model: Any) -> None:
    """Refuses what is no module, and modules that have adapters already."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"jlora.nnx takes an nnx.Module, got {type(model).__name__}; for a Linen module there is jlora.linen, for a "
            "function of params jlora.lift"
        )
    own = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    if own:
        path = "/".join(map(str, next(iter(own))[0]))
        raise ValueError(
            f"{path} is an nnx.LoRAParam already, which trainers would train too; adapt the model without it"
        )


def _values(variables: Any) -> Any:
    """Nested dicts of variables as dicts of their arrays."""
    return jax.tree.map(lambda v: v.get_value(), variables, is_leaf=lambda v: isinstance(v, nnx.Variable))


def _changes(model: nnx.Module, params: nnx.State, rest: nnx.State) -> dict[Any, Any]:
    """What a call wrote into a model's variables, by path.

    Raises:
        ValueError: for a parameter that the call replaced, which would not be the base's any more.
    """
    _, now_params, now_rest = nnx.split(model, nnx.Param, ...)
    before = {path: v.get_raw_value() for path, v in nnx.to_flat_state(params)}
    for path, variable in nnx.to_flat_state(now_params):
        if variable.get_raw_value() is not before.get(path):
            raise ValueError(
                f"the call changes the parameter {'/'.join(map(str, path))}, which stays as it is under adapters; make it a "
                "Variable of another kind"
            )
    known = {path: v.get_raw_value() for path, v in nnx.to_flat_state(rest)}
    return {p: v for p, v in nnx.to_flat_state(now_rest) if p not in known or v.get_raw_value() is not known[p]}
