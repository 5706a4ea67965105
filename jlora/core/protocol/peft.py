"""What a method tells of its PEFT form: plain data, from which `jlora.interchange` writes and reads PEFT's files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Peft:
    """One leaf's adapter in PEFT's terms, exact to the bit.

    Attributes:
        kind: "lora", "adalora", "vera", "shira", "rows" or "whole" (a trained leaf); or the `peft_type` of a `PeftKind`.
        arrays: by PEFT's role: "a" `[*batch, in, r]`, "b" `[*batch, r, out]`, "m" `[*batch, out]`, ...
        fields: for a role the names of the method's fields that its array holds; by default the one named as the role.
        alpha: numerator of the scale of `a @ b`.
        rslora: whether the scale is `alpha / sqrt(r)` and not `alpha / r`.
        dropout: probability of dropping an entry of the adapter's input while training.
        shared: constants that all leaves of the method have in common.
    """

    kind: str
    arrays: dict[str, Any]
    fields: dict[str, tuple[str, ...]] = field(default_factory=dict)
    alpha: float = 1.0
    rslora: bool = False
    dropout: float = 0.0
    shared: dict[str, Any] = field(default_factory=dict)


#: How a field of one matrix lies in PEFT's file: by name, or a pair of functions of numpy arrays, there and back.
Layout = str | tuple[Callable[[Any], Any], Callable[[Any], Any]]


@dataclass(frozen=True)
class PeftTensor:
    """One of the tensors that PEFT has for a module, and the method's field that it holds.

    A field that `start` gives only for some matrices, such as the second factor of a large one, is written and wanted for
    these alone.

    Attributes:
        name: the end of its key, behind the module's name: "hada_w1_a", "oft_R.weight".
        field: the name of the method's field, trained or constant.
        layout: "same"; "transposed" (the last two axes); "column", `[n]` as `[n, 1]`; "row", `[n]` as `[1, n]`; or two
            functions of numpy arrays: from the field of one matrix to the tensor, and back.
        when: whether a method has this tensor; by default all have.
        layout_of: gives the layout for a method, where it depends on hyperparameters.
    """

    name: str
    field: str
    layout: Layout = "same"
    when: Callable[[Any], bool] | None = None
    layout_of: Callable[[Any], Layout] | None = None


@dataclass(frozen=True)
class PeftShared:
    """A tensor that PEFT has once for the whole model, and the field of `Method.shared` that it holds, trained or constant.

    Attributes:
        name: its key behind `base_model.`: "vblora_vector_bank".
        field: the name of the field.
        layout: as that of a `PeftTensor`.
        larger: the tensor's axes that may be longer than the model needs; all of it is read.
        repeated: whether PEFT stores it once more with every module, under the same name.
    """

    name: str
    field: str
    layout: Layout = "same"
    larger: tuple[int, ...] = ()
    repeated: bool = False


@dataclass(frozen=True)
class PeftZeros:
    """A tensor that PEFT has for a module and that holds only zeros, where a part of the method is left away.

    Attributes:
        name: as that of a `PeftTensor`.
        shape: its shape for a method and a site; None where it isn't there.
    """

    name: str
    shape: Callable[[Any, Any], tuple[int, ...] | None]


@dataclass(frozen=True)
class PeftSetting:
    """A setting of `adapter_config.json` that is a hyperparameter of the method.

    Attributes:
        name: PEFT's name.
        field: the method's.
        default: PEFT's default, in PEFT's values; it stands for a setting that is missing. Its type is the one wanted.
        pattern: PEFT's table of the values of some modules, such as "rank_pattern"; "" where it has none, and all modules of
            a folder must agree.
        values: pairs of the method's value and PEFT's, where they differ; any other value is refused.
        listed: the method's value for modules that the setting lists by name (IA3's `feedforward_modules`); then `default` is
            the method's value for all others.
    """

    name: str
    field: str
    default: Any
    pattern: str = ""
    values: tuple[tuple[Any, Any], ...] = ()
    listed: Any = None


@dataclass(frozen=True)
class PeftKind:
    """A method's place in PEFT as a table: from it `jlora.interchange` writes, checks and reads PEFT's folders.

    A method states it as `peft_kind`. It is for matrices that are one torch parameter each, stacked or not; whatever else
    is adapted goes out as LoRA by `svd_rank=`, or is refused by name. Constants that no tensor holds must be what `start`
    makes of the hyperparameters, whatever its key: so they are made again.

    A method that takes leaves in their own shape (`matrix = False`) and trains them whole states one tensor for each
    parameter of a module, all with its one field: "ln_tuning_layers.weight" and "ln_tuning_layers.bias".

    Attributes:
        peft_type: PEFT's name of the method: "LOHA".
        tensors: those of a module.
        settings: the settings that are hyperparameters.
        shared: tensors of the whole model.
        zeros: tensors of a module that hold only zeros.
        only: settings that jlora has one value of: they are written with it, and refused with any other. One that is missing
            in a folder counts as off.
        unused: settings that change nothing of what the tensors mean, such as names of starts.
        changed: a setting that means something else in folders of older releases of PEFT, and its first release of today's
            meaning: this is written as `peft_version`, and reading an older folder in which the setting is on warns.
        training: settings that act in training only and that the method has not: where they are on, reading warns.
        own_biases: the value of `bias` for training the biases of adapted modules alone, such as "hra_only"; "" where PEFT's
            configuration has no `bias`.
        fan_in_fan_out: whether PEFT has that setting here, and so takes transformers' Conv1D (GPT-2) too.
        holds: whether PEFT has such a method on such a site: by hyperparameters, or by the matrix's sizes; by default it has
            all.
    """

    peft_type: str
    tensors: tuple[PeftTensor, ...]
    settings: tuple[PeftSetting, ...] = ()
    shared: tuple[PeftShared, ...] = ()
    zeros: tuple[PeftZeros, ...] = ()
    only: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    changed: tuple[str, str] | None = None
    training: tuple[str, ...] = ()
    own_biases: str = ""
    fan_in_fan_out: bool = False
    holds: Callable[[Any, Any], bool] | None = None

    def of(self, method: Any) -> tuple[PeftTensor, ...]:
        """The tensors that a method has, with their layouts for it."""
        had = [tensor for tensor in self.tensors if tensor.when is None or tensor.when(method)]
        return tuple(replace(each, layout=each.layout_of(method)) if each.layout_of else each for each in had)

    def zeros_of(self, method: Any, site: Any) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of zeros that a method has at a site."""
        shapes = {each.name: each.shape(method, site) for each in self.zeros}
        return {name: shape for name, shape in shapes.items() if shape is not None}

    @property
    def names(self) -> frozenset[str]:
        """Names of all settings that are known."""
        patterns = {setting.pattern for setting in self.settings if setting.pattern}
        flags = {"fan_in_fan_out"} if self.fan_in_fan_out else set()
        told = {setting.name for setting in self.settings} | patterns | flags
        return frozenset(told | set(self.only) | set(self.unused) | set(self.training))
