"""Many adapters on one base: a bank whose rows, or tokens, choose their adapter in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import paths
from jlora.compose.entry import Entry, Placed, Source, check_alike, entry_of, in_slots
from jlora.compose.kinds import grown, with_room
from jlora.compose.slotted import Slotted, empty, put
from jlora.core.protocol.method import Site
from jlora.core.transforms.lift import lift
from jlora.core.tree import placement
from jlora.core.tree.adapted import Adapted


class Bank:
    """Many adapters of one base, in slots; a call says which rows, or tokens, use which.

    For each adapted matrix it holds `a [slots, in, r]` and `b [slots, r, out]`, scales folded in, smaller ranks filled up with
    zeros; and in each slot the arrays of every other kind of adapter that it has room for, such as SHiRA's entries. Slot 0 is
    no adapter: its rows are the base's. What a row gets is what it would get alone, with its adapter.

    Adding, replacing and removing write one slot in place, and compile nothing anew; only `grow` changes shapes. Arrays of an
    `Adapted` that `on` gave before such a write can't be used after it. Made by `Bank.of`.

    Example:
        >>> sql, chat = (jlora.adapterize(params, {r".*/q_proj/kernel": jlora.LoRA(rank)}) for rank in (4, 8))
        >>> bank = jlora.Bank.of(params, {"sql": sql, "chat": chat}, capacity=8)
        >>> ids = bank.ids(["chat", None])
        >>> logits = jlora.lift(model.apply)({"params": bank.on(slot=ids)}, tokens)

    Reference:
        Chen et al. 2023, arXiv:2310.18547 (Punica); Sheng et al. 2023, arXiv:2311.03285 (S-LoRA).
    """

    def __init__(self, adapted: Adapted, names: Mapping[str, int], torch_names: Any = None):
        """Args: the slots on their base; the slot of each adapter; the names that read PEFT's folders. See `Bank.of`."""
        self._adapted, self._slots, self._torch_names = adapted, dict(names), torch_names

    @classmethod
    def of(
        cls,
        params: Any,
        adapters: Mapping[str, Source],
        capacity: int | None = None,
        *,
        rank: int = 1,
        gains: bool = False,
        names: Any = None,
        dtype: Any = None,
    ) -> Self:
        """A bank with room for `capacity` adapters.

        It has room for the leaves that any of the adapters changes, and there for the largest of their ranks.

        Args:
            params: the base.
            adapters: by name; each an `Adapted` on this base, a directory that `jlora.save` or a training run wrote, or a
                folder in PEFT's format. LoRA and its variants, DoRA, and all whose weight is `(w + a @ b) * gain`, go into
                the same arrays. Others (SHiRA, LoHa, OFT, bottlenecks, ...) are kinds: a method with all hyperparameters
                and shapes; every slot has room for each kind, and only SHiRA's numbers of entries may differ within one.
            capacity: how many it has room for; by default as many as there are.
            rank: room for at least this rank, for adapters to come.
            gains: room for gains, as DoRA has them, for adapters to come.
            names: which torch parameter a leaf is, to read folders in PEFT's format: `jlora.models.peft_names(model)`.
            dtype: of the slots; by default that of new adapters, 32 bits.

        Raises:
            FileNotFoundError: for a folder that is not there.
            ValueError: for adapters of another base, that read a leaf in different ways, are not finite, or of a method that
                rows can't have each their own of, by path; for more adapters than `capacity`, and none.
        """
        if not adapters:
            raise ValueError("a bank takes the leaves and ranks from its adapters: give at least one")
        capacity = len(adapters) if capacity is None else capacity
        if len(adapters) > capacity:
            raise ValueError(f"{len(adapters)} adapters don't fit into a bank with capacity={capacity}")
        if rank < 1:
            raise ValueError(f"rank must be a positive whole number, got {rank}")
        found = {name: entry_of(name, each, params, names, dtype) for name, each in adapters.items()}
        sites = _sites([each.sites for each in found.values()], capacity + 1, rank, gains)
        bank = cls(empty(params, sites, dtype), {}, names)
        for name, entry in found.items():
            bank._write(name, len(bank._slots) + 1, bank._placed(name, entry))
        return bank

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are in it."""
        return tuple(self._slots)

    @property
    def capacity(self) -> int:
        """How many adapters it has room for."""
        return self._method.slots - 1

    @property
    def adapted(self) -> Adapted:
        """The base with all slots, of which nothing is chosen; `on` chooses."""
        return self._adapted

    def ids(self, names: Any) -> np.ndarray:
        """The slots of adapters by name, None for the base: of one name, or of sequences of them, int32.

        Raises:
            ValueError: for a name that is not in the bank.
        """
        if names is not None and not isinstance(names, str):
            return np.array([self.ids(each) for each in names], np.int32)
        return np.array(0 if names is None else self._slot(names), np.int32)

    def on(self, slot: Any = None, weights: Any = None) -> Adapted:
        """The base with the adapters of one call, for `jlora.lift`.

        The leading axes of what is given are those of the activations: a batch axis in front, then tokens. `check` tells
        whether a model keeps them. Other choices of the same shape compile nothing anew, and may be traced.

        Args:
            slot: as `ids` gives them: one for all, `[rows]`, or `[rows, tokens]`. Rows whose slot is traced, and is none of the
                bank's, give NaN.
            weights: a mix of all in place of one, `w + Σ weight * change`: numbers by name, or an array `[slots]`,
                `[rows, slots]` or `[rows, tokens, slots]`, slot 0 in front.

        Raises:
            ValueError: for a name that is not in the bank, slots that no adapter is in, shapes that can't be, both, or neither.
        """
        if (slot is None) == (weights is None):
            raise ValueError("say which adapters: either slot=bank.ids(...) or weights=")
        if weights is not None:
            if isinstance(weights, Mapping):
                weights = self._by_name(weights)
            return self._adapted.on(weights=weights)
        adapted = self._adapted.on(slot=slot)
        if not isinstance(slot, Tracer):
            used = np.unique(np.asarray(slot))
            if free := sorted(set(used.tolist()) - {0, *self._slots.values()}):
                raise ValueError(f"no adapter is in slot {free[0]}; there are {self._slots}, and 0 for none")
        return adapted

    def add(self, name: str, source: Source) -> None:
        """Puts an adapter into a free slot.

        Raises:
            ValueError: for a name that is there already, a full bank, or what `grow` has to make room for: larger ranks, other
                leaves, gains, other kinds; and as `Bank.of`. Then nothing was changed.
        """
        if name in self._slots:
            raise ValueError(f"the bank has an adapter {name!r} already; replace it")
        free = sorted(set(range(1, self.capacity + 1)) - set(self._slots.values()))
        if not free:
            raise ValueError(f"the bank is full: {self.capacity} adapters; remove one, or grow(capacity=...)")
        self._write(name, free[0], self._read(name, source))

    def replace(self, name: str, source: Source) -> None:
        """Puts an adapter in the place of the one of that name.

        Raises:
            ValueError: for a name that is not in the bank, and as `add`.
        """
        self._write(name, self._slot(name), self._read(name, source))

    def remove(self, name: str) -> None:
        """Takes an adapter out; its slot is free.

        Raises:
            ValueError: for a name that is not in the bank.
        """
        self._overwrite(self._slot(name), {})
        del self._slots[name]

    def grow(
        self, capacity: int | None = None, *, rank: int = 1, gains: bool = False, fit: Source | None = None
    ) -> None:
        """Makes room: for more adapters, a larger rank, gains, or all that an adapter to come needs.

        Functions of the bank are compiled anew after it.

        Args:
            capacity: of adapters; not fewer than before.
            rank, gains: as for `Bank.of`.
            fit: an adapter whose leaves, ranks, gains and kinds the bank is to have room for; it is not added.

        Raises:
            ValueError: for a smaller capacity, and as `Bank.of`.
        """
        capacity = self.capacity if capacity is None else capacity
        if capacity < self.capacity:
            raise ValueError(
                f"a bank does not shrink: it has room for {self.capacity} adapters, got capacity={capacity}"
            )
        wanted = [{site.keys: site for site in self._adapted.plan.sites}]
        if fit is not None:
            wanted.append(self._entry("fit", fit).sites)
        sites = _sites(wanted, capacity + 1, rank, gains)
        before = {site.keys: paths.lookup(self._adapted.params, site.keys) for site in self._adapted.plan.sites}
        dtypes = {fields["a"].dtype for fields in before.values()}
        larger = empty(self._adapted.base, sites, dtypes.pop() if len(dtypes) == 1 else None)
        params, after = larger.params, {site.keys: _slotted(site) for site in larger.plan.sites}
        for site in self._adapted.plan.sites:
            old = grown(_slotted(site), after[site.keys], before[site.keys], site.in_size * site.out_size)
            new = paths.lookup(params, site.keys)
            filled = {name: _filled(array, old[name]) if name in old else array for name, array in new.items()}
            paths.insert(params, site.keys, {name: _as_before(filled[name], new[name]) for name in new})
        self._adapted = larger.replace(params=params)

    def check(self, fn: Callable[..., Any], *rows: Any) -> None:
        """Tries whether a function gives each row what it gives that row alone: once, when a program is set up.

        The slots of rows are matched to the leading axes of activations, so the function must keep its batch axis in front, and
        compute no row from another. The function is run on random adapters, all rows together, and by `vmap` on each alone.

        Args:
            fn: `fn(params, *rows)`, not lifted, such as `lambda p, x: model.apply({"params": p}, x)`. Results are arrays with
                the rows in front.
            rows: its inputs, trees of arrays with two rows or more in front.

        Raises:
            ValueError: with the leaf and the line where an activation has other leading axes, or with the row that differs.
        """
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(rows)}
        if len(sizes) != 1 or min(sizes) < (2,):
            raise ValueError(f"check takes inputs with two rows or more in front, as many in each; got {sorted(sizes)}")
        ((count,),) = sizes
        trial = _trial(self._adapted, count)
        lifted, slot = lift(fn), jnp.arange(count)

        @jax.jit
        def both(trial: Adapted, rows: Any) -> Any:
            def alone(slot: jax.Array, row: Any) -> Any:
                outputs = lifted(trial.on(slot=slot), *jax.tree.map(lambda x: x[None], row))
                return jax.tree.map(lambda y: y[0] if y.shape[:1] == (1,) else y, outputs)

            return lifted(trial.on(slot=slot), *rows), jax.vmap(alone)(slot, rows)

        for keys, (together, alone) in _pairs(both(trial, rows)):
            _check_rows(keys, np.asarray(together), np.asarray(alone), count)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        sites = len(self._adapted.plan.sites)
        return f"Bank({', '.join(self._slots)}; {len(self)} of {self.capacity} adapters at {sites} sites)"

    @property
    def _method(self) -> Slotted:
        return _slotted(self._adapted.plan.sites[0])

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            raise ValueError(f"no adapter {name!r} in the bank; there are {', '.join(self._slots) or 'none'}")
        return self._slots[name]

    def _by_name(self, weights: Mapping[str | None, Any]) -> jax.Array:
        """The weights `[..., slots]` of adapters that are given by name."""
        columns = {int(self.ids(name)): jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
        shape = jnp.broadcast_shapes(*(column.shape for column in columns.values()))
        zero = jnp.zeros(shape, jnp.float32)
        found = [jnp.broadcast_to(columns.get(n, zero), shape) for n in range(self._method.slots)]
        return jnp.stack(found, axis=-1)

    def _read(self, name: str, source: Source) -> Placed:
        """An adapter's arrays as a slot has them, if there is room."""
        found = self._entry(name, source)
        self._check_room(name, found)
        return self._placed(name, found)

    def _entry(self, name: str, source: Source) -> Entry:
        dtype = paths.lookup(self._adapted.params, self._adapted.plan.sites[0].keys)["a"].dtype
        return entry_of(name, source, self._adapted.base, self._torch_names, dtype)

    def _placed(self, name: str, found: Entry) -> Placed:
        return in_slots(name, found, {site.keys: site for site in self._adapted.plan.sites}, "grow(fit=...)")

    def _check_room(self, name: str, found: Entry) -> None:
        own = {site.keys: site for site in self._adapted.plan.sites}
        for keys, site in found.sites.items():
            if keys not in own:
                raise ValueError(
                    f"{site.path}: the bank has no room for this leaf, which {name!r} adapts; grow(fit=...)"
                )
            check_alike(own[keys], site)
            has, wants = _slotted(own[keys]), _slotted(site)
            if wants.rank > has.rank:
                raise ValueError(
                    f"{site.path}: {name!r} has rank {wants.rank}, but the bank room for {has.rank}; grow(rank={wants.rank})"
                )
            if wants.gains and not has.gains:
                raise ValueError(f"{site.path}: {name!r} has a gain, and the bank no room for gains; grow(gains=True)")

    def _write(self, name: str, slot: int, found: Placed) -> None:
        self._overwrite(slot, found)
        self._slots[name] = slot

    def _overwrite(self, slot: int, arrays: Placed) -> None:
        """Fills a slot with some leaves' arrays, and with nothing at all others."""
        new: dict[str, Any] = {}
        for site in self._adapted.plan.sites:
            own = paths.lookup(self._adapted.params, site.keys)
            depth, given = len(site.batch_axes), arrays.get(site.keys, {})
            paths.insert(new, site.keys, {name: _padded(name, given.get(name), x, depth) for name, x in own.items()})
        sites, before = self._adapted.plan.sites, self._adapted.params
        depths = tuple(len(site.batch_axes) for site in sites)
        shapes = [{name: _shape(x) for name, x in paths.lookup(before, site.keys).items()} for site in sites]
        banks, fields = ([paths.lookup(tree, site.keys) for site in sites] for tree in (before, new))
        params: dict[str, Any] = {}
        for site, written, lie in zip(sites, put(banks, fields, jnp.int32(slot), depths), shapes, strict=True):
            paths.insert(params, site.keys, {name: _as_before(x, lie[name]) for name, x in written.items()})
        self._adapted = self._adapted.replace(params=params)


