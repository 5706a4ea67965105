"""The value that travels through a lifted function: a base leaf that remembers what its axes mean.

A function may transpose, reshape, cast, slice or index a weight before it uses it. `Weight` follows all that: each axis
of the current array is a tuple of `Piece`s, each a part of one axis of the leaf in `params`. At the product the pieces say
which axes are contracted, and the method's arrays, which never moved, are applied in their own form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jlora.core.products.chain import Chain, is_less_work
from jlora.core.products.formed import Formed
from jlora.core.products.update import Update
from jlora.core.protocol.code import Code
from jlora.core.protocol.fields import Fields
from jlora.core.protocol.method import Arrays, Method, Site, View
from jlora.core.protocol.stored import Stored


@dataclass(frozen=True, order=True)
class Piece:
    """A part of one axis of a leaf.

    Sorted by `order`, pieces are in the leaf's own order. It starts with the axis; splitting appends 0 (outer part) or 1
    (inner), a lookup that takes matrices out of a stack 2 and the axis of its indices.
    """

    order: tuple[int, ...]
    size: int

    @property
    def axis(self) -> int:
        """The leaf's axis that this is a part of."""
        return self.order[0]

    def split(self, outer: int) -> tuple[Piece, Piece]:
        """The piece as an outer part of the given size and the rest."""
        return Piece((*self.order, 0), outer), Piece((*self.order, 1), self.size // outer)


Axes = tuple[tuple[Piece, ...], ...]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Blank:
    """What stands for the array of a leaf that is kept in another form: its shape and dtype, without values."""

    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def like(cls, array: Any) -> Blank:
        """That of an array."""
        return cls(tuple(array.shape), jnp.dtype(array.dtype))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        """The same as JAX has it."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def moved(self, move: Callable[[jax.Array], jax.Array]) -> Blank:
        """What an array of this shape would be after a move."""
        return Blank.like(jax.eval_shape(move, self.aval))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """A base leaf on its way through a function.

    Attributes:
        array: the base leaf in its current form; `Blank` where it is kept in the form of a code. Then it never moves: `axes`
            tell how the decoded matrices are laid out, which is done where they are used.
        params, frozen: the method's arrays; leading axes are `batch`.
        shared: the method's arrays that all its leaves have in common; no batch axes.
        key: dropout key, or None.
        site: the leaf; static. None while roles are still being found out (see `jlora.sites`).
        name: path of the leaf; static.
        leaf_shape: shape of the leaf; static.
        axes: the pieces that make up each axis of `array`; static.
        batch: the batch pieces that are the leading axes of the method's arrays, in order; static.
        factor: the number by which the function multiplied the weight, or None.
        stored: `array` without that factor, which is what the method sees; None where they are the same, and with a code.
        beside: what `Method.beside` names and the tree has; laid out like the fields.
        lookups: the lookups that it went through, noted as readings of a table; while roles are being found out they are
            taken back where what was looked up turns out to be matrices of a stack. Static.
        codes: the fields of the code; leading axes are `batch`.
        code: the form in which the leaf is kept, or None; static.
        cuts: inside of `shard_map` the mesh axes that cut it, by the `order` of the piece that they cut; static.
        whole: whether the method's arrays are whole although the base's is cut, which is gathered before it is used; static.
        common: the fields of the code that all matrices have in common; no batch axes.
        context: what the call told the method; no batch axes.
    """

    array: jax.Array | Blank
    params: Arrays
    frozen: Arrays
    shared: Arrays
    key: jax.Array | None
    site: Site | None = field(metadata={"static": True})
    name: str = field(metadata={"static": True})
    leaf_shape: tuple[int, ...] = field(metadata={"static": True})
    axes: Axes = field(metadata={"static": True})
    batch: tuple[Piece, ...] = field(metadata={"static": True})
    factor: jax.Array | None = None
    stored: jax.Array | None = None
    beside: Arrays = field(default_factory=dict)
    lookups: tuple[Any, ...] = field(default=(), metadata={"static": True})
    codes: Arrays = field(default_factory=dict)
    code: Code | None = field(default=None, metadata={"static": True})
    cuts: tuple[tuple[tuple[int, ...], tuple[Any, ...]], ...] = field(default=(), metadata={"static": True})
    whole: bool = field(default=False, metadata={"static": True})
    common: Arrays = field(default_factory=dict)
    context: Arrays = field(default_factory=dict)

    @property
    def aval(self) -> Any:
        """The abstract value of `array`."""
        return self.array.aval if isinstance(self.array, Blank) else jax.typeof(self.array)

    @property
    def method(self) -> Method:
        """The method of the site."""
        assert self.site is not None
        return self.site.method

    @property
    def form(self) -> type[Update]:
        """The form of the method's update; `Formed` where it gives the weight alone."""
        return self.method.form or Formed

    @property
    def acts_alone(self) -> bool:
        """Whether what the leaf does can't be said by another weight in its place.

        Its input is needed; or what is drawn by a key decides what becomes of a leaf beside, which the function has as it is.
        """
        return not self.method.mergeable or (bool(self.beside) and self.key is not None and self.form.draws)

    def owns(self, use: str) -> bool:
        """Whether the method's form has a use of its own by that name (see `jlora.core.products.update`)."""
        return self.method.matrix and self.form.owns(use) and (use in self.form.alone or not self.acts_alone)

    def role(self, piece: Piece) -> str:
        """ "in", "out" or "batch"."""
        assert self.site is not None
        if piece.axis in self.site.in_axes:
            return "in"
        return "out" if piece.axis in self.site.out_axes else "batch"

    def with_role(self, role: str) -> list[Piece]:
        """The pieces of one role, in the leaf's own order."""
        return sorted(piece for axis in self.axes for piece in axis if self.role(piece) == role)

    def moved(self, move: Callable[[jax.Array], jax.Array], **changes: Any) -> Weight:
        """The weight with its array moved, and what else that changes."""
        stored = None if self.stored is None else move(self.stored)
        array = self.array.moved(move) if isinstance(self.array, Blank) else move(self.array)
        return replace(self, array=array, stored=stored, **changes)

    def on_fields(self, change: Any) -> Weight:
        """The weight with `change` applied to every array of the method, and of the code, that is the leaf's own."""
        fields = (self.params, self.frozen, self.beside, self.codes)
        params, frozen, beside, codes = jax.tree.map(change, fields)
        return replace(self, params=params, frozen=frozen, beside=beside, codes=codes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Several:
    """Leaves whose roles are being found out, joined to one array.

    Attributes:
        members: the leaves, each with the joined array as its own.
    """

    members: tuple[Weight, ...]

    @property
    def array(self) -> Any:
        """The joined array."""
        return self.members[0].array


def members(value: Any) -> tuple[Weight, ...]:
    """The leaves that are in a value."""
    return value.members if isinstance(value, Several) else (value,) if isinstance(value, Weight) else ()


def joined(array: jax.Array, found: Sequence[Weight]) -> Any:
    """An array together with the leaves that are in it, if any; parts of one leaf, as after a roll, are that leaf."""
    distinct = {(each.name, each.axes, each.lookups): each for each in found}.values()
    return array if not found else found[0] if len(distinct) == 1 else Several(tuple(distinct))


def start(
    array: Any,
    site: Site,
    params: Arrays,
    frozen: Arrays,
    shared: Arrays,
    key: jax.Array | None,
    beside: Arrays,
    context: Arrays,
) -> Weight:
    """A leaf of the base as the function receives it."""
    axes = tuple((Piece((axis,), size),) for axis, size in enumerate(site.shape))
    batch = tuple(Piece((axis,), site.shape[axis]) for axis in site.batch_axes)
    if isinstance(array, Stored):
        array.check(site.path)
    codes, code, common = (array.fields, array.code, array.common) if isinstance(array, Stored) else ({}, None, {})
    array = Blank.like(array) if code is not None else array
    laid_out = (site, site.path, site.shape, axes, batch)
    own: Any = {"beside": beside, "codes": codes, "common": common, "context": context}
    return Weight(array, params, frozen, shared, key, *laid_out, code=code, **own)


def probe(array: jax.Array, name: str) -> Weight:
    """A leaf whose roles are to be found out."""
    axes = tuple((Piece((axis,), size),) for axis, size in enumerate(array.shape))
    return Weight(array, {}, {}, {}, None, None, name, tuple(array.shape), axes, ())


def shape_of(axes: Axes) -> tuple[int, ...]:
    """The array shape that groups of pieces stand for."""
    return tuple(math.prod(piece.size for piece in axis) for axis in axes)


def rearrange(array: jax.Array, have: Axes, want: Axes) -> jax.Array:
    """Moves an array from one grouping of pieces to another; both hold the same pieces, save pieces of size 1."""
    flat = [piece for axis in have for piece in axis if piece.size != 1]
    target = [piece for axis in want for piece in axis if piece.size != 1]
    if flat == target:
        return _reshape(array, shape_of(want))
    array = _reshape(array, tuple(piece.size for piece in flat))
    return _reshape(jax.lax.transpose(array, [flat.index(piece) for piece in target]), shape_of(want))


def _reshape(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return array if array.shape == shape else jax.lax.reshape(array, shape)


def canonical_axes(weight: Weight) -> Axes:
    """The grouping `[*batch, in, out]` in which methods see the weight."""
    return (
        *((piece,) for piece in weight.batch),
        tuple(weight.with_role("in")),
        tuple(weight.with_role("out")),
    )


def matrix(weight: Weight) -> jax.Array:
    """The base's array as `[*batch, in, out]`, as the function has it."""
    if isinstance(weight.array, Blank):
        return _times(weight, over_batch(lambda view: view.w, weight))
    return rearrange(weight.array, weight.axes, canonical_axes(weight))


def has_chain(weight: Weight, rows: Any) -> bool:
    """Whether a product of so many rows with each of the base's matrices is less work by the matrices that make it up."""
    if weight.code is None or not weight.form.chains:
        return False
    found = jax.eval_shape(lambda codes: _factored(weight, codes), weight.codes)
    return found is not None and is_less_work(rows, [each.shape[-2:] for each in found])


def chain(weight: Weight) -> Chain:
    """The base's matrices `[*batch, in, out]` as the products that they are, for a weight that `has_chain`."""
    found = _factored(weight, weight.codes)
    assert found is not None
    factor = weight.factor if weight.factor is None else jnp.broadcast_to(weight.factor, found[0].shape[:-2])
    return Chain(tuple(each.astype(weight.array.dtype) for each in found), factor)


def _factored(weight: Weight, codes: Arrays) -> tuple[jax.Array, ...] | None:
    """What the code makes each of the base's matrices of, batch axes in front."""
    code = weight.code
    assert code is not None

    def one(fields: Arrays) -> tuple[jax.Array, ...] | None:
        return code.factored(fields | weight.common, *_sizes(weight))

    for _ in weight.batch:
        one = jax.vmap(one)
    return one(codes)


def _sizes(weight: Weight) -> tuple[int, int]:
    """Rows and columns of each matrix, of what `shard_map` has here."""
    rows, columns = (math.prod(piece.size for piece in weight.with_role(role)) for role in ("in", "out"))
    return rows, columns


def base(weight: Weight) -> jax.Array:
    """The base's array in its current form and dtype."""
    if isinstance(weight.array, Blank):
        return rearrange(matrix(weight), canonical_axes(weight), weight.axes)
    return weight.array


def _times(weight: Weight, array: jax.Array) -> jax.Array:
    """An array times the number by which the function multiplied the weight."""
    return array if weight.factor is None else array * weight.factor.astype(array.dtype)


def _matrices(weight: Weight) -> Any:
    """What `_matrix` makes the base's matrices of, without the function's factor; batch axes in front."""
    if isinstance(weight.array, Blank):
        return weight.codes
    array = weight.array if weight.stored is None else weight.stored
    return rearrange(array, weight.axes, canonical_axes(weight))


def _matrix(weight: Weight, one: Any) -> jax.Array:
    """One matrix `[in, out]` of the base; of a code in the dtype of the leaf, then in that to which the function cast it."""
    if weight.code is None:
        return one
    assert weight.site is not None
    found = weight.code.decode(one | weight.common, *_sizes(weight))
    return found.astype(weight.site.dtype).astype(weight.array.dtype)


def over_batch(
    function: Any, weight: Weight, extra: tuple[Any, ...] = (), along: Callable[[Piece], Any] = lambda piece: 0
) -> Any:
    """`function(View, *extra)` mapped over the batch axes of a weight; results have them in front.

    Args:
        function: of one matrix.
        weight: the weight.
        extra: more arguments, with the batch axes in front that they share with the weight.
        along: `in_axes` of the extra arguments for a batch piece.
    """
    site, shared = weight.site, weight.shared
    assert site is not None

    def one(base: Any, fields: tuple[Arrays, Arrays, Arrays], *extra: Any) -> Any:
        params, frozen, beside = fields
        kept = {"codes": base | weight.common, "code": weight.code} if isinstance(site.method, Fields) else {}
        view = View(_matrix(weight, base), params, frozen, site, shared, beside, context=weight.context, **kept)
        return function(view, *extra)

    for piece in reversed(weight.batch):
        one = jax.vmap(one, in_axes=(0, 0, *(along(piece) if extra else ())))
    return one(_matrices(weight), (weight.params, weight.frozen, weight.beside), *extra)


def update(weight: Weight) -> Update:
    """The update of a weight, beside `matrix(weight)`, with the batch axes in front."""
    return over_batch(lambda view: update_of(weight, view), weight)


def update_of(weight: Weight, view: View) -> Update:
    """The update of one matrix of a weight.

    Raises:
        TypeError: where the method gives it in another form than it says.
    """
    form = weight.method.form
    found = Formed(view) if form is None else weight.method.update(view)
    if not isinstance(found, weight.form):
        raise TypeError(
            f"{weight.name}: {weight.method} has the form {weight.form.__name__}, but its update is of the form "
            f"{type(found).__name__}; let form name the class that update returns"
        )
    return found if weight.factor is None else found.times(weight.factor)


def effective(weight: Weight) -> jax.Array:
    """The effective weight in the array's current form and dtype."""
    if not weight.method.matrix:
        assert weight.site is not None and not isinstance(weight.array, Blank)
        arrays = (weight.params, weight.frozen)
        view = View(weight.array, *arrays, weight.site, weight.shared, context=weight.context)
        return weight.method.weight(view).astype(weight.array.dtype)
    folded = over_batch(weight.method.weight, weight).astype(weight.array.dtype)
    return _times(weight, rearrange(folded, canonical_axes(weight), weight.axes))


def regroup(
    weight: Weight, order: Sequence[int], shape: tuple[int, ...], reshape: Callable[[jax.Array], jax.Array]
) -> Weight | None:
    """The weight reshaped, its axes read in the given order; None where the new axes would not be whole pieces."""
    pieces = [piece for axis in order for piece in weight.axes[axis]]
    axes, splits = [], []
    for size in shape:
        group: list[Piece] = []
        while (need := size // math.prod(piece.size for piece in group)) > 1:
            if not pieces:
                return None
            piece = pieces.pop(0)
            if need % piece.size and piece.size % need == 0:
                outer, inner = piece.split(need)
                splits.append((piece, outer, inner))
                pieces.insert(0, inner)
                piece = outer
            elif need % piece.size:
                return None
            group.append(piece)
        if size == 1 and pieces and pieces[0].size == 1:
            group.append(pieces.pop(0))
        axes.append(tuple(group))
    if any(piece.size > 1 for piece in pieces):
        return None
    moved = weight.moved(reshape, axes=tuple(axes))
    for piece, outer, inner in splits:
        moved = _split_batch(moved, piece, outer, inner)
    return moved


def _split_batch(weight: Weight, piece: Piece, outer: Piece, inner: Piece) -> Weight:
    """Splits a batch axis of the method's arrays as the weight's own was split."""
    if piece not in weight.batch:
        return weight
    at = weight.batch.index(piece)
    batch = (*weight.batch[:at], outer, inner, *weight.batch[at + 1 :])
    weight = weight.on_fields(lambda x: x.reshape(*x.shape[:at], outer.size, inner.size, *x.shape[at + 1 :]))
    return replace(weight, batch=batch)


def single_batch_piece(weight: Weight, axis: int) -> Piece | None:
    """The batch piece that axis `axis` of the array consists of, or None where it is anything else."""
    group = [piece for piece in weight.axes[axis] if piece.size > 1] or list(weight.axes[axis])
    return group[0] if len(group) == 1 and group[0] in weight.batch else None


def narrow(weight: Weight, axis: int, size: int, cut_array: Any, cut: Any) -> Weight | None:
    """Cuts axis `axis` to `size` entries; None where that axis is not one batch axis.

    `cut_array(array)` cuts the weight's array; `cut(field, axis)` the same along an axis of a method's array.
    """
    if weight.site is None:
        piece = weight.axes[axis][0] if len(weight.axes[axis]) == 1 else None
    else:
        piece = single_batch_piece(weight, axis)
    if piece is None:
        return None
    smaller = Piece(piece.order, size)
    if weight.site is not None:
        at = weight.batch.index(piece)
        batch = (*weight.batch[:at], smaller, *weight.batch[at + 1 :])
        weight = replace(weight.on_fields(lambda x: cut(x, at)), batch=batch)
    axes = (*weight.axes[:axis], (smaller,), *weight.axes[axis + 1 :])
    return weight.moved(cut_array, axes=axes)


def stop(weight: Weight) -> Weight:
    """The weight with no gradient flowing into anything of it."""
    alike = {name: getattr(weight, name) for name in ("shared", "factor", "common", "context")}
    halted = jax.tree.map(jax.lax.stop_gradient, alike)
    stopped = weight.on_fields(jax.lax.stop_gradient).moved(jax.lax.stop_gradient)
    return replace(stopped, **halted)


def unstack(weight: Weight) -> tuple[Weight, Any] | None:
    """Prepares a weight for a `scan` along its first axis.

    Returns:
        The weight with the scanned axis first in all its arrays, and a function that makes one step's slice of it a weight
        again, inside the loop; None where the axis is no batch axis.
    """
    rest = weight.axes[1:]
    if weight.site is None:
        return weight, lambda sliced: replace(sliced, axes=rest)
    piece = single_batch_piece(weight, 0)
    if piece is None:
        return None
    at = weight.batch.index(piece)
    batch = (*weight.batch[:at], *weight.batch[at + 1 :])
    # What has no axis to scan over reaches every step as it is.
    bare = replace(weight, shared={}, context={}, factor=None, common={})
    moved = bare.on_fields(lambda x: jnp.moveaxis(x, at, 0))
    whole: dict[str, Any] = {"shared": weight.shared, "common": weight.common, "factor": weight.factor}
    whole["context"] = weight.context
    if isinstance(weight.array, Blank):
        whole["array"] = weight.array.moved(lambda array: array[0])
    return moved, lambda sliced: replace(sliced, axes=rest, batch=batch, **whole)


def partition_specs(weight: Weight, spec: PartitionSpec) -> Weight | None:
    """How the arrays of a weight are cut where its base array is cut by `spec`; a `Weight` of partition specs.

    None where the method may not be cut that way, or where a cut would not fall on the outermost part of a role.
    """
    if weight.site is None:
        return replace(weight, array=spec)
    cuts: dict[Any, Any] = {}
    for axis, names in enumerate(spec):
        if names is None:
            continue
        group = [piece for piece in weight.axes[axis] if piece.size > 1]
        role = weight.role(group[0]) if group else ""
        first = group[:1] == (weight.with_role(role)[:1] if role != "batch" else group)
        parts = weight.method.local if weight.code is None else weight.method.local & weight.code.local
        if not group or not first or not (role == "batch" or role in parts):
            return None
        cuts[group[0] if role == "batch" else role] = names
    leading = [cuts.get(piece) for piece in weight.batch]

    def field_spec(name: str, axes: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
        return PartitionSpec(*leading, *(cuts.get(role) for role in axes.get(name, ())))

    return replace(
        weight,
        array=weight.array if isinstance(weight.array, Blank) else spec,
        stored=None if weight.stored is None else spec,
        factor=None if weight.factor is None else PartitionSpec(),
        key=None if weight.key is None else PartitionSpec(),
        params={name: field_spec(name, weight.method.axes) for name in weight.params},
        frozen={name: field_spec(name, weight.method.axes) for name in weight.frozen},
        shared={name: PartitionSpec() for name in weight.shared},
        beside={name: PartitionSpec(*leading, cuts.get("out")) for name in weight.beside},
        codes={} if weight.code is None else {name: field_spec(name, weight.code.axes) for name in weight.codes},
        common={name: PartitionSpec() for name in weight.common},
        context={name: PartitionSpec() for name in weight.context},
    )


def whole_specs(weight: Weight, spec: PartitionSpec) -> Weight:
    """`partition_specs` for a weight that is gathered before it is used: its base array is cut, the method's are whole."""
    return replace(
        jax.tree.map(lambda _: PartitionSpec(), replace(weight, array=None, stored=None)),
        array=spec,
        stored=None if weight.stored is None else spec,
        whole=True,
    )


def cut_blank(weight: Weight, spec: PartitionSpec, specs: Weight, sizes: Mapping[str, int]) -> Weight | None:
    """A weight that is kept as a code, with the shape that one shard of a mesh has; None where a cut falls into a block.

    Args:
        weight: the weight.
        spec: how its base array is cut.
        specs: its `partition_specs`.
        sizes: those of the mesh's axes.
    """
    for name, array in weight.codes.items():
        if any(size % count for size, count in zip(array.shape, _pieces(specs.codes[name], sizes))):
            return None
    shape = list(weight.array.shape)
    for axis, count in enumerate(_pieces(spec, sizes)):
        shape[axis] //= count
    return replace(weight, array=Blank(tuple(shape), weight.array.dtype))


def _pieces(spec: Any, sizes: Mapping[str, int]) -> list[int]:
    """Into how many pieces each axis is cut."""
    names = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec]
    return [math.prod(sizes[name] for name in each) for each in names]


def localised(weight: Weight, spec: PartitionSpec) -> Weight:
    """The weight with its pieces resized to one shard's part of the array, which `spec` cuts."""
    smaller: dict[Piece, Piece] = {}
    cuts = dict(weight.cuts)
    for group, size, names in zip(weight.axes, weight.array.shape, (*spec, *([None] * len(weight.axes)))):
        whole = math.prod(piece.size for piece in group)
        if group and names:
            cut = next((piece for piece in group if piece.size > 1), group[0])
            smaller[cut] = Piece(cut.order, cut.size * size // whole)
            cuts[cut.order] = (*cuts.get(cut.order, ()), *((names,) if isinstance(names, str) else names))
    return resized(replace(weight, cuts=tuple(cuts.items())), smaller)


def resized(weight: Weight, new: Mapping[Piece, Piece]) -> Weight:
    """The weight with some pieces of another size in place of its own."""
    axes = tuple(tuple(new.get(piece, piece) for piece in group) for group in weight.axes)
    return replace(weight, axes=axes, batch=tuple(new.get(piece, piece) for piece in weight.batch))


def along(weight: Weight, piece: Piece, change: Callable[[jax.Array, int], jax.Array]) -> Weight:
    """The weight with `change(array, axis)` applied to the method's and the code's arrays that have an axis for a piece.

    Either the batch axis that the piece is, or those of the role of which it is the outermost.
    """
    if piece in weight.batch:
        return weight.on_fields(lambda array: change(array, weight.batch.index(piece)))
    if weight.site is None:
        return weight
    role, first = weight.role(piece), len(weight.batch)

    def changed(arrays: Arrays, axes: Mapping[str, tuple[str, ...]]) -> Arrays:
        moved = {name: change(x, first + axes[name].index(role)) for name, x in arrays.items() if role in axes[name]}
        return {**arrays, **moved}

    own = weight.method.axes
    return replace(
        weight,
        params=changed(weight.params, own),
        frozen=changed(weight.frozen, own),
        beside=changed(weight.beside, dict.fromkeys(weight.beside, ("out",))),
        codes=weight.codes if weight.code is None else changed(weight.codes, weight.code.axes),
    )
