"""Writes leaves that are trained themselves: PEFT's `modules_to_save` and trained biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.interchange.files.written import PREFIX, Written, origin
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.names import Slot

Keys = tuple[str, ...]


class Parameters:
    """Every torch parameter that the names know, with its value: the trained one if it is trained, else the base's.

    Args:
        slots: the slots of every leaf.
        base: the base's leaves.
        trained: the leaves that are trained themselves.
    """

    def __init__(self, slots: Mapping[Keys, list[Slot]], base: Mapping[Keys, Any], trained: Mapping[Keys, np.ndarray]):
        self.base, self.trained = base, trained
        self.by_name: dict[str, list[Slot]] = {}
        for slot in (slot for each in slots.values() for slot in each):
            self.by_name.setdefault(slot.name, []).append(slot)

    def of_module(self, module: str) -> list[str]:
        """The parameters of a module."""
        return [name for name, slots in self.by_name.items() if slots[0].module == module]

    def is_trained(self, name: str) -> bool:
        """Whether any part of a parameter is trained."""
        return any(slot.keys in self.trained for slot in self.by_name[name])

    @property
    def modules(self) -> set[str]:
        """Names of all modules."""
        return {slots[0].module for slots in self.by_name.values()}

    def value(self, name: str) -> np.ndarray:
        """A parameter in torch's layout.

        Raises:
            ValueError: where the leaves don't make up all of it.
        """
        slots = sorted(self.by_name[name], key=lambda slot: slot.torch_columns())
        covered = sum(stop - start for start, stop, _ in (slot.torch_columns() for slot in slots))
        if slots[0].entry.columns is not None and covered != slots[0].torch_columns()[2]:
            raise ValueError(f"names: the leaves {[slot.path for slot in slots]} are not all of the parameter {name!r}")
        dtypes = [self.trained[slot.keys].dtype for slot in slots if slot.keys in self.trained]
        parts = [layout.whole_to_torch(slot, self._leaf(slot.keys)) for slot in slots]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=layout.out_axis(slots[0]))
        return joined.astype(np.result_type(*dtypes)) if dtypes else joined

    def _leaf(self, keys: Keys) -> np.ndarray:
        return self.trained[keys] if keys in self.trained else np.asarray(self.base[keys])

    def origins(self, name: str) -> list[dict[str, Any]]:
        """The manifest's lines on a parameter, which mark a part that is not trained as a copy of the base."""
        return [
            origin(slot, ("w",) if slot.keys in self.trained else (), **self._copy(slot)) for slot in self.by_name[name]
        ]

    def _copy(self, slot: Slot) -> dict[str, Any]:
        return {} if slot.keys in self.trained else {"copy_of_base": True}


def write(out: Written, parameters: Parameters, targets: set[str], only: str = "lora_only") -> None:
    """Adds the trained leaves to a folder.

    Args:
        out: gets the tensors, and the settings `bias` and `modules_to_save`.
        parameters: all parameters that the names know.
        targets: modules that have an adapter.
        only: PEFT's value of `bias` for training the biases of these modules alone; empty where the format has none.

    Raises:
        ValueError: for a trained leaf that PEFT has no place for.
    """
    saved: list[str] = []
    biases = {"own": 0, "other": 0}
    for module in sorted(
        {slots[0].module for name, slots in parameters.by_name.items() if parameters.is_trained(name)}
    ):
        trained = [name for name in parameters.of_module(module) if parameters.is_trained(name)]
        if not module:
            raise ValueError(f"{trained[0]!r} belongs to no torch module, and PEFT saves whole modules only")
        ends = {name.rpartition(".")[2] for name in trained}
        if module in targets or ends == {"bias"}:
            own = module in targets
            if ends != {"bias"}:
                raise ValueError(f"{module!r} carries an adapter and is trained itself; PEFT holds one of the two")
            biases["own" if own else "other"] += 1
            key = f"{module}.base_layer.bias" if own else f"{module}.bias"
            out.add(PREFIX + key, parameters.value(trained[0]), parameters.origins(trained[0]))
        else:
            saved.append(module)
            for name in parameters.of_module(module):
                _add_saved(out, parameters, name)
            saved += _add_tied(out, parameters, trained)
    _check_suffixes(saved, parameters.modules)
    _check_targets(saved, targets)
    if any(biases.values()) and not only:
        raise ValueError(f"PEFT's {out.config['peft_type']} has no trained biases; leave them out of the spec")
    if only:
        out.config["bias"] = "all" if biases["other"] else only if biases["own"] else "none"
    out.config["modules_to_save"] = saved or None


def _add_saved(out: Written, parameters: Parameters, name: str) -> None:
    out.add(PREFIX + name, parameters.value(name), parameters.origins(name))


def _add_tied(out: Written, parameters: Parameters, trained: list[str]) -> list[str]:
    """Adds the parameters that are the same array as a trained one; returns their modules."""
    found = []
    for name in trained:
        for also in parameters.by_name[name][0].entry.also:
            out.add(PREFIX + also, parameters.value(name), parameters.origins(name))
            found.append(also.rpartition(".")[0])
    return found


def _check_targets(saved: list[str], targets: set[str]) -> None:
    """Refuses an adapter inside a module that is saved whole, since PEFT adapts nothing there."""
    for name in saved:
        for target in sorted(targets):
            if f".{name}." in f".{target}.":
                raise ValueError(
                    f"PEFT saves the module {name!r} whole, since a parameter of its own is trained, and then adapts nothing "
                    f"inside it, such as {target!r}; leave one of the two out of the spec"
                )


def _check_suffixes(saved: list[str], modules: set[str]) -> None:
    """Refuses names in `modules_to_save` with which other modules end too: PEFT would take these as well, dots or not."""
    for name in saved:
        for other in sorted(modules):
            if other.endswith(name) and other not in saved:
                raise ValueError(
                    f"PEFT finds modules to save by the end of their name, so {name!r} would also take {other!r}; train "
                    f"{other!r} too, or wrap the model so that the name is longer"
                )
