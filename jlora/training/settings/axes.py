"""What `--mesh` and `--shard` say, read and checked before there is a device or a weight."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from jlora.training.errors import SettingError

#: Axes that cut the rows of a batch; `fsdp` cuts the weights besides, as any other axis does.
ROWS = ("data", "fsdp")

# Names that mean something else than a cut of weights, and why the job does nothing of the kind.
_FOREIGN = {
    "expert": "the models of the job have no experts",
    "sequence": "the job cuts no row along its tokens",
    "context": "the job cuts no row along its tokens",
    "pipeline": "every chip runs all layers",
    "stage": "every chip runs all layers",
}

Rules = Mapping[str, PartitionSpec]


def mesh_axes(text: str | None) -> dict[str, int]:
    """`"data=2,model=2"` as `{"data": 2, "model": 2}`; nothing as `{}`.

    Raises:
        SettingError: if an entry is not `name=number`, or a name comes twice.
    """
    axes: dict[str, int] = {}
    for part in (text or "").split(",") if text is not None else []:
        matched = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*([1-9]\d*)\s*", part)
        if matched is None or matched[1] in axes:
            raise SettingError("mesh", f"must be distinct name=number pairs such as data=2,model=2, got {text!r}")
        axes[matched[1]] = int(matched[2])
    return axes


def shard_rules(shard: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """`{"w": "None,fsdp,data+tensor"}` as `{"w": PartitionSpec(None, "fsdp", ("data", "tensor"))}`.

    Raises:
        SettingError: for a pattern that is no regular expression, entries that are no names, a name that comes twice.
    """
    return {pattern: _rule(pattern, entries) for pattern, entries in shard.items()}


def _rule(pattern: str, entries: Any) -> PartitionSpec:
    try:
        re.compile(pattern)
    except re.error as error:
        raise SettingError("shard", f"has no regular expression: {pattern!r} ({error})") from error
    parts = [part.strip() for part in entries.split(",")] if isinstance(entries, str) else [""]
    names = [[] if part == "None" else part.split("+") for part in parts]
    used = [name for each in names for name in each]
    if not all(map(str.isidentifier, used)) or len(set(used)) < len(used):
        raise SettingError(
            "shard",
            f"{pattern!r} must say for each axis of the weight which axis of the mesh cuts it, or None, such as "
            f"None,fsdp,tensor, and name each once, got {entries!r}",
        )
    return PartitionSpec(*(None if not each else each[0] if len(each) == 1 else tuple(each) for each in names))


def cutting_axes(names: Sequence[str]) -> list[str]:
    """The axes that cut weights where no rule says otherwise: the last two of those that are for weights."""
    return [name for name in names if name != "data" and name not in _FOREIGN][-2:]


def check_axes(axes: Mapping[str, int], rules: Rules) -> None:
    """Refuses axes that would cut nothing, and rules with axes that the mesh lacks.

    Raises:
        SettingError: naming the axis.
    """
    named = {name for pattern, spec in rules.items() for name in _named(pattern, spec, axes or {"data": 1})}
    cutting = cutting_axes(list(axes))
    for name in axes:
        if name == "data" or name in named or name in cutting:
            continue
        why = _FOREIGN.get(name, f"beside data the last two axes cut the weights, which are {' and '.join(cutting)}")
        raise SettingError("mesh", f"has an axis {name}, but {why}: leave it out, or say by --shard what it cuts")


def _named(pattern: str, spec: PartitionSpec, axes: Collection[str]) -> set[str]:
    names = {name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)}
    if missing := sorted(names - set(axes)):
        raise SettingError("shard", f"{pattern!r} names the axis {missing[0]}, but the mesh has only {', '.join(axes)}")
    return names
