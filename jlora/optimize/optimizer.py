"""`optimizer`: what the methods ask of an optimizer, as one for each group of fields of equal learning rate and decay."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import optax

from jlora import paths
from jlora.core.protocol.lifelong import Lifelong
from jlora.core.protocol.method import Method
from jlora.core.tree.adapted import SHARED, Adapted
from jlora.optimize import together
from jlora.optimize.allocate import inside
from jlora.optimize.placed import placed

#: The learning-rate groups: a factor on the input side, one on the output side, a vector, an embedding's factors.
GROUPS = ("a", "b", "vector", "embedding")


def labels(adapted: Adapted) -> dict[str, Any]:
    """The learning-rate group of every trained leaf, laid out like `adapted.params`.

    Raises:
        ValueError: for a method that labels other fields than it trains, or uses an unknown group; for a trained array that
            is no method's.
    """
    tree: dict[str, Any] = {}
    for site in adapted.plan.sites:
        given, trained = site.method.labels(site), paths.lookup(adapted.params, site.keys)
        _check(site.path, site.method, given, trained, "in the method's axes, or in its labels")
        paths.insert(tree, site.keys, given)
    for method, name in adapted.plan.shared_names().items():
        if trained := paths.lookup(adapted.params, (SHARED, name)):
            given = method.shared_labels(trained)
            _check(f"{SHARED}/{name}", method, given, trained, "in the method's shared_labels")
            paths.insert(tree, (SHARED, name), given)
    _labelled(adapted.params, tree)
    return tree


def _check(path: str, method: Method, given: dict[str, str], trained: Any, where: str) -> None:
    """Refuses labels of other arrays than those that are trained, or of an unknown group.

    Raises:
        ValueError: with the arrays and the labels.
    """
    if unlabelled := sorted(set(trained) - set(given)):
        raise ValueError(
            f"{path}/{unlabelled[0]}: {method} trains this array but gives it no learning-rate group: name it {where} "
            f"(it labels {given}; the groups are {GROUPS})"
        )
    if set(given) != set(trained) or not set(given.values()) <= set(GROUPS):
        raise ValueError(f"{path}: {method} labels {given}, but trains {sorted(trained)}; the groups are {GROUPS}")


def _labelled(trained: Any, tree: dict[str, Any]) -> Any:
    """The label of each trained array, laid out like those.

    Raises:
        ValueError: for an array without one.
        TypeError: for an `Adapted`.
    """
    together.check_trained(trained)
    known = dict(paths.flatten_with_keys(tree)[0])
    leaves, treedef = paths.flatten_with_keys(trained)
    found = []
    for keys, _ in leaves:
        label = next((known[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in known), None)
        if label is None:
            raise ValueError(
                f"{'/'.join(keys)}: this trained array is no method's, and so has no learning rate; adapt its leaf by "
                "jlora.Full(), or give it an optimizer of its own, by optax.partition around jlora.optimizer(...)"
            )
        found.append(label)
    return jax.tree.unflatten(treedef, found)


def optimizer(
    adapted: Adapted,
    factory: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule | None,
    *,
    ratio: float | jax.Array | None = None,
    embedding_learning_rate: optax.ScalarOrSchedule | None = None,
    zero: str | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """An optimizer for `adapted.params` that gives every field the learning rate and decay of its group.

    | group | which | learning rate | weight decay |
    |---|---|---|---|
    | a | LoRA's `a`, other matrices such as a head | `learning_rate` | as given |
    | b | LoRA's `b` | `ratio * learning_rate` | as given |
    | vector | biases, norms, DoRA's magnitude | `ratio * learning_rate` | none |
    | embedding | factors of an embedding | `embedding_learning_rate` | as given |

    Fields for which a method gives a rate of its own (`Method.rates`, `Method.shared_rates`) have that multiple of their
    group's. What methods ask for beyond rates, such as rank allocation, is wrapped around the whole (`with_rules`).

    Fields of equal rate and decay share one optimizer, which sees them as one tree: without `ratio`, and without decay or
    without vectors, it is `factory(learning_rate, **options)` itself, to the bit and with its state. What such an optimizer
    does with all arrays together (a clip inside the factory, Prodigy's estimate, L-BFGS) it does group by group where rates
    differ. Arrays that a restart renews at another time than others, or never, have an optimizer and so a step count of their
    own, unless it looks at arrays together.

    With `ratio` this is LoRA+. Its rule gives all trained vectors the rate of `b`; DoRA's magnitude belongs to them, and
    never decays, since decay would shrink the base.

    Args:
        adapted: what is trained.
        factory: an optax optimizer, called as `factory(learning_rate, **options)`, such as `optax.adamw`.
        learning_rate: a number or schedule; None for a factory that needs none, such as `optax.lbfgs`.
        ratio: LoRA+'s lambda, a number or a traced scalar; None means 1, without LoRA+'s embedding rate.
        embedding_learning_rate: default 1e-6 with `ratio` (LoRA+'s reference), else `learning_rate`.
        zero: a mesh axis over which all moments are cut besides (ZeRO): each of its devices keeps and computes its part, and
            the steps are gathered. `jlora.mesh.moments` tells where each lies. Numbers change by rounding alone.
        **options: passed on; `weight_decay` is taken out for vectors.

    Returns:
        An optax transformation whose state follows `adapted.params`, on a mesh too: see `with_rules`.

    Raises:
        ValueError: for a ratio that is not positive; for a multiple of a learning rate of None; for several groups, where the
            optimizer is one that works on all arrays alone (Prodigy, D-Adaptation, line searches); for a trained array
            without a group (see `labels`), also where `init` or `update` gets one; for a `zero` that can't be (see
            `jlora.mesh.moments`).
        TypeError: where `init` or `update` gets the whole `Adapted`.

    Example:
        >>> tx = jlora.optimizer(adapted, optax.adamw, learning_rate=2e-4, ratio=16, weight_decay=0.01)

    Reference:
        Hayou et al. 2024, arXiv:2402.12354; for `zero`, stage 1 of Rajbhandari et al. 2019, arXiv:1910.02054.
    """
    if isinstance(ratio, int | float) and not ratio > 0:
        raise ValueError(f"LoRA+'s ratio must be positive, got {ratio!r}")
    fast = learning_rate if ratio is None else scaled(learning_rate, ratio)
    if embedding_learning_rate is None:
        embedding_learning_rate = learning_rate if ratio is None else 1e-6
    undecayed = _undecayed(factory, options)
    groups = {
        "a": (learning_rate, options),
        "b": (fast, options),
        "vector": (fast, undecayed),
        "embedding": (embedding_learning_rate, options),
    }
    tree = _with_rates(adapted, labels(adapted))
    tree, made = _made(adapted, tree, lambda tree: _merged(tree, groups, factory))
    return with_rules(adapted, _of_groups(made, tree), zero=zero)


def _undecayed(factory: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options without weight decay: the same object where they have none."""
    decay = inspect.signature(factory).parameters.get("weight_decay")
    used = None if decay is None else options.get("weight_decay", decay.default)
    if decay is None or (isinstance(used, int | float) and used == 0):
        return options
    return {**options, "weight_decay": 0.0}


def _merged(tree: Any, groups: dict[str, Any], factory: Callable[..., Any]) -> tuple[Any, dict[Any, Any]]:
    """The tree of labels with one label for all of equal rate, options and renewal, and the optimizer of each."""
    first: dict[Hashable, str] = {}
    names: dict[str, str] = {}
    made: dict[Any, Any] = {}
    for label in sorted(set(jax.tree.leaves(tree))):
        named, _, renewal = label.partition(", ")
        group, _, factor = named.partition(" x ")
        rate, options = groups[group]
        factor = float(factor or 1)
        # Equal numbers are equal rates; schedules and traced scalars are only where they are one object, and so is 0: a state
        # that is made with that in a rate's place must fit the rate.
        own = float(rate * factor) if isinstance(rate, int | float) and rate else (id(rate), factor)
        names[label] = first.setdefault((own, id(options), renewal), label)
        if names[label] == label:
            made[label] = factory(scaled(rate, factor), **options)
    return jax.tree.map(names.__getitem__, tree), made


def _made(
    adapted: Adapted, tree: Any, merged: Callable[[Any], tuple[Any, dict[str, Any]]]
) -> tuple[Any, dict[str, Any]]:
    """The labels and their optimizers: without renewals, where these would cut what looks at arrays together.

    Raises:
        ValueError: for an optimizer that can't be one of several.
    """
    apart = merged(tree)
    whole = merged(jax.tree.map(lambda label: label.partition(", ")[0], tree))
    cut = len(whole[1]) < len(apart[1]) and any(together.coupled(tx, adapted.params) for tx in whole[1].values())
    tree, made = whole if cut else apart
    if len(made) > 1:
        together.check_several(made, adapted.params)
    return tree, made


def _of_groups(made: dict[Any, Any], tree: dict[str, Any]) -> optax.GradientTransformation:
    """The optimizer of all groups; that of the only one sees the whole tree, and its state is its own."""
    # `optax.tree_map_params` calls with a stand-in for the params, which has no leaves.
    chosen = lambda trained: _labelled(trained, tree) if jax.tree.leaves(trained) else tree  # noqa: E731
    if len(made) != 1:
        return optax.partition(made, chosen)
    (inner,) = map(optax.with_extra_args_support, made.values())

    def init(params: Any) -> Any:
        chosen(params)
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        chosen(updates)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def with_rules(
    adapted: Adapted, tx: optax.GradientTransformation, *, zero: str | None = None
) -> optax.GradientTransformation:
    """An optimizer of your own, wrapped by what the methods ask for: rank allocation, penalties, proximal steps.

    `optimizer` does this already. Sites whose methods have equal rules share one, and so one rank budget. Where the trained
    arrays lie on a mesh with automatic axes, moments lie beside them, step counts on every device, and steps and state stay
    there, so that a training step is compiled once: make the optimizer of what lies where it is trained. Where no method has a
    rule, and off a mesh, this is `tx` itself. Params in any mapping (`FrozenDict`, `nnx.State`) give updates in that mapping;
    the state is laid out by plain dicts.

    Args:
        adapted: what is trained.
        tx: the optimizer.
        zero: as for `optimizer`.

    Raises:
        ValueError: for an optimizer that a rule can't have inside it: one that accumulates gradients, or is schedule-free;
            and, by its `update`, for one that leaves some arrays their raw gradients.
        TypeError: where `init` or `update` of an optimizer with a rule gets the whole `Adapted`.

    Example:
        >>> tx = jlora.with_rules(adapted, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
    """
    sites = tuple(site for site in adapted.plan.sites if site.method.optimizer_rule is not None)
    if sites:
        tx = inside.around(tx, adapted, sites[0])
    for rule in dict.fromkeys(site.method.optimizer_rule for site in sites):
        assert rule is not None
        given = getattr(rule, "with_constants", None)
        bound = rule if given is None else given(adapted.frozen)
        tx = bound.wrap(tx, tuple(site for site in sites if site.method.optimizer_rule == rule))
    return placed(together.in_dicts(tx) if sites else tx, adapted, zero)


def _with_rates(adapted: Adapted, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of groups with the factors of fields that have a rate of their own, as "group x factor".

    Fields whose moments a restart renews at a time of their own, or never, have a label of their own (", link 0", ", kept"),
    and so an optimizer of their own: its step count is renewed together with its moments.
    """
    links: dict[Any, int] = {}
    shared = {
        m: fields for m, name in adapted.plan.shared_names().items() if (fields := paths.lookup(tree, (SHARED, name)))
    }
    for site in adapted.plan.sites:
        fields, method = paths.lookup(tree, site.keys), site.method
        _multiply(fields, method.rates(site))
        if not method.restarts or (method in shared and not isinstance(method, Lifelong)):
            fields |= {name: f"{label}, kept" for name, label in fields.items()}
        elif method.kept_fields and method.event is not None:
            number = links.setdefault(method.event, len(links))
            fields |= {name: f"{label}, link {number}" for name, label in fields.items()}
    for method, fields in shared.items():
        _multiply(fields, method.shared_rates())
        fields |= {name: f"{label}, kept" for name, label in fields.items()}
    return tree


def _multiply(fields: dict[str, str], rates: dict[str, float]) -> None:
    """Writes the factors of fields with a rate of their own into their labels."""
    for name, factor in rates.items():
        if factor != 1:
            fields[name] = f"{fields[name]} x {factor!r}"


def scaled(rate: optax.ScalarOrSchedule | None, factor: float | jax.Array) -> Any:
    """A learning rate or schedule times a factor; factor 1 gives the very same object.

    Raises:
        ValueError: for a multiple of None.
    """
    if isinstance(factor, int | float) and factor == 1:
        return rate
    if rate is None:
        raise ValueError(
            f"{factor} times the learning rate is asked for, by ratio or a method's rates, but learning_rate is None: give "
            "one, or leave the ratio out"
        )
    if callable(rate):
        return lambda count: factor * rate(count)
    return factor * rate
