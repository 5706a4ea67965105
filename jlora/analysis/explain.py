"""`explain`: what each method of an adapted model does, trains and costs a step, and where it comes from."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import jax
import optax

from jlora import paths
from jlora.core.products.formed import Formed
from jlora.core.protocol import docstrings
from jlora.core.protocol.method import Method, Site, View
from jlora.core.tree.adapted import Adapted, count
from jlora.core.tree.summary import shared_counts

_WIDTH = 120


def explain(adapted: Adapted) -> str:
    """For every method of an adapted model: formula, trained values, what a step costs, source.

    Formula and source are the docstring's, of the class itself; numbers are counted on the leaves that the method adapts.

    Args:
        adapted: arrays, or shapes from `jax.eval_shape`.

    Example:
        >>> print(jlora.explain(adapted))
    """
    methods = dict.fromkeys(site.method for site in adapted.plan.sites)
    return "\n\n".join(_explained(adapted, method) for method in methods)


def _explained(adapted: Adapted, method: Method) -> str:
    sites = tuple(site for site in adapted.plan.sites if site.method == method)
    cls = type(method)
    lines = {
        "what": docstrings.first_sentence(cls) or f"Has no docstring; derived from {cls.__mro__[1].__name__}.",
        "trains": _trained(adapted, method, sites),
        "costs": " ".join(
            part for part in (_forward(adapted, sites), _state(adapted, sites), docstrings.costs(cls)) if part
        ),
        "merges": _merges(method, sites),
        "source": docstrings.reference(cls) or "no paper",
    }
    text = [f"{method}, {len(sites)} {'leaf' if len(sites) == 1 else 'leaves'}"]
    for name, line in lines.items():
        if not line:
            continue
        text.append(textwrap.fill(line, _WIDTH, initial_indent=f"  {name:<8}", subsequent_indent=" " * 10))
    return "\n".join(text)


def _merges(method: Method, sites: tuple[Site, ...]) -> str:
    """What to know of merging; nothing where the weight says it all."""
    if not method.mergeable:
        return "No: no weight does what the method does; it runs by jlora.lift alone."
    beside = dict.fromkeys(name for site in sites for name in site.beside)
    return f"Together with the leaves beside: {', '.join(beside)}." if beside else ""


def _trained(adapted: Adapted, method: Method, sites: tuple[Site, ...]) -> str:
    """How many values a method trains, those of the leaves and those that they share, with the docstring's formulas."""
    own = sum(count(paths.lookup(adapted.params, site.keys)) for site in sites)
    _, shared = shared_counts(adapted).get(method, ("", 0))
    formula, whole = docstrings.count_formula(type(method)), docstrings.shared_count_formula(type(method))
    text = _values(own + shared) + (f", {formula} a matrix" if formula else "")
    return text + (f", {shared:,} of them shared by all leaves" + (f" ({whole})" if whole else "") if shared else "")


def _values(number: int) -> str:
    return f"{number:,} value" + ("" if number == 1 else "s")


def _matrices(site: Site) -> int:
    return math.prod(site.batch_shape)


def _forward(adapted: Adapted, sites: tuple[Site, ...]) -> str:
    """What the method adds to the products of the forward pass, counted from what it gives as data."""
    if not any(site.method.matrix for site in sites):
        return "A forward pass as the base's, and the gradient of the leaf itself."
    found = [(site, of_one_matrix(adapted, site)) for site in sites]
    formed = [site for site, update in found if update is None]
    if formed:
        values = sum(_matrices(site) * site.in_size * site.out_size for site in formed)
        return f"Each forward pass forms the weights anew: {_values(values)}."
    own = sum(
        _matrices(site) * (site.out_size if site.kind == "gather" else site.in_size * site.out_size) for site in sites
    )
    more = sum(
        _matrices(site) * update.cost(site.in_size, site.out_size, site.kind == "gather") for site, update in found
    )
    part = float(f"{100 * more / max(own, 1):.2g}")
    return (
        f"Forward pass: {more:,} multiply-adds more for each row of input ({part:g} % of the {own:,} of these matrices); "
        "about twice as many in the backward pass."
    )


def of_one_matrix(adapted: Adapted, site: Site) -> Any:
    """The shapes of a site's `Update` for one matrix; None where its method has no form."""
    depth = len(site.batch_axes)

    def one(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape[depth:], leaf.dtype)

    w: Any = jax.ShapeDtypeStruct((site.in_size, site.out_size), site.dtype)
    params, frozen = (jax.tree.map(one, paths.lookup(tree, site.keys)) for tree in (adapted.params, adapted.frozen))
    shared = adapted.shared(adapted.plan.shared_names().get(site.method, ""))
    shapes: dict[str, Any] = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in shared.items()}
    beside: dict[str, Any] = dict.fromkeys(site.beside, jax.ShapeDtypeStruct((site.out_size,), site.dtype))
    told: dict[str, Any] = {name: adapted.context[name] for name in site.method.context & set(adapted.context)}
    update = jax.eval_shape(site.method.update, View(w, params, frozen, site, shapes, beside, context=told))
    return None if isinstance(getattr(update, "inner", update), Formed) else update


def _state(adapted: Adapted, sites: tuple[Site, ...]) -> str:
    """What the method's rule keeps in the optimizer's state beside AdamW's own two moments."""
    rule = sites[0].method.optimizer_rule
    if rule is None:
        return ""
    adam = optax.adamw(1e-3)
    try:
        wrapped = rule.wrap(adam, sites)
    except ValueError as error:  # a schedule of unknown length has no history yet
        return f"Optimizer state beside AdamW's: not known yet ({error})."
    with_rule, plain = (jax.eval_shape(tx.init, adapted.params) for tx in (wrapped, adam))
    return f"Optimizer state beside AdamW's: {_values(count(with_rule) - count(plain))}."
