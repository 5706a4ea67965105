"""Several adapters of one base as one adapter, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora import _compat, paths
from jlora.compose import plain
from jlora.compose.election import MAJORITIES, Rule
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.core.protocol.plain import PlainLoRA
from jlora.core.tree import placement
from jlora.core.tree.adapted import Adapted, Plan
from jlora.core.walk import weight as weights_of
from jlora.core.walk.weight import Weight
from jlora.disk.fingerprint import fingerprint
from jlora.methods.full import Full
from jlora.methods.lora import LoRA, trained_dtype

_RULES = {
    "linear": Rule(),
    "magnitude_prune": Rule("magnitude"),
    "ties": Rule("magnitude", elect=True),
    "dare_linear": Rule("random"),
    "dare_ties": Rule("random", elect=True),
}
#: What `combine` does, by PEFT's names.
COMBINATIONS = ("cat", "svd", *_RULES, *(f"{name}_svd" for name in _RULES if name != "linear"))


@dataclass(frozen=True)
class _Way:
    """A combination with its options, checked.

    Attributes:
        name: one of `COMBINATIONS`.
        rule: for `cat` and `svd` the weighted sum.
        rank: of the result, where a singular value decomposition makes it; None for the largest of the adapters'.
        clamp: quantile of the factors' entries to which these are clipped.
    """

    name: str
    rule: Rule
    rank: int | None
    clamp: float | None

    @property
    def of_changes(self) -> bool:
        """Whether the rule is applied to the changes of the weights, and not to their factors."""
        return self.name.endswith("svd")


@dataclass(frozen=True)
class _Member:
    """A leaf of one adapter.

    Attributes:
        order: of the adapter among those combined.
        weight: the leaf.
        site: with the roles of its axes, which the weight's own lacks where its method takes a leaf as it is.
    """

    order: int
    weight: Weight
    site: Site


def combine(
    adapters: Sequence[Adapted],
    weights: Sequence[float],
    combination: str = "cat",
    *,
    rank: int | None = None,
    clamp: float | None = None,
    density: float | None = None,
    majority: str = "total",
    key: jax.Array | None = None,
) -> Adapted:
    """One adapter from several of one base, by weights of any sign; names and formulas are those of PEFT.

    With `delta_i = s_i a_i b_i` what adapter `i` adds to a weight, and `w_i` its weight:

    | combination | the result |
    |---|---|
    | `"cat"` | `Σ w_i delta_i`, exactly: the factors side by side, of the sum of the ranks |
    | `"svd"` | the nearest LoRA to `Σ w_i delta_i` of rank `rank`, from its singular value decomposition |
    | `"linear"` | `(Σ ±√\\|w_i s_i\\| a_i) (Σ √\\|w_i s_i\\| b_i)`, which is not the sum of the changes; equal ranks |
    | `"magnitude_prune"`, `"ties"`, `"dare_linear"`, `"dare_ties"` | as "linear", with the name's rule in place of each sum |
    | the same with `"_svd"` | the rule applied to the changes `delta_i` with the weights `w_i`, then as `"svd"` |

    "magnitude_prune" keeps the largest `density` of each array's entries, "dare" keeps any and divides them by `density`;
    "ties" averages those that have the elected sign. "cat", "svd" and the "_svd" ones alone don't depend on how a change is
    split into factors. A leaf that not all adapters change is combined from those that do. A leaf trained as it is (`Full`,
    norms, rows) becomes `Full`, and the rule is applied to its change.

    Args:
        adapters: on equal bases, such as `jlora.load` gives them on one. The first one's base is the result's.
        weights: one for each adapter; numbers, or an array that may be traced.
        combination: see above.
        rank: of the result of an "svd"; the largest of the adapters' by default. At most the smaller side of a matrix.
        clamp: of an "svd": both factors are clipped to plus and minus this quantile of their entries.
        density: share of the entries that are kept, in (0, 1]; needed by all that prune.
        majority: the sign that "ties" elects is that of the sum ("total"), or of the sum of signs ("frequency").
        key: for "dare", of which it draws the entries; the others draw nothing.

    Returns:
        The adapter, of `LoRA` with scale 1 and without dropout.

    Raises:
        ValueError: for adapters on different bases, a leaf with other axes or another kind of method in one of them, unequal
            ranks where a rule adds up factors, a method that does more than change the weight, and options that are out of
            range, missing or of no use.
        TypeError: for a method that has no factors where a rule needs them, and bases that are arguments of `jit`.

    Example:
        >>> both = jlora.combine([adapted, adapted], [0.8, 1.0])
        >>> small = jlora.combine([adapted, adapted], [1.0, 1.0], "ties_svd", density=0.2, rank=4)

    Reference:
        Task arithmetic: Ilharco et al. 2022, arXiv:2212.04089; TIES: Yadav et al. 2023, arXiv:2306.01708; DARE: Yu et al. 2023,
        arXiv:2311.03099; as PEFT 0.21's `add_weighted_adapter` does them. DARE's draws are JAX's.
    """
    way = _checked(combination, rank, clamp, density, majority, key)
    amounts = jnp.asarray(weights, jnp.float32)
    if not adapters or amounts.shape != (len(adapters),):
        raise ValueError(
            f"wanted one weight for each adapter, got {len(adapters)} adapters and weights {amounts.shape}"
        )
    check_one_base(adapters)
    leaves = dict(paths.flatten_with_keys(adapters[0].base)[0])
    params: dict[str, Any] = {}
    sites = []
    for keys, members in _by_leaf(adapters).items():
        own = None if key is None else jax.random.fold_in(key, paths.number("/".join(keys)))
        site, start = _combined(way, members, amounts, own, leaves[keys])
        paths.insert(params, keys, start.params)
        sites.append(site)
    return adapters[0].replace(params=params, frozen={}, context={}, plan=Plan(tuple(sites)))


def _checked(
    name: str, rank: int | None, clamp: float | None, density: float | None, majority: str, key: jax.Array | None
) -> _Way:
    if name not in COMBINATIONS:
        raise ValueError(f"combination must be one of {COMBINATIONS}, got {name!r}")
    rule = _RULES.get(name.removesuffix("_svd"), Rule())
    if not name.endswith("svd") and (rank is not None or clamp is not None):
        raise ValueError(f'rank and clamp are for "svd" and what ends in it, not for {name!r}')
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if clamp is not None and not 0 < clamp <= 1:
        raise ValueError(f"clamp must be a quantile in (0, 1], got {clamp!r}")
    if (rule.prune is None) != (density is None):
        raise ValueError(
            f"{name!r} " + ("needs a density in (0, 1]" if density is None else "keeps all entries: leave density out")
        )
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    if majority not in MAJORITIES:
        raise ValueError(f"majority must be one of {MAJORITIES}, got {majority!r}")
    if majority != "total" and not rule.elect:
        raise ValueError(f"{name!r} elects no sign: leave majority out")
    if rule.prune == "random" and key is None:
        raise ValueError(f"{name!r} draws which entries stay: pass key=jax.random.key(...)")
    return _Way(name, replace(rule, density=density or 1.0, majority=majority), rank, clamp)


def check_one_base(adapters: Sequence[Adapted]) -> None:
    """Refuses adapters whose bases differ in a path, a shape or a value."""
    first = dict(paths.flatten_with_keys(adapters[0].base)[0])
    for order, adapted in enumerate(adapters[1:], 1):
        other = dict(paths.flatten_with_keys(adapted.base)[0])
        if odd := sorted(set(first) ^ set(other)):
            raise ValueError(f"{'/'.join(odd[0])}: adapters 0 and {order} have different bases: only one has this leaf")
        for keys, leaf in first.items():
            if leaf is other[keys]:
                continue
            path = "/".join(keys)
            if any(isinstance(part, Tracer) for part in jax.tree.leaves((leaf, other[keys]))):
                raise TypeError(
                    f"{path}: bases that are arguments of jit can't be compared; let it close over the adapters"
                )
            with jax.ensure_compile_time_eval():
                same = fingerprint(leaf) == fingerprint(other[keys])
            if not same:
                raise ValueError(f"{path}: adapters 0 and {order} stand on different bases: this leaf is not the same")


def _by_leaf(adapters: Sequence[Adapted]) -> dict[tuple[str, ...], list[_Member]]:
    """The leaves that any adapter changes, with those that do.

    Raises:
        ValueError: for a leaf that one of them reads in another way.
    """
    found: dict[tuple[str, ...], list[_Member]] = {}
    for order, adapted in enumerate(adapters):
        for weight, site in zip(adapted.weights(), adapted.plan.sites, strict=True):
            members = found.setdefault(site.keys, [])
            members.append(_Member(order, weight, site))
            first = members[0]
            axes = [
                (one.site.batch_axes, one.site.in_axes, one.site.out_axes, one.site.method.matrix) for one in members
            ]
            if axes[-1] != axes[0]:
                raise ValueError(
                    f"{site.path}: adapters {first.order} and {order} take it differently: {first.site.method} on its axes "
                    f"(batch, in, out) {axes[0][:3]}, {site.method} on {axes[-1][:3]}"
                )
            if not site.method.mergeable or weight.beside:
                raise ValueError(
                    f"{site.path}: {site.method} does more than change the weight, so it can't be combined"
                )
    return found


def _combined(
    way: _Way, members: list[_Member], amounts: jax.Array, key: jax.Array | None, leaf: Any
) -> tuple[Site, Start]:
    """A leaf of the result; its arrays lie as a new adapter's would."""
    first, amounts = members[0], amounts[jnp.array([one.order for one in members])]
    if first.site.method.matrix:
        made, given, rank = _matrices(way, members)
        method: Method = LoRA(rank, float(rank))
    else:
        made, given, method = partial(_whole, way, first.site), [one.weight for one in members], Full()
    site, dtype = replace(first.site, method=method, beside=()), trained_dtype(leaf)

    @jax.jit
    def arrays(given: Any, amounts: jax.Array, key: jax.Array | None) -> dict[str, jax.Array]:
        return {name: array.astype(dtype) for name, array in made(given, amounts, key).items()}

    cut = lambda sharding: placement.field_specs(site, sharding.spec)  # noqa: E731
    found = _compat.automatic(arrays, first.weight.aval, cut)(given, amounts, key)
    return site, placement.place(Start(found), site, leaf)


