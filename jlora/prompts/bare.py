"""`without_encoder`: prompts as what their networks make of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from jlora import paths
from jlora.core.protocol.wrapping import innermost, with_innermost
from jlora.core.tree.adapted import SHARED, Adapted, Plan
from jlora.core.walk import weight as weights
from jlora.prompts.virtual import Virtual


def without_encoder(adapted: Adapted) -> Adapted:
    """The same adapters without the networks that made their prompts while they were trained; outputs stay as they are.

    `PTuning` becomes `PromptTuning`, and `PrefixTuning` one without `hidden`. What is left is smaller, and can be trained on.

    Raises:
        ValueError: where no network makes a prompt.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> adapted = jlora.adapterize(params, {"embed_tokens/embedding": jlora.PTuning(tokens=4, hidden=8)})
        >>> adapted = jlora.without_encoder(adapted)
    """
    trained: dict[str, Any] = {}
    sites, gone = [], 0
    for weight in adapted.weights():
        site = weight.site
        assert site is not None
        method, arrays = innermost(site.method), paths.lookup(adapted.params, site.keys)
        if isinstance(method, Virtual) and method.encoded:
            arrays = weights.over_batch(method.evaluated, weight)
            site, gone = dataclasses.replace(site, method=with_innermost(site.method, method.without_encoder)), gone + 1
        paths.insert(trained, site.keys, arrays)
        sites.append(site)
    if not gone:
        raise ValueError("no network makes a prompt of these adapters: there is none to leave out")
    plan = Plan(tuple(sites))
    after = plan.shared_names()
    names = {before: after[method] for method, before in adapted.plan.shared_names().items() if method in after}
    frozen = {key: tree for key, tree in adapted.frozen.items() if key != SHARED}
    return adapted.replace(
        params=_with_drawers(trained, adapted.params, names),
        frozen=_with_drawers(frozen, adapted.frozen, names),
        plan=plan,
    )


def _with_drawers(tree: dict[str, Any], old: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tree with what leaves share in another, under new names; what nobody shares any more is left out."""
    kept = {after: old[SHARED][before] for before, after in names.items() if before in old.get(SHARED, {})}
    return tree | ({SHARED: kept} if kept else {})
