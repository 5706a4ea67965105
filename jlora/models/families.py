"""The families of models that the package reads: a new one is a file with its `FAMILY`, and a line here."""

from typing import Any

from jlora.models import bert, gemma, gpt2, llama, moe, phi3, vit
from jlora.models.family import Family

ALL: tuple[Family, ...] = (
    llama.FAMILY,
    gemma.FAMILY,
    phi3.FAMILY,
    gpt2.FAMILY,
    moe.MIXTRAL,
    moe.QWEN3_MOE,
    bert.BERT,
    bert.ROBERTA,
    vit.FAMILY,
)

#: By `model_type` of `config.json`.
FAMILIES = {name: family for family in ALL for name in family.model_types}


def family_for(config: Any) -> Family:
    """The family of a model's config.

    Raises:
        TypeError: it is none of this package.
    """
    for family in ALL:
        if type(config) is family.config:
            return family
    raise TypeError(f"model: wanted a model of jlora.models or its config, got a {type(config).__name__}")