def _matrices(way: _Way, members: list[_Member]) -> tuple[Callable[..., dict[str, jax.Array]], Any, int]:
    """What makes a leaf's factors, what it makes them of, and their rank.

    Raises:
        ValueError: for unequal ranks that a rule would add up, and a rank that nothing tells.
        TypeError: for a method that has no factors where they are needed.
    """
    site, found = members[0].site, [plain.factors(one.weight) for one in members]
    side = min(site.in_size, site.out_size)
    missing = [one.site.method for one, factors in zip(members, found) if factors is None]
    ranks = [factors.a.shape[-1] for factors in found if factors is not None]
    if way.of_changes:
        if missing and way.rank is None:
            raise ValueError(f"{site.path}: {missing[0]} has no rank that the result could take: give rank=")
        rank = min(side, way.rank or max(ranks))
        # The signs of singular vectors, on which clipping depends, are those of the whole change's decomposition, as in PEFT.
        if missing or way.name != "svd" or way.clamp is not None:
            return partial(_of_changes, way, rank), [one.weight for one in members], rank
        rank = min(rank, sum(ranks))
    elif missing:
        raise TypeError(
            f'{site.path}: {missing[0]} has no factors for {way.name!r}; "svd" and what ends in it need none'
        )
    elif way.name == "cat":
        rank = min(side, sum(ranks))
    elif len(set(ranks)) > 1:
        raise ValueError(
            f'{site.path}: {way.name!r} adds factors of equal ranks, got {ranks}; "cat" and "svd" take any'
        )
    else:
        rank = ranks[0]
    return partial(_of_factors, way, rank), found, rank


