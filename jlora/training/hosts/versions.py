"""Which releases a run stands on, and what else in the environment of a process decides about its numbers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import jax

import jlora

#: What a run's record names.
PACKAGES = ("jlora", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# What a program's numbers and the rows of a run come from, besides.
_BELOW = ("jaxlib", "tokenizers", "safetensors", "jinja2")
# Switches of JAX that say where a process is, what it writes down and keeps, not what it computes.
_OF_A_PROCESS = re.compile(
    "address|cache|color|debug|dir|dump|file|log|mtls|platform|proxy|report|timeout|trace|visible"
)
# Words among the flags of a compiler that are of this kind; the number of devices is compared by itself.
_FLAGS_OF_A_PROCESS = re.compile("dump|log|device_count")


def installed(package: str) -> str:
    """The release of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # jlora itself, when it runs from its source folder


def versions() -> dict[str, str]:
    """The releases that a run's record names."""
    return {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}}


def environment() -> dict[str, str]:
    """What in the environment of a process decides about its numbers, by name: all processes of a run must have the same."""
    releases = versions() | {name: installed(name) for name in _BELOW}
    switches = {name: str(value) for name, value in jax.config.values.items() if not _OF_A_PROCESS.search(name)}
    flags = {name: _flags(os.environ.get(name, "")) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    kinds = sorted({device.device_kind for device in jax.local_devices()})
    devices = {"set of devices": f"{jax.local_device_count()} of {', '.join(kinds)}"}
    return {**releases, "source code of jlora": _source(), **devices, **switches, **flags}


def _source() -> str:
    """A digest of jlora's own code, which may differ where releases do not: a copy of the repository is often installed."""
    sha, package = hashlib.sha256(), Path(jlora.__file__).parent
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        sha.update(f"{path.relative_to(package)} {len(content)} ".encode() + content)
    return f"sha256 {sha.hexdigest()[:16]}"


def _flags(text: str) -> str:
    """Flags in an order that makes no difference, without those that are about the process."""
    return " ".join(sorted(word for word in text.split() if not _FLAGS_OF_A_PROCESS.search(word))) or "nothing"
