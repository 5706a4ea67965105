"""Prompts in PEFT's folders: prompt tuning, P-tuning and prefix-tuning, which PEFT keeps as one tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora import paths
from jlora.core.protocol.method import Site
from jlora.core.protocol.wrapping import innermost
from jlora.core.tree.adapted import Adapted
from jlora.interchange.files.folder import CONFIG, AdapterFolder
from jlora.interchange.files.written import Written, origin
from jlora.interchange.leaves.index import Index, Read, trained_dtype
from jlora.interchange.leaves.names import Slot
from jlora.models.prefix_layout import PrefixLayout
from jlora.prompts.bare import without_encoder
from jlora.prompts.p_tuning import PTuning
from jlora.prompts.prefix_tuning import PrefixTuning
from jlora.prompts.prompt_tuning import PromptTuning
from jlora.prompts.virtual import Virtual

TENSOR = "prompt_embeddings"
PROMPT_TUNING, P_TUNING, PREFIX_TUNING = TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
_KEY, _VALUE = re.compile(r"k|key|k_proj|k_lin"), re.compile(r"v|value|v_proj|v_lin")
# Embeddings of tokens, beside which models may have those of positions and types.
_TOKENS = re.compile(r"embed_tokens|word_embeddings|tok_embeddings|wte|shared")


def are_prompts(adapted: Adapted) -> bool:
    """Whether any leaf trains virtual tokens."""
    return any(isinstance(innermost(site.method), Virtual) for site in adapted.plan.sites)


def write(adapted: Adapted, slots: Mapping[tuple[str, ...], list[Slot]], prefix: PrefixLayout | None) -> Written:
    """The content of a folder, but for the settings that all folders have.

    Raises:
        ValueError: for what PEFT has no place for, with the leaf.
    """
    asked = {site.keys: site.method for site in adapted.plan.sites}
    if any(getattr(method, "encoded", False) for method in asked.values()):
        adapted = without_encoder(adapted)
    for site in adapted.plan.sites:
        if type(site.method) not in (PromptTuning, PrefixTuning):
            raise ValueError(
                f"{site.path}: PEFT keeps prompts in a folder of their own, and {site.method} is beside them; save each "
                "alone, or keep the whole by jlora.save"
            )
        if site.keys not in slots:
            raise ValueError(f"{site.path}: names has no entry for it")
    kinds = {type(site.method) for site in adapted.plan.sites}
    if len(kinds) > 1:
        raise ValueError("PEFT keeps prompt tuning and prefix-tuning in a folder each; keep both by jlora.save")
    out = Written()
    if kinds == {PromptTuning}:
        _write_prompt(out, adapted, asked, slots)
    else:
        _write_prefix(out, adapted, slots, prefix)
    out.config |= {"num_transformer_submodules": 1, "num_virtual_tokens": adapted.plan.sites[0].method.tokens}  # pyright: ignore[reportAttributeAccessIssue]
    return out


def _write_prompt(out: Written, adapted: Adapted, asked: dict[Any, Any], slots: Mapping[Any, list[Slot]]) -> None:
    if len(adapted.plan.sites) > 1:
        raise ValueError(f"{adapted.plan.sites[1].path}: PEFT has one prompt, for the embedding of tokens")
    site = next(iter(adapted.plan.sites))
    slot, method = slots[site.keys][0], asked[site.keys]
    if slot.kind != "embedding":
        raise ValueError(
            f"{site.path}: PEFT's prompts are rows of an embedding, and names says that it is a {slot.kind}"
        )
    rows = np.asarray(paths.lookup(adapted.params, site.keys)["prompt"]) * slot.entry.factor
    encoder = isinstance(method, PTuning)
    out.add(TENSOR, rows, [origin(slot, ("prompt",))])
    out.config |= {"peft_type": P_TUNING if encoder else PROMPT_TUNING, "token_dim": rows.shape[1]}
    if not encoder:
        out.config["prompt_tuning_init"] = "RANDOM"
        return
    out.config |= {"encoder_reparameterization_type": method.encoder.upper(), "encoder_hidden_size": method.hidden}
    out.config["encoder_num_layers"] = method.layers
    out.notes.append("PEFT keeps what the encoder makes, and not the encoder: what is read back is PromptTuning")


def _write_prefix(out: Written, adapted: Adapted, slots: Mapping[Any, list[Slot]], prefix: PrefixLayout | None) -> None:
    layout = _wanted(prefix)
    modules = _modules({slot.name: slot for each in slots.values() for slot in each})
    rows, origins = {}, []
    for site in adapted.plan.sites:
        if getattr(site.method, "columns", None) is not None:
            raise ValueError(
                f"{site.path}: keys and values of a fused product have no place here yet; keep them by jlora.save"
            )
        array = np.asarray(paths.lookup(adapted.params, site.keys)["rows"])
        for slot in slots[site.keys]:
            rows[slot.name] = array[slot.index]
            origins.append(origin(slot, ("rows",)))
    if missing := [slot.path for pair in modules for slot in pair if slot.name not in rows]:
        raise ValueError(f"{missing[0]}: PEFT's prefix has keys and values of every layer, and this product has none")
    base = dict(paths.flatten_with_keys(adapted.base)[0])
    made = [[rows[slot.name] + _bias(slot, slots, base) for slot in pair] for pair in modules]
    flat = np.stack([np.stack(pair) for pair in made])  # [layers, 2, tokens, heads * head_dim]
    keys, values = (_in_heads(flat[:, n], layout) for n in range(2))
    keys = keys if layout.turn is None else np.asarray(layout.turn(keys, False))
    both = np.stack([keys, values], axis=1).reshape(-1, *keys.shape[1:])
    out.add(TENSOR, both.swapaxes(0, 1).reshape(keys.shape[1], -1), origins)
    out.config |= {"peft_type": PREFIX_TUNING, "prefix_projection": False}


def _in_heads(rows: np.ndarray, layout: PrefixLayout) -> np.ndarray:
    """`[layers, tokens, heads, head_dim]`."""
    if rows.shape[-1] % layout.head_dim:
        raise ValueError(
            f"prefix has head_dim {layout.head_dim}, which does not divide the {rows.shape[-1]} columns of keys"
        )
    return rows.reshape(*rows.shape[:-1], -1, layout.head_dim)


def _wanted(prefix: PrefixLayout | None) -> PrefixLayout:
    if prefix is None:
        raise ValueError(
            "PEFT keeps the keys of a prefix in heads and behind rotary positions: pass prefix=, "
            "jlora.models.peft_prefix(model) for the models of this package, or a jlora.PrefixLayout"
        )
    return prefix


def _modules(slots: dict[str, Slot]) -> list[tuple[Slot, Slot]]:
    """The products of keys and of values of every layer, in the order of the layers.

    Raises:
        ValueError: where they can't be told by their names.
    """
    found: dict[str, dict[str, Slot]] = {}
    for slot in slots.values():
        before, _, last = slot.module.rpartition(".")
        kind = "key" if _KEY.fullmatch(last) else "value" if _VALUE.fullmatch(last) else None
        if kind is not None and slot.parameter == "weight":
            found.setdefault(before, {})[kind] = slot
    if not found or any(len(pair) != 2 for pair in found.values()):
        raise ValueError(
            "names has no product of keys and of values (k_proj, v_proj or the like) in each layer; it has "
            f"{sorted(slots)[:8]}"
        )
    order = sorted(found, key=lambda module: [int(n) for n in re.findall(r"\d+", module)])
    return [(found[module]["key"], found[module]["value"]) for module in order]


def _bias(slot: Slot, slots: Mapping[Any, list[Slot]], base: dict[Any, Any]) -> Any:
    """The bias that the model adds to a product's result, or 0."""
    name = f"{slot.module}.bias"
    for keys, each in slots.items():
        for other in each:
            if other.name == name:
                return np.asarray(base[keys], np.float32)[other.index]
    return 0