def _of_factors(
    way: _Way, rank: int, found: list[PlainLoRA], amounts: jax.Array, key: jax.Array | None
) -> dict[str, jax.Array]:
    sizes = amounts * jnp.array([one.scale for one in found])
    sides = [(one.a * one.gates[..., None, :], one.b) for one in found]
    if way.name in ("cat", "svd"):
        a = jnp.concatenate([size * a for size, (a, _) in zip(sizes, sides)], axis=-1)
        b = jnp.concatenate([b for _, b in sides], axis=-2)
        return {"a": a, "b": b} if way.name == "cat" and a.shape[-1] == rank else _truncated_product(a, b, rank)
    roots = jnp.sqrt(jnp.abs(sizes))
    signed = jnp.where(sizes >= 0, roots, -roots)  # on one side alone: on both the signs would cancel
    keys = (None, None) if key is None else jax.random.split(key)
    a, b = (jnp.stack(each, axis=-3) for each in zip(*sides))
    return {"a": _by_rule(way.rule, a, signed, keys[0]), "b": _by_rule(way.rule, b, roots, keys[1])}


def _of_changes(
    way: _Way, rank: int, found: list[Weight], amounts: jax.Array, key: jax.Array | None
) -> dict[str, jax.Array]:
    changes = jnp.stack([weights_of.over_batch(plain.change(one.method), one) for one in found], axis=-3)
    combined = _by_rule(way.rule, changes, amounts, key)
    u, s, v = jnp.linalg.svd(jnp.swapaxes(combined, -1, -2), full_matrices=False)
    a, b = jnp.swapaxes(v, -1, -2)[..., :rank], jnp.swapaxes(u * s[..., None, :], -1, -2)[..., :rank, :]
    if way.clamp is not None:
        entries = jnp.concatenate([a.reshape(*a.shape[:-2], -1), b.reshape(*b.shape[:-2], -1)], axis=-1)
        most = jnp.quantile(entries, way.clamp, axis=-1)[..., None, None]
        a, b = jnp.clip(a, -most, most), jnp.clip(b, -most, most)
    return {"a": a, "b": b}


