"""LoRA in PEFT's format: tensors and settings."""

from __future__ import annotations

from collections import Counter
from typing import Any

from jlora.core.protocol.method import GROUPED
from jlora.interchange.files.written import PREFIX, Written, origin
from jlora.interchange.kinds import serving
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.names import Slot
from jlora.interchange.leaves.pieces import Piece, join, split
from jlora.interchange.trained import rows

# PEFT's word for an adapter that has no target modules.
NO_TARGETS = "dummy-target-modules"


def write(out: Written, adapters: list[tuple[Form, list[Slot]]], modules: set[str], serve: bool) -> set[str]:
    """Adds LoRA adapters to a folder.

    Args:
        out: gets the tensors and settings.
        adapters: the adapted leaves.
        modules: every torch module that the names know; decides how short the list of targets can be.
        serve: fold the scale into B and pad to one rank.

    Returns:
        The adapted modules.

    Raises:
        ValueError: for DoRA on some of the leaves only, or two 3-D parameters of a module in no known order.
    """
    pieces = join(piece for form, slots in adapters if form.kind == "lora" for piece in split(form, slots))
    if serve:
        pieces = serving.pad(pieces)
        out.notes.append(serving.advice(pieces[0].rank))
    _check(pieces)
    for piece in pieces:
        _write_piece(
            out, piece, PREFIX + piece.slot.module + (_nesting(piece, pieces) if piece.slot.by_parameter else "")
        )
    out.config.update(settings(pieces, modules))
    rows.write(out, [(form, slots) for form, slots in adapters if form.kind == "rows"])
    return {piece.slot.module for piece in pieces} | {name for piece in pieces for name in _tied(piece)}


def _write_piece(out: Written, piece: Piece, stem: str) -> None:
    embedding = piece.slot.kind == "embedding"
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    out.add(f"{stem}.{ends[0]}", layout.a_to_torch(piece.slot, piece.a), _origins(piece, "a"))
    out.add(f"{stem}.{ends[1]}", layout.b_to_torch(piece.slot, piece.b), _origins(piece, "b"))
    if piece.m is not None:
        out.add(f"{stem}.lora_magnitude_vector", _magnitude(piece), _origins(piece, "m"))
    for module in _tied(piece):  # there the weight is the transpose, so the factors change places
        out.add(f"{PREFIX}{module}.lora_A.weight", piece.b, _origins(piece, "b"))
        out.add(f"{PREFIX}{module}.lora_B.weight", piece.a, _origins(piece, "a"))


def _tied(piece: Piece) -> list[str]:
    """The modules that use an adapted embedding as their weight too."""
    return [name.rpartition(".")[0] for name in piece.slot.entry.also]


def _check(pieces: list[Piece]) -> None:
    for piece in pieces:
        if piece.slot.parameter != "weight" and piece.slot.experts is None:
            raise ValueError(
                f"{piece.slot.path}: PEFT adapts a module's 'weight', or 3-D parameters of experts, not {piece.name!r}; save "
                "the merged model (jlora merge)"
            )
        if any(source.form.site.kind == GROUPED for source in piece.sources):
            raise ValueError(
                f"{piece.slot.path}: the LoRA of a convolution in feature groups is another function in PEFT, which reads the "
                "channels of all groups; leave it out of the spec, or save the merged model (jlora merge)"
            )
    with_m = [piece for piece in pieces if piece.m is not None]
    plain = [piece for piece in pieces if piece.m is None]
    if with_m and plain:
        raise ValueError(
            f"{with_m[0].slot.path} has DoRA and {plain[0].slot.path} has not; a PEFT adapter has it everywhere or nowhere: "
            "use one for all, or pass svd_rank= to turn DoRA into LoRA"
        )
    if with_m and (bare := [piece for piece in with_m if piece.slot.by_parameter]):
        raise ValueError(
            f"{bare[0].slot.path}: PEFT has no DoRA of {bare[0].name!r}, which it adapts by target_parameters; pass svd_rank= "
            "to turn it into LoRA"
        )
    for piece in with_m:
        if piece.slot.entry.also:
            raise ValueError(f"{piece.slot.path} is also {piece.slot.entry.also[0]!r}, where DoRA would be another map; "
                             "pass svd_rank= to turn it into LoRA")  # fmt: skip