def read(folder: AdapterFolder, index: Index, prefix: PrefixLayout | None) -> list[Read]:
    """The adapters of a folder, by leaf.

    Raises:
        ValueError: for settings and tensors that do not fit together, or the params.
    """
    peft_type, tokens = folder.config["peft_type"], folder.config.get("num_virtual_tokens")
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"{folder.path / CONFIG}: num_virtual_tokens must be a positive whole number, got {tokens!r}")
    if folder.config.get("num_transformer_submodules") not in (1, None):
        raise ValueError(f"{folder.path / CONFIG}: prompts of an encoder and a decoder are not supported")
    if folder.keys != [TENSOR]:
        raise ValueError(f"{folder.file}: {peft_type} has the one tensor {TENSOR!r}, got {folder.keys}")
    if peft_type == PREFIX_TUNING:
        return _read_prefix(folder, index, tokens, _wanted(prefix))
    slots = [slot for each in index.slots.values() for slot in each if slot.kind == "embedding"]
    named = [slot for slot in slots if _TOKENS.fullmatch(slot.module.rpartition(".")[2])] if len(slots) > 1 else slots
    if len(named) != 1:
        raise ValueError(
            f"{folder.file}: the prompt is for the embedding of tokens, which is not one of {[s.path for s in slots]}"
        )
    (slot,) = named
    folder.check(TENSOR, (tokens, slot.torch_columns()[2]), "the virtual tokens")
    rows = folder.read_as(TENSOR, trained_dtype(index.leaves[slot.keys].dtype)) / slot.entry.factor
    return [Read(index.site(slot.keys, PromptTuning(tokens)), {"prompt": rows})]


def _read_prefix(folder: AdapterFolder, index: Index, tokens: int, layout: PrefixLayout) -> list[Read]:
    modules = _modules({name: slots[0] for name, slots in index.by_name.items()})
    width = modules[0][0].torch_columns()[2]
    folder.check(TENSOR, (tokens, len(modules) * 2 * width), "keys and values of every layer")
    dtype = trained_dtype(index.leaves[modules[0][0].keys].dtype)
    flat = folder.read_as(TENSOR, dtype).reshape(tokens, len(modules), 2, width)
    keys, values = (_in_heads(flat[:, :, n].swapaxes(0, 1), layout) for n in range(2))
    keys = keys if layout.turn is None else np.asarray(layout.turn(keys, True))
    pieces: dict[tuple[str, ...], list[tuple[Slot, dict[str, np.ndarray]]]] = {}
    for layer, pair in enumerate(modules):
        for slot, made in zip(pair, (keys, values), strict=True):
            rows = made[layer].reshape(tokens, width) - _bias(slot, index.slots, dict(index.leaves))
            pieces.setdefault(slot.keys, []).append((slot, {"rows": rows.astype(dtype)}))
    found = []
    for leaf, parts in pieces.items():
        site: Site = index.site(leaf, PrefixTuning(tokens))
        found.append(Read(site, index.stack(site, parts)))
    return found