def _whole(
    way: _Way, site: Site, found: list[Weight], amounts: jax.Array, key: jax.Array | None
) -> dict[str, jax.Array]:
    """The leaf with the combined change of leaves that are trained as they are."""
    front = range(len(site.batch_axes))

    def changed(one: Weight) -> jax.Array:
        assert one.site is not None
        view = View(weights_of.base(one), one.params, one.frozen, one.site, one.shared)
        return jnp.moveaxis(plain.change(one.method)(view), site.batch_axes, front)

    changes = jnp.stack([changed(one) for one in found], axis=len(front))
    combined = jnp.moveaxis(_by_rule(way.rule, changes, amounts, key, len(front)), front, site.batch_axes)
    return {"w": weights_of.base(found[0]).astype(combined.dtype) + combined}


def _by_rule(
    rule: Rule, arrays: jax.Array, amounts: jax.Array, key: jax.Array | None, batch: int | None = None
) -> jax.Array:
    """The rule for each matrix: `arrays [*batch, n, ...]`, by default of matrices, with a key of its own for each."""
    batch = arrays.ndim - 3 if batch is None else batch
    keys = None if key is None else jax.random.split(key, arrays.shape[:batch]) if batch else key
    one: Callable[..., jax.Array] = rule
    for _ in range(batch):
        one = jax.vmap(one, in_axes=(0, None, None if keys is None else 0))
    return one(arrays, amounts, keys)


def _truncated_product(a: jax.Array, b: jax.Array, rank: int) -> dict[str, jax.Array]:
    """The nearest of a rank to `a @ b`, by the singular values of a matrix of the factors' rank: `a @ b` is never formed.

    `a` gets orthonormal columns, `b` the singular values.
    """
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, s, v = jnp.linalg.svd(r_a @ jnp.swapaxes(r_b, -1, -2), full_matrices=False)
    return {"a": q_a @ u[..., :rank], "b": s[..., :rank, None] * v[..., :rank, :] @ jnp.swapaxes(q_b, -1, -2)}
