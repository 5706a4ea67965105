"""Finds out from the names of an adapter folder's tensors what they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from jlora.interchange.files.folder import AdapterFolder
from jlora.interchange.files.written import PREFIX

# For each of PEFT's methods the ends of keys, and the role that such a tensor has in its module.
ENDS = {
    "LORA": {
        ".lora_A.weight": "a",
        ".lora_B.weight": "b",
        ".lora_B.bias": "bias",
        ".lora_embedding_A": "embedding_a",
        ".lora_embedding_B": "embedding_b",
        ".lora_magnitude_vector": "m",
        ".lora_magnitude_vector.weight": "m",
    },
    "ADALORA": {".lora_A": "a", ".lora_B": "b", ".lora_E": "e"},
    "VERA": {".vera_lambda_b": "b", ".vera_lambda_d": "d"},
    "SHIRA": {".shira_weight": "values", ".shira_indices": "index"},
}
SHARED = {"base_model.vera_A": "a", "base_model.vera_B": "b"}
TOKENS = ".token_adapter.trainable_tokens_delta"
WRAPPED = ".base_layer"
SAVED = "modules_to_save"
# In memory, the adapter's name follows these words in a key. PEFT removes it when it saves; other programs may not.
NAMED = {SAVED, "trainable_tokens_delta"}


@dataclass
class Contents:
    """The keys of a folder's tensors, sorted by what the tensors are.

    Attributes:
        adapters: for each torch module (with `.base_layer` behind it for some 3-D parameters) the key of each role.
        shared: keys of the arrays that all modules share.
        parameters: key of each torch parameter that is stored whole.
        copies: key of each torch parameter that is stored unchanged beside an adapter of it.
        rows: for each embedding the key of its replaced rows.
    """

    adapters: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)


def parse(folder: AdapterFolder, ends: dict[str, str], shared: dict[str, str]) -> Contents:
    """The contents of a folder; a key that is nothing known is an error.

    Args:
        folder: the folder.
        ends: the ends of keys of a module's tensors, and the role of each.
        shared: keys of tensors that all modules share, and the role of each.

    Raises:
        ValueError: for a key that no adapter of this method has, two keys of one meaning, or several adapters.
    """
    found, adapter = Contents(), None
    named = NAMED | {key.split(".")[1] for key in (*ends, *shared)}
    inner = {"weight", "bias"} | {word for key in ends for word in key.split(".")[2:]}
    for key in folder.keys:
        name, called = _without_adapter(key, named, inner)
        if called is not None and adapter not in (None, called):
            raise ValueError(f"{folder.file} holds the adapters {adapter!r} and {called!r}; save them to a folder each")
        adapter = adapter or called
        if name in shared:
            where, role = found.shared, shared[name]
        elif name.startswith(PREFIX):
            where, role = _place(found, name.removeprefix(PREFIX), ends)
        else:
            raise ValueError(f"{folder.file}: {key!r} doesn't begin with {PREFIX!r}, as the tensors of an adapter do")
        if role in where:
            raise ValueError(
                f"{folder.file}: {where[role]!r} and {key!r} are the same tensor of one module; take one out"
            )
        where[role] = key
    return found


def _without_adapter(name: str, named: set[str], inner: set[str]) -> tuple[str, str | None]:
    """A key without the adapter's name that PEFT has in it in memory, and that name, or None.

    Of `up.lora_A.default.weight` these are `up.lora_A.weight` and `default`. `named` are the words behind which the adapter's
    name may stand, `inner` those that stand there in a file.
    """
    words = name.split(".")
    at = max((n for n, word in enumerate(words) if word in named), default=len(words))
    called = words[at + 1] if at + 1 < len(words) and words[at + 1] not in inner else None
    kept = words[:at] if words[at : at + 1] == [SAVED] else words[: at + 1]
    return ".".join([*kept, *words[at + 1 + (called is not None) :]]), called


def _place(found: Contents, name: str, ends: dict[str, str]) -> tuple[dict[str, str], str]:
    """Where a key belongs: one of the dicts of the contents, and the name under which it stands there."""
    for end, role in ends.items():
        if name.endswith(end):
            return found.adapters.setdefault(name.removesuffix(end), {}), role
    if name.endswith(TOKENS):
        return found.rows, name.removesuffix(TOKENS)
    if WRAPPED + "." in name:
        module, _, parameter = name.rpartition(WRAPPED + ".")
        return (found.parameters if parameter == "bias" else found.copies), f"{module}.{parameter}"
    return found.parameters, name