def _sites(each: Sequence[Mapping[tuple[str, ...], Site]], slots: int, rank: int, gains: bool) -> list[Site]:
    """The leaves of some banks or adapters, each with room for what any of them has there."""
    found: dict[tuple[str, ...], list[Site]] = {}
    for sites in each:
        for keys, site in sites.items():
            found.setdefault(keys, []).append(site)
            check_alike(found[keys][0], site)
    gains = gains or any(_slotted(site).gains for same in found.values() for site in same)
    least = Slotted(slots, rank, gains)
    return [replace(same[0], method=with_room([*map(_slotted, same), least], slots)) for same in found.values()]


def _slotted(site: Site) -> Slotted:
    assert isinstance(site.method, Slotted)
    return site.method


def _padded(name: str, given: Any, bank: jax.Array, depth: int) -> jax.Array:
    """What a slot of a bank's array gets: the given array filled up to its shape, or nothing's."""
    shape = (*bank.shape[:depth], *bank.shape[depth + 1 :])
    if given is None:
        return jnp.full(shape, name == "gain", bank.dtype)
    return _filled(jnp.zeros(shape, bank.dtype), given)


def _filled(whole: jax.Array, part: Any) -> jax.Array:
    """`part` at the beginning of every axis of `whole`."""
    return whole.at[tuple(slice(size) for size in part.shape)].set(part.astype(whole.dtype))


