"""Optimizer states that former releases wrote: every learning-rate group had one of its own, also where groups are alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.training.errors import CheckpointError

_GROUP = re.compile(r"inner_states\..*?\.inner_state\.")


def alike(saved: Iterable[str], wanted: Iterable[str]) -> dict[str, list[str]]:
    """For each wanted array the saved ones that are it but for the group in their name, that of its own name first."""
    found: dict[str, list[str]] = {}
    for name in sorted(saved):
        found.setdefault(_GROUP.sub("", name), []).append(name)
    return {name: sorted(found.get(_GROUP.sub("", name), []), key=lambda each: each != name) for name in wanted}


def joined(arrays: Mapping[str, Any], wanted: Mapping[str, list[str]], where: str) -> dict[str, Any]:
    """The wanted arrays, from those that are `alike`: that of the same name, else what all of them are.

    What no wanted array has the name of, such as the step count of a group that is none any more, must be equal to one that is
    taken.

    Raises:
        CheckpointError: where it is not.
    """
    for name, names in wanted.items():
        taken = [each for each in names if each in wanted] or names[:1]
        for other in names:
            if other not in taken and not any(_equal(arrays[other], arrays[each]) for each in taken):
                raise CheckpointError(
                    f"{where} was written by a former release, and its {other} differs from {' and '.join(taken)}, where now "
                    f"there is one {name}: go on with that release, or start anew"
                )
    return {name: arrays[names[0]] for name, names in wanted.items()}


def _equal(one: Any, other: Any) -> bool:
    """Whether arrays, of which each process may hold a part, have the same values."""
    return one.shape == other.shape and bool(jax.jit(jnp.array_equal)(one, other))
