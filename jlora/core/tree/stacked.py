"""`stack`: several adapters of one base as one, to be trained at once; `unstack` takes them apart again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import paths
from jlora.core.protocol.method import Method, Site
from jlora.core.protocol.scaled import GAIN, Scaled
from jlora.core.protocol.wrapping import innermost, parts, with_innermost
from jlora.core.tree.adapted import Adapted, Plan, count

Keys = tuple[str, ...]
Flat = dict[Keys, Any]


@dataclass(frozen=True)
class Run:
    """What a run is by itself; static.

    Attributes:
        plan: of its own methods.
        shapes: of its own arrays, by the keys that lead to them in `{"params": ..., "frozen": ...}`; those that are not there
            the stack has added.
    """

    plan: Plan
    shapes: tuple[tuple[Keys, tuple[int, ...]], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Stacked:
    """Adapters of several runs on one base; made by `stack`, used by `each_run`.

    Attributes:
        base: the params tree, held once.
        params: what is trained, as in an `Adapted`, each array with an axis of runs in front.
        frozen: the methods' constants likewise, but for those that all runs have alike.
        context: the inputs of a call, such as dropout keys, with the axis of runs in front.
        joint: the plan of all runs together, that of an `Adapted` inside of `each_run`; static.
        runs: what each run is by itself; static.
        alike: keys of the constants that are held once; static.
    """

    base: Any
    params: dict[str, Any]
    frozen: dict[str, Any]
    context: dict[str, Any]
    joint: Plan = field(metadata={"static": True})
    runs: tuple[Run, ...] = field(metadata={"static": True})
    alike: frozenset[Keys] = field(default=frozenset(), metadata={"static": True})

    @property
    def plan(self) -> NoReturn:
        """Refuses to be taken for an `Adapted`, whose arrays have no axis of runs.

        Raises:
            TypeError: with what can be done.
        """
        raise TypeError(
            f"a jlora.Stacked holds the adapters of {len(self)} runs, and one run's are wanted here: call this inside of "
            "jlora.each_run(fn), or for each of jlora.unstack(stacked)"
        )

    def _refuse(self, key: Any) -> Any:
        return self.plan

    __contains__ = __getitem__ = _refuse
    weights = with_replaced = plan

    def __len__(self) -> int:
        """The number of runs."""
        return len(self.runs)

    def replace(self, **changes: Any) -> Stacked:
        """A copy with some fields replaced, as in `stacked.replace(params=new_params)`."""
        return dataclasses.replace(self, **changes)

    def run(self, number: int) -> Adapted:
        """The adapters of one run, as they would be had it been alone.

        Raises:
            IndexError: where there is no such run.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"there are {len(self)} runs, numbered from 0; got {number}")
        mine = self.runs[number]
        known = dict(mine.shapes)
        found: dict[str, Any] = {"params": {}, "frozen": {}}
        for name, tree in (("params", self.params), ("frozen", self.frozen)):
            for keys, leaf in _flat(tree).items():
                shape = known.get((name, *keys))
                if shape is None:
                    continue
                own = leaf if name == "frozen" and keys in self.alike else leaf[number]
                paths.insert(found[name], keys, own[tuple(map(slice, shape))])
        for site in mine.plan.sites:  # one that trains nothing of its own has an empty dict
            if paths.lookup(self.params, site.keys) == {}:
                paths.insert(found["params"], site.keys, {})
        context = jax.tree.map(lambda leaf: leaf[number], self.context)
        return Adapted(self.base, found["params"], found["frozen"], context, mine.plan)

    def __repr__(self) -> str:
        return f"Stacked({len(self)} runs, {count(self.params):,} trained values on {count(self.base):,})"


