"""`adapter_config.json`: what each of PEFT's settings means for jlora."""

from __future__ import annotations

import math
import re
from typing import Any

# Settings that say what the tensors are.
USED = {
    "peft_type": "which method",
    "r": "`LoRA(rank)`",
    "lora_alpha": "`LoRA(alpha)`",
    "rank_pattern": "the rank of some modules",
    "alpha_pattern": "the alpha of some modules",
    "use_rslora": '`LoRA(scaling="rslora")`',
    "use_dora": "`DoRA(LoRA(...))`",
    "lora_dropout": "`LoRA(dropout)`",
    "lora_bias": "a trained bias, `Full()`",
    "init_lora_weights": '`"pissa"` and `"olora"`: `LoRA(init=...)`; other starts leave no trace',
    "target_parameters": "3-D parameters of experts",
    "modules_to_save": "`Full()`",
    "bias": "`Full()`",
    "trainable_token_indices": "`Rows(indices)`",
    "init_r": "`AdaLoRA(rank)`",
    "vera_dropout": "`VeRA(dropout)`",
}

# Settings of training, of how PEFT finds its modules, or of where things came from: the tensors tell the rest.
UNUSED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "d_initial", "deltaT", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_weights", "layers_pattern", "layers_to_transform",
    "lora_ga_config", "mask_type", "beta1", "beta2", "megatron_config", "megatron_core", "orth_reg_weight", "peft_version",
    "projection_prng_key", "qalora_group_size", "random_seed", "revision", "runtime_config", "save_projection",
    "target_modules", "target_r", "task_type", "tfinal", "tinit", "total_step", "loftq_config",
}  # fmt: skip

# Settings that would make the adapter another function of its tensors than the one jlora computes.
REFUSED = {
    "alora_invocation_tokens": "an adapter that acts after some tokens only (aLoRA)",
    "arrow_config": "routing among adapters (Arrow)",
    "kasa_config": "an edited base (KaSA)",
    "layer_replication": "a base with repeated layers",
    "monteclora_config": "random adapters (MonteCLoRA)",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
    "use_qalora": "pooled inputs (QA-LoRA)",
    "velora_config": "compressed activations (VeLoRA)",
}

# Starts that change the base in a way which the tensors don't hold.
EDITED_BASE = ("loftq", "corda", "lora_ga")


class Settings:
    """The settings of an adapter, checked.

    Args:
        config: content of `adapter_config.json`.
        where: its path, for messages.
        known: PEFT's names of the methods that are read.

    Raises:
        ValueError: for a method that is not read, a setting that jlora can't follow, or one of the wrong type.
    """

    def __init__(self, config: dict[str, Any], where: Any, known: list[str]):
        self._config, self._where = config, where
        self.peft_type = str(config.get("peft_type"))
        if self.peft_type not in known:
            raise ValueError(
                f"{where}: peft_type {config.get('peft_type')!r} is not read; known are {', '.join(known)}"
            )
        for key, value in config.items():
            if key in REFUSED and value not in (None, False, [], {}):
                raise ValueError(f"{where}: {key} is {value!r}: {REFUSED[key]}, which jlora has not")
            if key not in USED and key not in UNUSED and key not in REFUSED and value not in (None, False, [], {}, ""):
                raise ValueError(
                    f"{where}: the setting {key!r} = {value!r} is unknown, and it may change what the tensors mean; remove it "
                    "if it does not"
                )
        self.init = str(config.get("init_lora_weights", True)).lower()
        if self.init.startswith(EDITED_BASE):
            raise ValueError(
                f"{where}: init_lora_weights is {self.init!r}, whose base differs from the model's own; convert it to plain "
                "LoRA with PEFT first (path_initial_model_for_weight_conversion)"
            )

    def integer(self, key: str, default: int) -> int:
        """A whole number of at least 1."""
        value = self._config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self._where}: {key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return self._finite(key, self._config.get(key, default))

    def _finite(self, key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{self._where}: {key} must be a finite number, got {value!r}")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._config.get(key) or False
        if not isinstance(value, bool):
            raise ValueError(f"{self._where}: {key} must be true or false, got {value!r}")
        return value

    def names(self, key: str) -> list[str]:
        """A list of names; empty where the setting is missing."""
        value = self._config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{self._where}: {key} must be a list of names, got {value!r}")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """A table; empty where the setting is missing."""
        value = self._config.get(key) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{self._where}: {key} must be a table, got {value!r}")
        return value

    def bare_list(self, key: str) -> list[Any] | None:
        """The value, where it is a list and no table."""
        value = self._config.get(key)
        return value if isinstance(value, list) and value else None

    def rank(self, target: str) -> int:
        """The rank of a module, by PEFT's rule: the first pattern that ends its name."""
        value = self._pattern("rank_pattern", target, self.integer("r", 8))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self._where}: rank_pattern of {target!r} must be a positive integer, got {value!r}")
        return value

    def alpha(self, target: str) -> float:
        """The alpha of a module."""
        return self._finite("alpha_pattern", self._pattern("alpha_pattern", target, self.number("lora_alpha", 8)))

    def _pattern(self, key: str, target: str, default: Any) -> Any:
        for pattern, value in self.table(key).items():
            if _matches(pattern, target, f"{self._where}: {key}"):
                return value
        return default


# A name, perhaps with the wildcards that people write; nothing whose matching can take long.
_PATTERN = re.compile(r"[\w\-.^$*+?|\\\[\]()]{1,1000}")


def _matches(pattern: str, target: str, where: str) -> bool:
    if pattern == target or target.endswith("." + pattern):
        return True
    try:
        # A repeated group could take exponential time.
        if _PATTERN.fullmatch(pattern) is None or re.search(r"\)[*+?]", pattern) or sum(map(pattern.count, "*+?")) > 8:
            raise re.error("too long or too involved")
        return re.match(rf"(.*\.)?({pattern})$", target) is not None
    except re.error as error:
        raise ValueError(f"{where} holds {pattern[:100]!r}, which is no pattern ({error})") from None
