"""The ways to train a model that are measured beside each other, each as one optimizer step."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from problems import Problem

import jlora
from jlora import paths

PLANS = ("auto", "factored", "merged")


@dataclass(frozen=True)
class Variant:
    """A jitted step `(base, trained, state, batch) -> (trained, state, loss)` and what it starts from.

    The base is an argument, so no copy of it is compiled in; what is trained and the optimizer's state are donated.
    """

    step: Any
    base: Any
    trained: Any
    state: Any
    batch: Any

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.base, self.trained, self.state, self.batch


def variant(loss: Callable[..., jax.Array], base: Any, trained: Any, batch: Any) -> Variant:
    """AdamW on `loss(base, trained, batch)`."""
    tx = optax.adamw(1e-4)

    def step(base, trained, state, batch):
        value, grads = jax.value_and_grad(lambda t: loss(base, t, batch))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    trained = jax.tree.map(jnp.copy, trained)  # donated, and several variants start from the same arrays
    return Variant(jax.jit(step, donate_argnums=(1, 2)), base, trained, tx.init(trained), batch)


def bound(p: Problem) -> Variant:
    """Only a scale of the input embedding is trained: forward and backward pass, and no weight gradient."""

    def loss(base, scale, batch):
        flat = flatten_dict(base)
        table = flat[p.embedding]
        return p.loss(p.net.apply, unflatten_dict({**flat, p.embedding: table * scale.astype(table.dtype)}), batch)

    width = flatten_dict(p.params)[p.embedding].shape[1]
    return variant(loss, p.params, jnp.ones(width), p.batch)


def full(p: Problem) -> Variant:
    """Every leaf is trained."""
    return variant(lambda _, params, batch: p.loss(p.net.apply, params, batch), None, p.params, p.batch)


def adapt(p: Problem, method: jlora.Method) -> jlora.Adapted:
    """The method on the problem's kernels."""
    report = jlora.sites(p.net.apply, {"params": p.params}, *p.inputs)
    return jlora.adapterize(p.params, {p.kernels: method}, sites=report)


def lifted(p: Problem, adapted: jlora.Adapted, plan: str = "auto") -> Variant:
    """jlora."""
    apply = jlora.lift(p.net.apply, plan=plan)

    def loss(base, params, batch):
        return p.loss(apply, adapted.replace(base=base, params=params), batch)

    return variant(loss, p.params, adapted.params, p.batch)


def with_factors(apply: Callable[..., Any], scale: float) -> Callable[..., Any]:
    """`x @ w + scale * ((x @ a) @ b)` in every Dense that has `a` and `b` beside its kernel, as everybody writes it."""

    def interceptor(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.Dense) and context.module.has_variable("params", "a"):
            a, b = (context.module.get_variable("params", name).astype(y.dtype) for name in "ab")
            y = y + scale * ((args[0] @ a) @ b)
        return y

    def applied(*args, **kwargs):
        with nn.intercept_methods(interceptor):
            return apply(*args, **kwargs)

    return applied


def beside(base: Any, factors: Any) -> Any:
    """The params tree with `a` and `b` next to each adapted kernel."""
    if "kernel" in base and "kernel" in factors:
        return {**base, **factors["kernel"]}
    return {name: beside(sub, factors[name]) if name in factors else sub for name, sub in base.items()}


def naive(p: Problem, adapted: jlora.Adapted) -> Variant:
    """The usual formula with plain automatic differentiation."""
    apply = with_factors(p.net.apply, 2.0)

    def loss(base, factors, batch):
        return p.loss(apply, beside(base, factors), batch)

    return variant(loss, p.params, adapted.params, p.batch)


def qwix(p: Problem, adapted: jlora.Adapted, rank: int) -> Variant:
    """The same kernels adapted by qwix."""
    import qwix as library

    modules = "|".join(re.escape("/".join(site.keys[:-1])) for site in adapted.plan.sites)
    provider = library.LoraProvider(module_path=modules, rank=rank, alpha=2.0 * rank)
    net = library.apply_lora_to_model(p.net, provider)
    flat = flatten_dict(nn.unbox(net.init(jax.random.key(0), *p.inputs)["params"]))
    factors = {keys: leaf for keys, leaf in flat.items() if keys[-1].endswith(("lora_a", "lora_b"))}
    if len(factors) != 2 * len(adapted.plan.sites):
        raise RuntimeError(f"qwix made {len(factors)} factors for {len(adapted.plan.sites)} kernels")
    names = {"/".join(keys): keys for keys in factors}

    def loss(base, trained, batch):
        both = {**flatten_dict(base), **{names[name]: leaf for name, leaf in trained.items()}}
        return p.loss(net.apply, unflatten_dict(both), batch)

    return variant(loss, p.params, {name: factors[keys] for name, keys in names.items()}, p.batch)


def all_variants(p: Problem, rank: int) -> dict[str, Variant]:
    """Every way, by name; qwix where it is installed."""
    lora = adapt(p, jlora.LoRA(rank, alpha=2 * rank))
    found = {"bound": bound(p), **{f"jlora {plan}": lifted(p, lora, plan) for plan in PLANS}}
    found["jlora DoRA"] = lifted(p, adapt(p, jlora.DoRA(jlora.LoRA(rank, alpha=2 * rank))))
    found["naive"] = naive(p, lora)
    if importlib.util.find_spec("qwix"):
        found["qwix"] = qwix(p, lora, rank)
    found["full"] = full(p)
    return found


def distinct_inputs_bytes(p: Problem, adapted: jlora.Adapted) -> int:
    """Bytes of each distinct input of the adapted kernels, once: what any low-rank method keeps beyond the bound."""
    keys = {site.keys for site in adapted.plan.sites}
    leaves, treedef = paths.flatten_with_keys(p.params)
    closed = jax.make_jaxpr(lambda *arrays: p.loss(p.net.apply, jax.tree.unflatten(treedef, list(arrays)), p.batch))(
        *[leaf for _, leaf in leaves]
    )
    weights = {var for var, (path, _) in zip(closed.jaxpr.invars, leaves) if path in keys}
    return sum(var.aval.size * var.aval.dtype.itemsize for var in _inputs(closed.jaxpr, weights))


def _inputs(jaxpr: Any, weights: set[Any]) -> set[Any]:
    """Variables that are contracted with one of the weights, however deep the products lie."""
    found: set[Any] = set()
    for eqn in jaxpr.eqns:
        held = [atom for atom in eqn.invars if not hasattr(atom, "val") and atom in weights]
        if not held:
            continue
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name == "dot_general":
            found |= {atom for atom in eqn.invars if atom not in weights}
        elif eqn.primitive.name in ("jit", "pjit") and inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            names = dict(zip(inner.invars, eqn.invars))
            found |= {names.get(var, var) for var in _inputs(inner, {v for v in inner.invars if names[v] in held})}
        elif len(eqn.outvars) == 1:
            weights = weights | set(eqn.outvars)
    return found