def stack(adapters: Sequence[Adapted]) -> Stacked:
    """Several adapters of one base as one tree, for training them all in one step (see `each_run`).

    The base is held once, and so are constants that all runs have alike. The runs may differ in everything that is an array:
    where they start, what is dropped (a key each in `context`), which data they see, learning rate and decay. Where their
    methods differ in rank or scale, as `LoRA(4)` and `LoRA(8, alpha=32)` do, fields are padded by zeros, which get no
    gradient: for `LoRA`, `DoRA` and `Layers` around it, and `HiRA`. A run is then what it is alone under optimizers
    that work value by value (SGD, Adam and its like, Lion), but not under those that look at a whole array (Adafactor, Muon).

    Args:
        adapters: of the same leaves of the same base.

    Raises:
        TypeError: for what is no `Adapted`.
        ValueError: for no adapters; for another base, other leaves, or methods that differ in what can't be stacked, with the
            path and the number of the run.

    Example:
        >>> keys, spec = jax.random.split(jax.random.key(0), 4), {r".*/q_proj/kernel": jlora.LoRA(rank=2)}
        >>> stacked = jlora.stack([jlora.adapterize(params, spec, key=key) for key in keys])
    """
    if wrong := [each for each in adapters if not isinstance(each, Adapted)]:
        raise TypeError(f"stack takes a list of jlora.Adapted, got {type(wrong[0]).__name__}")
    if not adapters:
        raise ValueError("stack needs one adapter at least")
    for number, each in enumerate(adapters):
        _check_base(number, adapters[0].base, each.base)
    sites, gains = _joined(adapters)
    trees = []
    for number, each in enumerate(adapters):
        frozen = _flat(each.frozen)
        for site in sites:
            if site.keys in gains:
                frozen[*site.keys, GAIN] = jnp.full(site.batch_shape, gains[site.keys][number], jnp.float32)
        trees.append(
            {("params", *k): v for k, v in _flat(each.params).items()} | {("frozen", *k): v for k, v in frozen.items()}
        )
    padded = _padded(trees, sites)
    runs = tuple(Run(each.plan, _shapes(each)) for each in adapters)
    # What an event changes, it may change for each run by itself.
    events = any(site.method.event is not None for site in sites)
    alike = frozenset() if events else _alike(padded)
    params, frozen = _nested(padded, "params", frozenset()), _nested(padded, "frozen", alike)
    for site in sites:
        if paths.lookup(params, site.keys) == {}:
            paths.insert(params, site.keys, {})
    contexts = [each.context for each in adapters]
    if any(jax.tree.structure(each) != jax.tree.structure(contexts[0]) for each in contexts):
        raise ValueError(
            "the contexts of the adapters to be stacked differ in form; give all of them, such as dropout keys, or none"
        )
    context = jax.tree.map(lambda *leaves: jnp.stack(leaves), *contexts)
    return Stacked(adapters[0].base, params, frozen, context, Plan(sites, len(adapters)), runs, alike)


def unstack(stacked: Stacked) -> list[Adapted]:
    """The adapters of each run by itself, with its own method and rank, as `stack` got them; for `save` and all else.

    Example:
        >>> stacked = jlora.stack([adapted, adapted])
        >>> for number, run in enumerate(jlora.unstack(stacked)):
        ...     jlora.save(f"runs/{number}", run)
    """
    return [stacked.run(number) for number in range(len(stacked))]


def _check_base(number: int, first: Any, other: Any) -> None:
    """Whether two bases are the same.

    Raises:
        ValueError: with the first leaf that differs.
    """
    if first is other:
        return
    mine, theirs = (dict(_arrays(base)) for base in (first, other))
    if odd := sorted(set(mine) ^ set(theirs)):
        raise ValueError(f"{'/'.join(odd[0])}: only one of the bases of runs 0 and {number} has this leaf")
    for keys, leaf in mine.items():
        if not _equal(leaf, theirs[keys]):
            raise ValueError(
                f"{'/'.join(keys)}: the bases of runs 0 and {number} differ here; runs that are stacked share one base"
            )


def _arrays(tree: Any) -> list[tuple[Keys, Any]]:
    """The arrays of a tree with their keys, those of codes each by itself."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(tuple(map(str, path)), leaf) for path, leaf in found]


def _equal(one: Any, other: Any) -> bool:
    """Whether two arrays are the same, in shape, dtype and values; traced ones only where they are one."""
    if one is other:
        return True
    if isinstance(one, Tracer) or isinstance(other, Tracer) or isinstance(one, jax.ShapeDtypeStruct):
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if jnp.issubdtype(one.dtype, jax.dtypes.extended):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    # Bits, since constants that are no numbers are alike as well.
    return np.asarray(one).tobytes() == np.asarray(other).tobytes()


def _joined(adapters: Sequence[Adapted]) -> tuple[tuple[Site, ...], dict[Keys, list[float]]]:
    """The sites of all runs together, and for those whose scales differ by what each run's update is multiplied."""
    plans = [each.plan.sites for each in adapters]
    for number, sites in enumerate(plans):
        if odd := sorted({site.keys for site in sites} ^ {site.keys for site in plans[0]}):
            raise ValueError(f"{'/'.join(odd[0])}: of runs 0 and {number} only one adapts this leaf")
    by_keys = [{site.keys: site for site in sites} for sites in plans]
    sites, gains = [], {}
    for site in plans[0]:
        each = [known[site.keys] for known in by_keys]
        method, numbers = _method(site, [other.method for other in each])
        for number, other in enumerate(each):
            if replace(other, method=site.method) != site:
                raise ValueError(f"{site.path}: runs 0 and {number} adapt this leaf in other roles of its axes")
        if any(value != 1 for value in numbers):
            gains[site.keys] = numbers
        sites.append(replace(site, method=method))
    return tuple(sites), gains


