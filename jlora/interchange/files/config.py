"""`adapter_config.json`: what each of PEFT's settings means for jlora."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from jlora.interchange.files import patterns, targets
from jlora.interchange.files.folder import brief

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
    "target_parameters": "parameters of experts and their routers",
    "modules_to_save": "`Full()`",
    "bias": "`Full()`",
    "trainable_token_indices": "`Rows(indices)`",
    "init_r": "`AdaLoRA(rank)`",
    "vera_dropout": "`VeRA(dropout)`",
}

# Those of every method.
COMMON = {"peft_type", "modules_to_save", "bias"}

# Settings of the training, of how PEFT finds its modules, or of provenance: they don't change what the tensors mean.
UNUSED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "d_initial", "deltaT", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_weights", "layers_pattern", "layers_to_transform",
    "lora_ga_config", "mask_type", "beta1", "beta2", "megatron_config", "megatron_core", "orth_reg_weight", "peft_version",
    "merge_weights", "projection_prng_key", "qalora_group_size", "random_seed", "revision", "runtime_config", "save_projection",
    "target_modules", "target_r", "task_type", "tfinal", "tinit", "total_step", "loftq_config",
}  # fmt: skip

# Settings under which PEFT computes something else from the tensors than jlora would.
REFUSED = {
    "alora_invocation_tokens": "an adapter that acts after some tokens only (aLoRA)",
    "arrow_config": "routing among adapters (Arrow)",
    "enable_lora": "one adapter of some of q, k and v (the first releases of PEFT)",
    "kasa_config": "an edited base (KaSA)",
    "layer_replication": "a base with repeated layers",
    "monteclora_config": "random adapters (MonteCLoRA)",
    "use_bdlora": "block-diagonal factors (BD-LoRA)",
    "use_qalora": "pooled inputs (QA-LoRA)",
    "velora_config": "compressed activations (VeLoRA)",
}

# The values by which a setting is off.
OFF = (None, False, [], {}, "")

# Starts for which PEFT changes the base, in a way that can't be found out from the tensors.
EDITED_BASE = ("loftq", "corda", "lora_ga")


class Settings:
    """The settings of an adapter, checked.

    Args:
        config: content of `adapter_config.json`.
        where: its path, for messages.
        known: for PEFT's name of each method that is read the names of the settings that it has beside those of all; None where
            they are those of `USED`.

    Raises:
        ValueError: for a method that is not read, a setting that jlora can't follow, or one of the wrong type.
    """

    def __init__(self, config: dict[str, Any], where: Any, known: Mapping[str, frozenset[str] | None]):
        self._config, self._where = config, where
        peft_type = config.get("peft_type")
        if not isinstance(peft_type, str) or peft_type not in known:
            raise ValueError(f"{where}: peft_type {brief(peft_type)} is not read; known are {', '.join(known)}")
        self.peft_type = peft_type
        own = known[peft_type]
        used = USED if own is None else COMMON | own
        for key, value in config.items():
            if key in REFUSED and key not in used and value not in OFF:
                raise ValueError(f"{where}: {key} is {brief(value)}: {REFUSED[key]}, which jlora has not")
            if key not in used and key not in UNUSED and key not in REFUSED and value not in OFF:
                self._unknown(key, value)
        self.init = self._init()

    def _unknown(self, key: str, value: Any) -> None:
        """Warns of an unknown setting, as PEFT does, which leaves out settings of later releases.

        Raises:
            ValueError: for true, a list or a table: every setting that has changed what the tensors mean had such a value.
        """
        if value is True or isinstance(value, list | dict):
            raise ValueError(
                f"{self._where}: the setting {key[:100]!r} = {brief(value)} is unknown, and it may change what the tensors "
                "mean; remove it if it does not"
            )
        warnings.warn(
            f"{self._where}: the setting {key[:100]!r} = {brief(value)} is unknown and left out, as PEFT leaves out settings "
            "of later releases",
            stacklevel=5,
        )

    def _init(self) -> str:
        value = self._config.get("init_lora_weights", True)
        if not isinstance(value, str | int | None):
            raise ValueError(f"{self._where}: init_lora_weights must be true, false or a name, got {brief(value)}")
        if str(value).lower().startswith(EDITED_BASE):
            raise ValueError(
                f"{self._where}: init_lora_weights is {brief(value)}, whose base differs from the model's own; convert it to "
                "plain LoRA with PEFT first (path_initial_model_for_weight_conversion)"
            )
        return str(value).lower()

    def integer(self, key: str, default: int) -> int:
        """A whole number of at least 1."""
        return self._positive(key, self._config.get(key, default))

    def _positive(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise ValueError(f"{self._where}: {key} must be a positive integer, got {brief(value)}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return self._finite(key, self._config.get(key, default))

    def _finite(self, key: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < 2.0**127:
            raise ValueError(f"{self._where}: {key} must be a finite number, got {brief(value)}")
        return value

    def probability(self, key: str) -> float:
        """A probability below 1; 0 where the setting is missing or null, since it only matters in training."""
        value = 0.0 if self._config.get(key) is None else self.number(key, 0.0)
        if not 0 <= value < 1:
            raise ValueError(f"{self._where}: {key} must be at least 0 and below 1, got {value!r}")
        return value

    def flag(self, key: str) -> bool:
        """True or false; a missing setting is false."""
        value = self._config.get(key)
        if value not in (*OFF, True):  # 0 and 1 too
            raise ValueError(f"{self._where}: {key} must be true or false, got {brief(value)}")
        return bool(value)

    def names(self, key: str) -> list[str]:
        """A list of names; empty where the setting is missing."""
        value = self._config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{self._where}: {key} must be a list of names, got {brief(value)}")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """A table; empty where the setting is missing."""
        value = self._config.get(key) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{self._where}: {key} must be a table, got {brief(value)}")
        return value

    def bare_list(self, key: str) -> list[Any] | None:
        """A list that is not empty; None for anything else, such as a table."""
        value = self._config.get(key)
        return value if isinstance(value, list) and value else None

    def adapts_parameter(self, name: str) -> bool:
        """Whether `target_parameters` names a parameter, by the end of its name."""
        return any(name == end or name.endswith(f".{end}") for end in self.names("target_parameters"))

    def check_target(self, module: str, key: str) -> None:
        """Refuses a module that PEFT would not adapt by these settings, since PEFT would ignore its tensors.

        Raises:
            ValueError: for such a module, or an ill-formed setting.
        """
        try:
            reason = targets.left_out(self._config, module)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}") from None
        if reason is not None:
            raise ValueError(
                f"{self._where}: {reason}, so PEFT would ignore its tensor {key!r}; change the setting, or take the tensor out"
            )

    def targets(self, module: str) -> bool:
        """Whether the settings name a module, so that PEFT adapts it; False where they name none."""
        wanted = self._config.get("target_modules")
        named = wanted is not None and str(wanted).lower() != "all-linear"
        return named and targets.left_out(self._config, module) is None

    def rank(self, target: str) -> int:
        """The rank of a module, by PEFT's rule: that of the first entry of `rank_pattern` that matches the end of its name."""
        return self._positive(*self._pattern("rank_pattern", target, "r"))

    def alpha(self, target: str) -> float:
        """The alpha of a module, likewise by `alpha_pattern`."""
        return self._finite(*self._pattern("alpha_pattern", target, "lora_alpha"))

    def _pattern(self, key: str, target: str, default: str, value: Any = 8) -> tuple[str, Any]:
        """For a module the words that name a setting in messages, and its value, which is `value` where it is missing."""
        for pattern, special in self.table(key).items():
            try:
                if patterns.matches(pattern, target):
                    return f"{key} of {target!r}", special
            except ValueError as error:
                raise ValueError(
                    f"{self._where}: {key} holds {brief(pattern)}, which is no pattern that jlora reads ({error})"
                ) from None
        return default, self._config.get(default, value)

    def typed(
        self, key: str, default: Any, pattern: str = "", module: str = "", types: frozenset[type] = frozenset()
    ) -> Any:
        """A setting of the type that its default has, for a module; the default where it is missing.

        Args:
            key: its name.
            default: PEFT's default; a float stands for any number.
            pattern: the table with the values of some modules, or "".
            module: the module's name.
            types: other types that its values may have.
        """
        name, value = self._pattern(pattern, module, key, default) if pattern else (key, self._config.get(key, default))
        if isinstance(default, float):
            return self._finite(name, value)
        fits = value in (*OFF, True) if default is False else type(value) is type(default)
        if not fits and type(value) not in types:
            raise ValueError(f"{self._where}: {name} must be of the type {type(default).__name__}, got {brief(value)}")
        return bool(value) if default is False else value

    def wanted(self, key: str, value: Any) -> None:
        """Refuses any value of a setting but one; a setting that is missing is off."""
        given = self._config.get(key)
        if given != value and not (given in OFF and value in OFF):
            raise self.refused(key, given, [value])

    def refused(self, key: str, value: Any, known: list[Any]) -> ValueError:
        """The error for a value of a setting that jlora has not."""
        texts = " or ".join(map(repr, known))
        return ValueError(f"{self._where}: {key} is {brief(value)}, and jlora has {self.peft_type} only with {texts}")

    def left_out(self, key: str) -> None:
        """Warns of a setting of the training that is on, and that the method has not."""
        if (value := self._config.get(key)) not in (*OFF, 0):
            warnings.warn(
                f"{self._where}: {key} is {brief(value)}, which acts in training only; it is left out, since jlora's method "
                "has no such setting",
                stacklevel=6,
            )

    def older(self, key: str, default: Any, release: str) -> None:
        """Warns of a setting that is on, in a folder of a release of PEFT in which it meant something else."""
        written = self._config.get("peft_version")
        found = re.match(r"(\d+)\.(\d+)\.", written) if isinstance(written, str) else None
        before = found is None or [*map(int, found.groups())] < [*map(int, release.split(".")[:2])]
        if self._config.get(key, default) not in OFF and before:
            warnings.warn(
                f"{self._where}: peft_version is {brief(written)}, and {key} meant something else before PEFT {release}; the "
                "adapters are read as PEFT reads them now, which is another function than was trained: merge them with the "
                "release that made them, or train them anew",
                stacklevel=6,
            )

    def lists(self, key: str, module: str) -> bool:
        """Whether a setting lists a module: by the ends of names, or by a pattern of whole names."""
        value = self._config.get(key)
        try:
            if isinstance(value, str):
                return patterns.fullmatch(value, module)
        except ValueError as error:
            raise ValueError(f"{self._where}: {key} is {brief(value)}, which jlora can't match ({error})") from None
        return any(module.endswith(name) for name in self.names(key))

    def build(self, cls: type, values: dict[str, Any]) -> Any:
        """A method of these hyperparameters; what it refuses is said of the settings."""
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._where}: {error}") from None
