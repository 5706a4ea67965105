"""`optimizer`: what the methods ask of an optimizer, as an optax partition over the learning-rate groups of their fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import optax

from jlora import paths
from jlora.core.protocol.method import Method
from jlora.core.tree.adapted import SHARED, Adapted
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
    """
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
    learning_rate: optax.ScalarOrSchedule,
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

    With `ratio` this is LoRA+. Its rule gives all trained vectors the rate of `b`; DoRA's magnitude belongs to them, and
    never decays, since decay would shrink the base.

    Args:
        adapted: what is trained.
        factory: an optax optimizer, called as `factory(learning_rate, **options)`, such as `optax.adamw`.
        learning_rate: a number or schedule.
        ratio: LoRA+'s lambda, a number or a traced scalar; None means 1, without LoRA+'s embedding rate.
        embedding_learning_rate: default 1e-6 with `ratio` (LoRA+'s reference), else `learning_rate`.
        zero: a mesh axis over which all moments are cut besides (ZeRO): each of its devices keeps and computes its part, and
            the steps are gathered. `jlora.mesh.moments` tells where each lies. Numbers change by rounding alone.
        **options: passed on; `weight_decay` is taken out for vectors.

    Returns:
        An optax transformation whose state follows `adapted.params`, on a mesh too: see `with_rules`.

    Raises:
        ValueError: for a ratio that is not positive; for a trained array without a group (see `labels`), also where `init` or
            `update` gets one; for a `zero` that can't be (see `jlora.mesh.moments`).

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
    decays = "weight_decay" in inspect.signature(factory).parameters
    undecayed = {**options, "weight_decay": 0.0} if decays else options
    groups = {
        "a": (learning_rate, options),
        "b": (fast, options),
        "vector": (fast, undecayed),
        "embedding": (embedding_learning_rate, options),
    }
    tree = _with_rates(adapted, labels(adapted))
    used: dict[Hashable, optax.GradientTransformation] = {}
    for label in sorted(set(jax.tree.leaves(tree))):
        group, _, factor = label.partition(", ")[0].partition(" x ")
        rate, given = groups[group]
        used[label] = factory(scaled(rate, float(factor)) if factor else rate, **given)
    # `optax.tree_map_params` calls with a stand-in for the params, which has no leaves.
    chosen = lambda trained: _labelled(trained, tree) if jax.tree.leaves(trained) else tree  # noqa: E731
    return with_rules(adapted, optax.partition(used, chosen), zero=zero)


def with_rules(
    adapted: Adapted, tx: optax.GradientTransformation, *, zero: str | None = None
) -> optax.GradientTransformation:
    """An optimizer of your own, wrapped by what the methods ask for: rank allocation, penalties, proximal steps.

    `optimizer` does this already. Sites whose methods have equal rules share one, and so one rank budget. Where the trained
    arrays lie on a mesh with automatic axes, moments lie beside them, step counts on every device, and steps and state stay
    there, so that a training step is compiled once: make the optimizer of what lies where it is trained. Where no method has a
    rule, and off a mesh, this is `tx` itself.

    Args:
        adapted: what is trained.
        tx: the optimizer.
        zero: as for `optimizer`.

    Raises:
        ValueError: for an optimizer that a rule can't have inside it: one that accumulates gradients, or is schedule-free;
            and, by its `update`, for one that leaves some arrays their raw gradients.

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
    return placed(tx, adapted, zero)


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
        if not method.restarts or method in shared:
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


def scaled(rate: optax.ScalarOrSchedule, factor: float | jax.Array) -> optax.ScalarOrSchedule:
    """A learning rate or schedule times a factor; factor 1 gives the very same values."""
    if callable(rate):
        return lambda count: factor * rate(count)
    return factor * rate
