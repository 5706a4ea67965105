"""LoRA and DoRA from PEFT's format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.method import Method, Site
from jlora.core.tree.starts import start_of
from jlora.interchange.files.config import Settings
from jlora.interchange.files.folder import AdapterFolder
from jlora.interchange.files.parse import WRAPPED, Contents
from jlora.interchange.files.recorded import Recorded
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.index import Index, Keys, Read, trained_dtype
from jlora.interchange.leaves.names import Slot
from jlora.methods import DoRA, Full, LoRA
from jlora.methods.dora import column_norms

# The out_proj of torch's MultiheadAttention, inside PEFT's wrapper. PEFT merges it twice, with the attention and as a layer of
# its own, so its scale counts twice.
INNER = f"{WRAPPED}.out_proj"


@dataclass(frozen=True)
class Stored:
    """The LoRA of one torch parameter as a file has it.

    Attributes:
        name: the parameter.
        a, b: keys of the factors.
        m: key of DoRA's magnitude, or None.
        bias: key of the bias of B (PEFT's `lora_bias`), which is added to the output times the scale; or None.
        rank: columns of `a`, by the settings.
        scale: the factor of `a @ b`.
        rslora: whether the scale is `alpha / sqrt(rank)`.
    """

    name: str
    a: str
    b: str
    m: str | None
    bias: str | None
    rank: int
    scale: float
    rslora: bool


@dataclass(frozen=True)
class Part:
    """One slot's LoRA in jlora's layout: `a [in, r]`, `b [r, columns]`, `m [columns]`."""

    slot: Slot
    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None
    scale: float


def find(folder: AdapterFolder, settings: Settings, contents: Contents, index: Index) -> dict[str, Stored]:
    """The LoRA of each torch parameter; shapes are checked, nothing is read.

    Raises:
        ValueError: for a missing or superfluous tensor, or one of another shape.
    """
    found: dict[str, Stored] = {}
    for stem, roles in contents.adapters.items():
        name = _parameter(stem, settings, contents, index, next(iter(roles.values())))
        found[name] = _stored(folder, settings, stem, name, roles, index)
        if "bias" in roles:
            _check_bias(folder, roles["bias"], f"{stem}.bias", contents, index)
    return found


def _stored(
    folder: AdapterFolder, settings: Settings, stem: str, name: str, roles: dict[str, str], index: Index
) -> Stored:
    pair = _factors(folder, settings, stem, roles)
    key, tied, inner = roles[pair[0]], name in index.tied, stem.endswith(INNER)
    slot = index.by_name[index.tied.get(name, name)][0]
    if not tied and (pair[0] == "embedding_a") != (slot.kind == "embedding"):
        raise ValueError(f"{folder.file}: {key!r} and the names differ on whether {name!r} is an embedding")
    _check_attention(folder, stem, key, index)
    _check_groups(folder, key, roles[pair[1]], slot)
    # A module of a parameter may also be a Linear, as routers were in former versions of transformers.
    bare = slot.experts is not None or (slot.by_parameter and settings.adapts_parameter(name))
    if not (inner or tied or bare):
        settings.check_target(stem, key)
    goal = stem.removesuffix(INNER) if inner else slot.name if bare else name.rpartition(".")[0]
    rank, alpha, rslora = settings.rank(goal), settings.alpha(goal), settings.flag("use_rslora")
    scale = alpha / (rank**0.5 if rslora else rank) * (2 if inner else 1)
    found = Stored(name, key, roles[pair[1]], roles.get("m"), roles.get("bias"), rank, scale, rslora)
    _check_shapes(folder, found, slot, tied)
    return found


def _factors(folder: AdapterFolder, settings: Settings, stem: str, roles: dict[str, str]) -> tuple[str, str]:
    """The roles of A and B: those of an embedding, or those of any other module.

    Raises:
        ValueError: where one of the two is missing, or the magnitude is missing or superfluous.
    """
    pair = ("embedding_a", "embedding_b") if {"embedding_a", "embedding_b"} & set(roles) else ("a", "b")
    for role, text in zip(pair, ("A", "B")):
        if role not in roles:
            raise ValueError(f"{folder.file}: {stem!r} has no lora {text}; the file is not whole")
    if settings.flag("use_dora") != ("m" in roles):
        raise ValueError(f"{folder.file}: use_dora is {settings.flag('use_dora')}, but {stem!r} has "
                         f"{'a' if 'm' in roles else 'no'} magnitude")  # fmt: skip
    return pair


def _check_attention(folder: AdapterFolder, stem: str, key: str, index: Index) -> None:
    """Refuses an adapter of the `out_proj` alone of torch's MultiheadAttention: PEFT never calls it."""
    attention, _, last = stem.rpartition(".")
    if last == "out_proj" and not stem.endswith(INNER) and f"{attention}.in_proj_weight" in index.by_name:
        raise ValueError(
            f"{folder.file}: {key!r} adapts the out_proj of torch's MultiheadAttention {attention!r}, which PEFT never uses; "
            "take the tensor out, or train it anew with the attention itself as the target"
        )


def _check_groups(folder: AdapterFolder, a: str, b: str, slot: Slot) -> None:
    """Refuses PEFT's LoRA of a convolution in groups: its A reads the channels of all groups, and no kernel does that."""
    if slot.kind != "conv" or min(len(folder.shape(key)) for key in (a, b)) < 3:
        return
    (rank, channels), ranks, own = folder.shape(a)[:2], folder.shape(b)[1], slot.sizes("in")[-1]
    if channels > own and channels * ranks == own * rank:
        raise ValueError(
            f"{folder.file}: {a!r} reads {channels} channels where a filter of {slot.name!r} has {own}: PEFT's LoRA of a "
            f"convolution in {channels // own} groups reads all channels, which is no change of the kernel and can't be loaded"
        )


def _check_bias(folder: AdapterFolder, key: str, name: str, contents: Contents, index: Index) -> None:
    """Checks the bias of a B, which changes the module's own bias: that must exist, and not be stored as well."""
    if name in contents.parameters:
        raise ValueError(f"{folder.file}: {key!r} and {contents.parameters[name]!r} both change the bias of one module")
    folder.check(key, layout.torch_shape(index.by_name[index.parameter(name, key)][0]), f"{name!r}")


def _parameter(stem: str, settings: Settings, contents: Contents, index: Index, key: str) -> str:
    module = stem
    while module.endswith(WRAPPED):
        module = module.removesuffix(WRAPPED)
    depth = (len(stem) - len(module)) // len(WRAPPED)
    targeted = settings.names("target_parameters")
    if targeted and any(slots[0].by_parameter and slots[0].module == module for slots in index.by_name.values()):
        nested = index.bare(module, targeted, key)
        if depth < len(nested):
            return nested[depth]
    return index.matrix(stem.replace(WRAPPED + ".", "."), key)


def _check_shapes(folder: AdapterFolder, stored: Stored, slot: Slot, flipped: bool) -> None:
    what = f"rank {stored.rank} of {stored.name!r}"
    shapes = layout.a_shape(slot, stored.rank), layout.b_shape(slot, stored.rank)
    if flipped:  # a tied head, the transpose of its embedding
        shapes = shapes[1][::-1], shapes[0][::-1]
    folder.check(stored.a, shapes[0], what)
    folder.check(stored.b, shapes[1], what)
    if stored.m is not None:
        width = slot.torch_columns()[2]
        folder.check(stored.m, (1, width, *shapes[1][2:]) if slot.kind == "conv" else (width,), what)


def read(
    folder: AdapterFolder, settings: Settings, found: dict[str, Stored], index: Index, recorded: Recorded
) -> list[Read]:
    """The adapters, one for each leaf, and the biases of B as trained biases.

    Raises:
        ValueError: for tied weights that are adapted differently, or tensors that disagree with jlora's manifest.
    """
    _check_tied(folder, found, index)
    for one in found.values():
        recorded.check(one.a, one.name, one.rank, one.scale)
    result = []
    for keys in index.leaves_of(set(found)):
        stored = {
            slot: one
            for slot in index.slots[keys]
            if (one := found.get(slot.name)) and recorded.holds(one.a, slot, index.by_name[slot.name])
        }
        if not stored:  # the leaf is a part of a fused parameter, and only other parts are adapted
            continue
        parts = [_part(folder, slot, one, index.leaves[keys].dtype, recorded) for slot, one in stored.items()]
        result.append(_leaf(keys, parts, stored, index, settings, recorded))
    return result + _biases(folder, found, index)


def _biases(folder: AdapterFolder, found: dict[str, Stored], index: Index) -> list[Read]:
    """The biases of B as trained biases of the modules."""
    stored = {f"{name.rpartition('.')[0]}.bias": one for name, one in found.items() if one.bias is not None}
    result = []
    for keys in index.leaves_of(set(stored)):
        leaf = index.leaves[keys]
        dtype = trained_dtype(leaf.dtype)
        w = np.array(leaf, dtype)
        for slot in (slot for slot in index.slots[keys] if slot.name in stored):
            one = stored[slot.name]
            added = layout.take_columns(slot, folder.read_as(str(one.bias), dtype)) * dtype.type(one.scale)
            layout.whole_from_torch(slot, layout.whole_to_torch(slot, w) + added, w)
        result.append(Read(index.site(keys, Full()), {"w": w}))
    return result


def _check_tied(folder: AdapterFolder, found: dict[str, Stored], index: Index) -> None:
    """Drops the head's adapter where the head is tied to an embedding, since it must be the transpose of the embedding's.

    Raises:
        ValueError: where it is not, or only one of both is adapted.
    """
    for head, embedding in index.tied.items():
        one, other = found.pop(head, None), found.get(embedding)
        if one is None and other is None:
            continue
        if one is not None and other is not None and _are_transposes(folder, one, other):
            continue
        raise ValueError(
            f"{folder.file}: {embedding!r} and {head!r} are one array in this model (tied weights), but the adapter "
            "changes them differently; load the model with tie_word_embeddings: false"
        )


def _are_transposes(folder: AdapterFolder, one: Stored, other: Stored) -> bool:
    pairs = ((one.a, other.b), (one.b, other.a))
    return one.scale == other.scale and all(np.array_equal(folder.read(x), folder.read(y).T) for x, y in pairs)


def _part(folder: AdapterFolder, slot: Slot, stored: Stored, dtype: Any, recorded: Recorded) -> Part:
    kind = trained_dtype(dtype)
    a = layout.a_from_torch(slot, folder.read_as(stored.a, kind))
    b = layout.b_from_torch(slot, folder.read_as(stored.b, kind))
    m = None if stored.m is None else folder.read_as(stored.m, kind).reshape(-1)
    start, stop, _ = slot.torch_columns()
    ranks = recorded.ranks(stored.a, slot, stored.rank)
    return Part(slot, a[..., ranks], b[..., ranks, start:stop], None if m is None else m[start:stop], stored.scale)


def _leaf(
    keys: Keys, parts: list[Part], stored: dict[Slot, Stored], index: Index, settings: Settings, recorded: Recorded
) -> Read:
    """One leaf's adapter, put together of its pieces: with the largest rank and the commonest scale among them."""
    plain = index.site(keys, LoRA(1))
    matrices: dict[tuple[int, ...], list[Part]] = {}
    for part in parts:
        matrices.setdefault(part.slot.index, []).append(part)
    joined = [_join(group, plain) for group in matrices.values()]
    rank = max(part.a.shape[-1] for part in joined)
    scale = Counter(part.scale for part in joined).most_common(1)[0][0]
    if scale <= 0:
        scale = 1.0
    arrays = index.stack(plain, [(part.slot, _padded(part, rank, scale)) for part in joined])
    if any(part.m is not None for part in joined):
        arrays["m"] = _magnitudes(plain, index, joined)
    rslora = next(iter(stored.values())).rslora
    alpha = scale * (rank**0.5 if rslora else rank)
    scaling = "rslora" if rslora else "standard"
    method: Method = LoRA(rank, _whole(alpha), scaling, dropout=settings.probability("lora_dropout"))
    if "m" in arrays:
        method = DoRA(method)
    exact = all(part.scale == scale and part.a.shape[-1] == rank for part in joined)
    whole = (exact and len(joined) == int(np.prod(plain.batch_shape))) or bool(index.slots[keys][0].experts and exact)
    method = (recorded.method(list(stored), method) if exact else None) or _edited(plain, method, settings, whole)
    site = index.site(keys, method)
    return Read(site, *_arrays(method, arrays, site, index))


def _whole(value: float) -> float:
    """The nearest whole number, if the difference is a rounding error such as that of a product with a square root."""
    return round(value) if abs(value - round(value)) < 1e-12 * abs(value) else value


def _join(group: list[Part], site: Site) -> Part:
    """Joins the parts of one matrix (q, k and v of a fused leaf): with one `a` if all have the same, else side by side."""
    if len(group) == 1 and group[0].slot.part is None:
        return group[0]
    first, width = group[0], site.out_size
    same = all(part.scale == first.scale and np.array_equal(part.a, first.a) for part in group)
    rank = first.a.shape[-1] if same else sum(part.a.shape[-1] for part in group)
    b = np.zeros((*first.b.shape[:-2], rank, width), first.b.dtype)
    at = 0
    for part in group:
        ratio = 1.0 if part.scale == first.scale else part.scale / first.scale
        rows = slice(0, rank) if same else slice(at, at + part.a.shape[-1])
        b[..., rows, part.slot.leaf_columns()] = part.b if ratio == 1 else part.b * b.dtype.type(ratio)
        at += part.a.shape[-1]
    a = first.a if same else np.concatenate([part.a for part in group], axis=-1)
    m = None
    if first.m is not None:
        raise ValueError(f"{first.slot.path}: DoRA of several torch parameters that are one leaf can't be expressed")
    return Part(first.slot, a, b, m, first.scale)


def _padded(part: Part, rank: int, scale: float) -> dict[str, np.ndarray]:
    """The factors with zeros up to the leaf's rank, at the leaf's scale."""
    more = rank - part.a.shape[-1]
    lead = [(0, 0)] * (part.a.ndim - 2)
    b = part.b if part.scale == scale else part.b * part.b.dtype.type(part.scale / scale)
    return {
        "a": np.pad(part.a, [*lead, (0, 0), (0, more)]),
        "b": np.pad(b, [*lead, (0, more), (0, 0)]),
    }


def _magnitudes(site: Site, index: Index, parts: list[Part]) -> np.ndarray:
    """DoRA's magnitudes `[*batch, out]`; for a layer without one the column norms of the base, which change nothing."""
    leaf = index.leaves[site.keys]
    if len(parts) == int(np.prod(site.batch_shape)):
        found = np.zeros((*site.batch_shape, site.out_size), trained_dtype(leaf.dtype))
    else:
        folded = np.asarray(site.fold(leaf))
        found = np.zeros((*site.batch_shape, site.out_size), trained_dtype(leaf.dtype))
        for at in np.ndindex(*site.batch_shape):
            found[at] = np.asarray(column_norms(jnp.asarray(folded[at])))
    for part in parts:
        found[layout.batch_index(part.slot, site)] = part.m
    return found


def _edited(site: Site, method: Method, settings: Settings, whole: bool) -> Method:
    """The method with the start by which PEFT took a part out of the base (PiSSA, OLoRA); others stay as they are.

    By default PEFT saves the factors of such a start without the part that it took out.

    Raises:
        ValueError: where that part can't be found again.
    """
    if not settings.init.startswith(("pissa", "olora")):
        return method
    if isinstance(method, DoRA) or not whole or settings.init not in ("pissa", "olora"):
        raise ValueError(
            f"{site.path}: init_lora_weights {settings.init!r} took a part out of the base that can't be found again here; "
            "convert the adapter to plain LoRA with PEFT first (path_initial_model_for_weight_conversion)"
        )
    assert isinstance(method, LoRA)
    return LoRA(method.rank, method.alpha, method.scaling, settings.init, method.dropout)


def _arrays(
    method: Method, arrays: dict[str, np.ndarray], site: Site, index: Index
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The method's trained arrays and constants; `a0` and `b0` are in the file behind `a` and `b`, or made from the base."""
    inner = method.inner if isinstance(method, DoRA) else method
    assert isinstance(inner, LoRA)
    params: dict[str, Any] = dict(arrays)
    if not inner.from_weight:
        return params, {}
    if arrays["a"].shape[-1] == 2 * inner.rank:
        r = inner.rank
        frozen = {"a0": arrays["a"][..., r:], "b0": -arrays["b"][..., r:, :]}
        return {**params, "a": arrays["a"][..., :r], "b": arrays["b"][..., :r, :]}, frozen
    return params, start_of(site, index.leaves[site.keys], jax.random.key(0)).frozen