def _shape(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placement.named_sharding(array))


def _as_before(array: jax.Array, like: Any) -> jax.Array:
    """An array that lies as another one does.

    XLA may write an equal sharding in another way, for which a compiled step would be compiled anew.
    """
    sharding = placement.named_sharding(like)
    return array if sharding is None else jax.device_put(array, sharding)


def _trial(adapted: Adapted, count: int) -> Adapted:
    """A small bank of random adapters at the same leaves, with a slot for each of some rows."""
    sites = tuple(replace(site, method=Slotted(count, 1)) for site in adapted.plan.sites)
    trial = empty(adapted.base, sites, None)
    params: dict[str, Any] = {}
    for n, site in enumerate(sites):
        own = paths.lookup(trial.params, site.keys)
        keys = dict(zip(own, jax.random.split(jax.random.key(n), len(own))))
        sizes = {"a": 1.0, "b": site.in_size**-0.5}
        drawn = {name: sizes[name] * jax.random.normal(keys[name], x.shape, x.dtype) for name, x in own.items()}
        paths.insert(params, site.keys, drawn)
    return trial.replace(params=params)


def _pairs(both: tuple[Any, Any]) -> list[tuple[str, tuple[Any, Any]]]:
    """The outputs of two runs side by side, each with its place in the result."""
    found = [jax.tree_util.tree_flatten_with_path(each)[0] for each in both]
    return [(jax.tree_util.keystr(keys) or "", (one, other)) for (keys, one), (_, other) in zip(*found, strict=True)]


def _check_rows(keys: str, together: np.ndarray, alone: np.ndarray, count: int) -> None:
    """Refuses an output whose rows are others than those that each row gets alone."""
    if together.shape[:1] != (count,) or together.shape != alone.shape:
        raise ValueError(
            f"the function's result{keys} has shape {together.shape}, where {count} rows were wanted in front; let it return "
            "what it computes of each row alone"
        )
    wide = [each.astype(np.float64) for each in (together, alone)]
    size = float(np.max(np.abs(wide[1]), initial=0.0))
    # A row with another one's adapter differs by about as much as it is large.
    bound = size * float(np.sqrt(jnp.finfo(together.dtype).eps)) if jnp.issubdtype(together.dtype, jnp.floating) else 0
    apart = np.max(np.abs(wide[0] - wide[1]).reshape(count, -1), axis=1, initial=0.0)
    if not np.all(apart <= bound):
        row = int(np.argmax(~(apart <= bound)))
        raise ValueError(
            f"row {row} of the function's result{keys} is another one among {count} rows than alone, by {apart[row]:.3g} of "
            f"{size:.3g}: the function must keep the batch axis in front of every product with an adapted weight, and compute "
            "no row from another"
        )