def _method(site: Site, methods: list[Method]) -> tuple[Method, list[float]]:
    """One method for those of all runs at a leaf, and by what the update of each is multiplied.

    Raises:
        ValueError: where there is none, with two of them.
    """
    first = methods[0]
    odd = next((number for number, each in enumerate(methods) if each != first), None)
    if odd is None:
        return first, [1.0] * len(methods)
    refused = ValueError(
        f"{site.path}: run 0 has {first} and run {odd} {methods[odd]}, which can't be one program: stack what has equal "
        "methods, or differs in the rank and scale of LoRA or the rank of HiRA, and train the others in a stack of their own"
    )
    inside = [innermost(each) for each in methods]
    around = {with_innermost(each, inside[0]) for each in methods}
    asks = any(part.event is not None or part.optimizer_rule is not None for each in methods for part in parts(each))
    if len(around) > 1 or len(set(map(type, inside))) > 1 or asks or "joined" not in vars(type(inside[0])):
        raise refused
    found = type(inside[0]).joined(inside)
    if found is None:
        raise refused
    common, numbers = found
    if any(number != 1 for number in numbers):
        common = Scaled(common)
    method = with_innermost(first, common)
    own = replace(site, method=method)
    for each in methods:
        theirs = replace(site, method=each)
        if (each.labels(theirs), each.rates(theirs)) != (method.labels(own), method.rates(own)):
            raise refused
    return method, numbers


def _padded(trees: list[Flat], sites: tuple[Site, ...]) -> list[Flat]:
    """The arrays of all runs in one shape: padded by zeros along their ranks.

    Raises:
        ValueError: for arrays that differ in another way.
    """
    first = trees[0]
    for number, tree in enumerate(trees):
        if odd := sorted(set(tree) ^ set(first)):
            raise ValueError(f"{'/'.join(odd[0])}: of runs 0 and {number} only one has this array")
    roles: dict[Keys, tuple[str, ...]] = {
        (*site.keys, name): axes for site in sites for name, axes in site.method.axes.items()
    }
    padded: list[Flat] = [{} for _ in trees]
    for keys, leaf in first.items():
        leaves = [tree[keys] for tree in trees]
        shape = tuple(max(sizes) for sizes in zip(*(each.shape for each in leaves)))
        own = roles.get(keys[1:], ())
        may = [False] * (len(shape) - len(own)) + [role == "rank" for role in own]
        for number, each in enumerate(leaves):
            differs = [size != wanted for size, wanted in zip(each.shape, shape)]
            wrong = any(d and not m for d, m in zip(differs, may, strict=True))
            if each.ndim != leaf.ndim or each.dtype != leaf.dtype or wrong:
                raise ValueError(
                    f"{'/'.join(keys)}: run 0 has {leaf.dtype} {leaf.shape} and run {number} {each.dtype} {each.shape}, which "
                    "can't be stacked"
                )
            pads = [(0, wanted - size) for size, wanted in zip(each.shape, shape)]
            padded[number][keys] = jnp.pad(each, pads) if any(differs) else each
    return padded


def _alike(trees: list[Flat]) -> frozenset[Keys]:
    """Keys of the constants that all runs have alike."""
    first, *others = trees
    return frozenset(
        keys[1:]
        for keys, leaf in first.items()
        if keys[0] == "frozen" and all(_equal(leaf, tree[keys]) for tree in others)
    )


def _nested(trees: list[Flat], drawer: str, alike: frozenset[Keys]) -> dict[str, Any]:
    """The arrays of a drawer with an axis of runs in front, but for those that are alike."""
    own = ((keys, leaf) for keys, leaf in trees[0].items() if keys[0] == drawer)
    return paths.nested(
        (keys[1:], leaf if keys[1:] in alike else jnp.stack([tree[keys] for tree in trees])) for keys, leaf in own
    )


def _flat(tree: Any) -> Flat:
    return dict(paths.flatten_with_keys(tree)[0])


def _shapes(adapted: Adapted) -> tuple[tuple[Keys, tuple[int, ...]], ...]:
    drawers = {"params": adapted.params, "frozen": adapted.frozen}
    return tuple((keys, tuple(leaf.shape)) for keys, leaf in paths.flatten_with_keys(drawers)[0])