def _nesting(piece: Piece, pieces: list[Piece]) -> str:
    """The part of a key that says which 3-D parameter of a module is meant.

    PEFT wraps the parameters one around the other, the last that the module defines outermost; each step inwards is one
    `.base_layer`.

    Raises:
        ValueError: where the names don't give the order.
    """
    together = [other for other in pieces if other.slot.by_parameter and other.slot.module == piece.slot.module]
    if len(together) == 1:
        return ""
    places = [other.slot.entry.position for other in together]
    if None in places or len(set(places)) != len(places):
        raise ValueError(
            f"names: {', '.join(other.name for other in together)} are 3-D parameters of one module; give each "
            "TorchParameter a position, in the order in which the module defines them"
        )
    inside = sorted((place or 0 for place in places), reverse=True).index(piece.slot.entry.position or 0)
    return ".base_layer" * inside


def _magnitude(piece: Piece) -> Any:
    assert piece.m is not None
    if piece.slot.kind != "conv":
        return piece.m
    return piece.m.reshape(1, -1, *([1] * (len(layout.a_shape(piece.slot, 1)) - 2)))


def _origins(piece: Piece, role: str) -> list[dict[str, Any]]:
    lines = []
    for source in piece.sources:
        more: dict[str, Any] = {}
        if len(piece.sources) > 1 and role != "m":
            more = {"ranks": list(source.ranks), "columns": list(source.slot.torch_columns()[:2])}
        lines.append(origin(source.slot, source.form.fields[role], **more))
    return lines


def target(slot: Slot) -> str:
    """The name that PEFT matches its patterns against: the module's, or that of a parameter."""
    return slot.name if slot.by_parameter else slot.module


def settings(pieces: list[Piece], modules: set[str]) -> dict[str, Any]:
    """The settings of `adapter_config.json` for these pieces."""
    rslora = bool(pieces) and all(piece.rslora for piece in pieces)
    names = [(name, piece) for piece in pieces for name in (target(piece.slot), *_tied(piece))]
    ranks = {name: piece.rank for name, piece in names}
    alphas = {name: _number(_alpha(piece, rslora)) for name, piece in names}
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 8)
    dropouts = {source.form.dropout for piece in pieces for source in piece.sources}
    bare = sorted(piece.name for piece in pieces if piece.slot.by_parameter)
    targets = [name for name, piece in names if not piece.slot.by_parameter]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": shortest(targets, modules) if pieces else NO_TARGETS,
        **({"target_parameters": bare} if bare else {}),
        "use_rslora": rslora,
        "use_dora": any(piece.m is not None for piece in pieces),
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 and not bare else 0.0,
        "fan_in_fan_out": any(piece.slot.kind == "conv1d_gpt2" for piece in pieces),
        # Any other value would make PEFT change the base while it loads.
        "init_lora_weights": True,
    }


def _alpha(piece: Piece, rslora: bool) -> float:
    return piece.alpha if piece.rslora == rslora else piece.scale * (piece.rank**0.5 if rslora else piece.rank)


def _number(value: float) -> int | float:
    """A whole number as an int, since servers read `lora_alpha` as an integer."""
    return int(value) if float(value).is_integer() else float(value)


def _commonest(values: Any, default: int) -> Any:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


def shortest(targets: list[str], modules: set[str]) -> list[str]:
    """The targets by the last word of their names where exactly these modules end in it, else by their full names."""
    chosen, found = set(targets), []
    for name in targets:
        last = name.rpartition(".")[2]
        whole = all(module in chosen for module in modules if module.rpartition(".")[2] == last)
        found.append(last if whole else name)
    return sorted(set(found))
