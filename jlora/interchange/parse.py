"""What the tensors of an adapter folder are, by their names."""

from __future__ import annotations

from dataclasses import dataclass, field

from jlora.interchange.folder import AdapterFolder
from jlora.interchange.written import PREFIX

# Ends of keys, by PEFT's method: what a tensor is of its module.
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


@dataclass
class Contents:
    """The keys of a folder, by what they are.

    Attributes:
        adapters: for each torch module, or module with `.base_layer` behind it (3-D parameters), key by role.
        shared: keys of the arrays that all modules share.
        parameters: key of each torch parameter that is stored whole.
        copies: key of each torch parameter that PEFT stores beside an adapter of it.
        rows: for each embedding the key of its replaced rows.
    """

    adapters: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)


def parse(folder: AdapterFolder, peft_type: str) -> Contents:
    """The contents of a folder; every key is something.

    Raises:
        ValueError: for a key that no adapter of this method has.
    """
    found = Contents()
    for key in folder.keys:
        if key in SHARED and peft_type == "VERA":
            found.shared[SHARED[key]] = key
        elif not key.startswith(PREFIX):
            raise ValueError(f"{folder.file}: {key!r} doesn't begin with {PREFIX!r}, as the tensors of an adapter do")
        else:
            _sort(found, key, key.removeprefix(PREFIX), ENDS[peft_type])
    return found


def _sort(found: Contents, key: str, name: str, ends: dict[str, str]) -> None:
    for end, role in ends.items():
        if name.endswith(end):
            found.adapters.setdefault(name.removesuffix(end), {})[role] = key
            return
    if name.endswith(TOKENS):
        found.rows[name.removesuffix(TOKENS)] = key
    elif WRAPPED + "." in name:
        module, _, parameter = name.rpartition(WRAPPED + ".")
        where = found.parameters if parameter == "bias" else found.copies
        where[f"{module}.{parameter}"] = key
    else:
        found.parameters[name] = key
