"""`save` and `load`: adapters on disk, without the base, and with a fingerprint of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
import re
import reprlib
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (makes numpy know bfloat16 and the like)
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jlora import _compat, paths
from jlora.core.protocol.method import Site
from jlora.core.protocol.stored import Stored
from jlora.core.tree import beside, placement
from jlora.core.tree.adapted import SHARED, Adapted, Plan
from jlora.disk.checksums import checksums, difference
from jlora.disk.fingerprint import fingerprint
from jlora.disk.json_files import ILL_FORMED, read_object, shown
from jlora.disk.serialize import method_from_dict, method_to_dict

FORMAT = 1
MANIFEST = "jlora.json"
ARRAYS = "arrays"
# What is written of a site; its method is a table of its own, and what is beside it the base says.
_SITE = [field for field in dataclasses.fields(Site) if field.name not in ("method", "beside")]
# The first release wrote neither the checksums of the arrays' files nor the digest of the manifest; codes are written where the
# base has some.
_KEYS, _LATER = {"format", "base", "adapters", "sites", "arrays"}, {"files", "digest", "codes"}


def save(path: str | os.PathLike[str], adapted: Adapted) -> None:
    """Writes the adapters to a new directory: `jlora.json` and the arrays as an orbax checkpoint.

    The base is not written. The directory appears whole or not at all. Where several processes hold the arrays, all of them
    call this; process 0 writes, and the others wait for it.

    Raises:
        FileExistsError: where `path` exists.
        ValueError: for keys that can't be told apart in the file, such as "a.b" beside "b" under "a".
        OSError: where the disk refuses; nothing is left behind.

    Example:
        >>> jlora.save("run/adapters", adapted)
    """
    target = Path(path).absolute()
    _check_names(adapted)
    described = describe(adapted)
    arrays = {"params": adapted.params, "frozen": adapted.frozen}
    if jax.process_count() > 1:
        arrays = jax.tree.map(np.asarray, placement.complete(arrays))
    if jax.process_index() == 0:
        _save(target, arrays, described)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jlora.save")


def _check_names(adapted: Adapted) -> None:
    """Whether every array has a name of its own in the checkpoint, where orbax joins keys by dots."""
    named: dict[str, str] = {}
    for keys, _ in paths.flatten_with_keys(adapted.params)[0]:
        path, name = "/".join(keys), ".".join(keys)
        if (other := named.setdefault(name, path)) != path:
            raise ValueError(f"{other} and {path} have one name in a checkpoint, {name}; rename a key that has a dot")


def _save(target: Path, arrays: dict[str, Any], described: dict[str, Any]) -> None:
    if target.exists():
        raise FileExistsError(f"{target} exists already; save to a new directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        _write(staging, arrays, described)
        staging.rename(target)
    except BaseException as error:
        _remove(staging)
        # Where the disk refuses (full, no permission), tensorstore raises a ValueError that names the error's code.
        code = re.search(r"os_error_code='(\d+)'", str(error)) if isinstance(error, ValueError) else None
        if code is None:
            raise
        raise OSError(int(code[1]), f"{os.strerror(int(code[1]))}; nothing was saved", str(target)) from error


def _write(directory: Path, arrays: dict[str, Any], described: dict[str, Any]) -> None:
    alone = {"active_processes": {0}, "barrier_sync_key_prefix": "jlora_save"} if jax.process_count() > 1 else {}
    options = ocp.options.MultiprocessingOptions(primary_host=0, **alone)
    with ocp.StandardCheckpointer(multiprocessing_options=options) as checkpointer:
        checkpointer.save(directory / ARRAYS, arrays)
    described = {**described, "files": checksums(directory / ARRAYS)}
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({**described, "digest": _digest(described)}, indent=1) + "\n")
    with manifest.open() as file:
        os.fsync(file.fileno())


def _remove(directory: Path) -> None:
    """Removes a directory for good, although orbax's other threads may still write to it for a moment."""
    gone = 0
    for _ in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        gone = 0 if directory.exists() else gone + 1
        if gone == 5:
            return
        time.sleep(0.02)


def load(path: str | os.PathLike[str], params: Any) -> Adapted:
    """Reads adapters that `save` wrote and puts them on their base.

    Args:
        path: the directory.
        params: the base that they were made for; its values are compared by fingerprint. Where a leaf is a
            `jax.ShapeDtypeStruct` there are no values to compare, and no array is read: the adapters are shapes too, with the
            shardings that the arrays would get beside those of the base.

    Raises:
        FileNotFoundError: where there is no such directory, or it is not whole.
        ValueError: where the base is another one, or the files don't fit together.

    Example:
        >>> adapted = jlora.load("run/adapters", params)
    """
    directory = Path(path).absolute()
    described = read_manifest(directory)
    former = {} if _is_abstract(params) else paths.former_keys(params)
    if former and described["base"] != fingerprint(params):
        return _load_by_former_keys(directory, described, params, former)
    return _load(directory, described, params)


def _load_by_former_keys(directory: Path, described: dict[str, Any], params: Any, former: dict[Any, Any]) -> Adapted:
    """Loads files of a former release, in whose paths a last key `value` was left out (see `paths.former_keys`)."""
    now = {keys: old for old, keys in former.items()}
    base: dict[str, Any] = {}
    for keys, leaf in paths.flatten_with_keys(params)[0]:
        paths.insert(base, now.get(keys, keys), leaf)
    loaded = _load(directory, described, base)

    def renamed(tree: dict[str, Any]) -> dict[str, Any]:
        for site in loaded.plan.sites:
            if site.keys in former and (fields := paths.lookup(tree, site.keys)):
                paths.insert(tree, site.keys, {former[site.keys][-1]: fields})
        return tree

    sites = tuple(dataclasses.replace(site, keys=former.get(site.keys, site.keys)) for site in loaded.plan.sites)
    return Adapted(params, renamed(loaded.params), renamed(loaded.frozen), {}, Plan(sites))


def _load(directory: Path, described: dict[str, Any], params: Any) -> Adapted:
    sites = tuple(site_from(entry, str(directory / MANIFEST)) for entry in described["sites"])
    if len({site.keys for site in sites}) < len(sites):
        raise ValueError(f"{directory / MANIFEST} describes a leaf twice")
    leaves = dict(paths.flatten_with_keys(params)[0])
    sites = tuple(dataclasses.replace(site, beside=beside.present(site, leaves)) for site in sites)
    blank = Adapted(params, {}, {}, {}, Plan(sites))
    saved = _arrays_from(directory, described, blank.plan)
    _check_digest(directory, described)
    _check_base(directory, described, blank)
    shapes = _placed(saved, blank)
    if _is_abstract(params):
        return dataclasses.replace(blank, params=shapes["params"], frozen=shapes["frozen"])
    _check_files(directory, described.get("files", {}))
    arrays = _restore(directory, shapes)
    if fingerprint(arrays) != described["adapters"]:
        raise ValueError(f"{directory} is damaged: its arrays are not those that were saved")
    return dataclasses.replace(blank, params=arrays["params"], frozen=arrays["frozen"])


def describe(adapted: Adapted) -> dict[str, Any]:
    """What `jlora.json` holds: the sites with their methods, the arrays' shapes, and both fingerprints."""
    drawers = {"params": adapted.params, "frozen": adapted.frozen}
    codes = _codes(adapted.base)
    return {
        **({"codes": codes} if codes else {}),
        "format": FORMAT,
        "base": fingerprint(adapted.base),
        "adapters": fingerprint(drawers),
        "sites": [site_to_dict(site) for site in adapted.plan.sites],
        "arrays": [
            {"keys": keys, "shape": leaf.shape, "dtype": str(leaf.dtype)}
            for keys, leaf in paths.flatten_with_keys(drawers)[0]
        ],
    }


def _codes(params: Any) -> dict[str, str]:
    """For each leaf that is kept in the form of a code that code in words."""
    return {
        "/".join(keys): str(leaf.code) for keys, leaf in paths.flatten_with_keys(params)[0] if isinstance(leaf, Stored)
    }


def site_to_dict(site: Site) -> dict[str, Any]:
    """A site as plain data, without what is beside it."""
    return {**{f.name: getattr(site, f.name) for f in _SITE}, "method": method_to_dict(site.method)}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The contents of a saved directory's `jlora.json`.

    Raises:
        FileNotFoundError: where it is missing.
        ValueError: where it is not what `save` writes.
    """
    file = directory / MANIFEST
    if not file.is_file() or not (directory / ARRAYS).is_dir():
        raise FileNotFoundError(f"{directory} holds no saved adapters: {MANIFEST} or the folder {ARRAYS} is missing")
    try:
        described = read_object(file)
        if described.get("format") != FORMAT:
            raise ValueError(f"format {reprlib.repr(described.get('format'))}, wanted {FORMAT}")
        if missing := sorted(_KEYS - set(described)):
            raise ValueError(f"it lacks {', '.join(missing)}")
        if unknown := sorted(set(described) - _KEYS - _LATER):
            raise ValueError(f"it has {', '.join(map(reprlib.repr, unknown))}, which no file of format {FORMAT} has")
        for name in ("base", "adapters"):
            if not isinstance(described[name], str):
                raise ValueError(f"{name} must be a fingerprint, got {shown(described[name])}")
        if not isinstance(codes := described.get("codes", {}), dict):
            raise ValueError(f"codes must be an object, got {shown(codes)}")
        for name in ("sites", "arrays"):
            if not (isinstance(described[name], list) and all(isinstance(each, dict) for each in described[name])):
                raise ValueError(f"{name} must be a list of objects, got {shown(described[name])}")
        return described
    except ValueError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise ValueError(f"{file} is damaged or from another version: {reason}") from None


def _digest(described: dict[str, Any]) -> str:
    """SHA-256 of the manifest without its own entry `digest`."""
    rest = {name: value for name, value in described.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def site_from(entry: dict[str, Any], where: str) -> Site:
    """The site that plain data describes.

    Raises:
        ValueError: where it can't be read, with where it stands.
    """
    try:
        fields = {f.name: _field(entry[f.name], f) for f in _SITE}
        site = Site(**fields, method=method_from_dict(entry["method"]))
        axes = sorted((*site.in_axes, *site.out_axes, *site.batch_axes))
        if site.method.matrix and axes != list(range(len(site.shape))):
            raise ValueError(f"{site.path} has shape {site.shape}, but in, out and batch axes {axes}")
        return site
    except ILL_FORMED as error:
        raise ValueError(f"{where} describes a leaf that can't be read: {error}") from None


def _field(value: Any, field: dataclasses.Field) -> Any:
    """A field of a site, of the type that the site wants."""
    item = {"tuple[str, ...]": str, "tuple[int, ...]": int}.get(str(field.type))
    if item is None and isinstance(value, str):
        return value
    if item is not None and isinstance(value, list) and all(type(each) is item for each in value):
        return tuple(value)
    raise ValueError(f"{field.name} must be {field.type}, got {shown(value)}")


def _arrays_from(directory: Path, described: dict[str, Any], plan: Plan) -> dict[tuple[str, ...], Any]:
    """Shape and dtype of every saved array, by its keys."""
    owners, found = {site.keys for site in plan.sites}, {}
    owners |= {(SHARED, name) for name in plan.shared_names().values()}
    try:
        for entry in described["arrays"]:
            keys = tuple(entry["keys"])
            if keys[0] not in ("params", "frozen") or keys[1:-1] not in owners:
                raise ValueError(f"no described leaf has an array {'/'.join(keys)}")
            found[keys] = jax.ShapeDtypeStruct(tuple(map(operator.index, entry["shape"])), np.dtype(entry["dtype"]))
    except ILL_FORMED as error:
        raise ValueError(f"{directory / MANIFEST} describes an array that can't be read: {error}") from None
    return found


def _check_digest(directory: Path, described: dict[str, Any]) -> None:
    """Refuses a manifest that was changed after it was written: another hyperparameter would make another function."""
    if described.get("digest", found := _digest(described)) != found:
        raise ValueError(
            f"{directory / MANIFEST} is damaged, or was changed after it was written: its digest is {found}, "
            f"it says {shown(described['digest'])}"
        )


def _check_files(directory: Path, wanted: Any) -> None:
    """Refuses array files that differ from those that were written.

    Called before orbax reads them: when one of its reads fails, each of the others prints a traceback too.
    """
    if not isinstance(wanted, dict):
        raise ValueError(f"{directory / MANIFEST} is damaged: files must be an object, got {shown(wanted)}")
    found = {name: digest for name, digest in checksums(directory / ARRAYS).items() if name in wanted} if wanted else {}
    if (wrong := difference(wanted, found)) is not None:
        raise ValueError(f"{directory} is damaged: {ARRAYS}/{wrong}")


def _check_base(directory: Path, described: dict[str, Any], blank: Adapted) -> None:
    leaves = dict(paths.flatten_with_keys(blank.base)[0])
    for site in blank.plan.sites:
        leaf = leaves.get(site.keys)
        if leaf is None:
            close = paths.nearest(site.path, ["/".join(keys) for keys in leaves])
            raise ValueError(f"{directory} adapts {site.path}, which the base lacks; its nearest paths are {close}")
        found = (tuple(leaf.shape), str(leaf.dtype)) if _compat.is_array(leaf) else (type(leaf).__name__, repr(leaf))
        if found != (site.shape, site.dtype):
            raise ValueError(
                f"{directory} adapts {site.path} with shape {site.shape} and dtype {site.dtype}; the base has "
                f"{found[0]} and {found[1]}"
            )
    made_on, now = described.get("codes", {}), _codes(blank.base)
    for path in sorted(made_on.keys() | now.keys()):
        if (before := made_on.get(path)) != (after := now.get(path)):
            raise ValueError(
                f"{directory} was made on a base whose {path} is {_form(before)}; here it is {_form(after)}: what an adapter "
                "learned holds for its own base alone, so quantize as it was then"
            )
    if _is_abstract(blank.base):
        return  # no values to compare
    if (found := fingerprint(blank.base)) != described["base"]:
        raise ValueError(
            f"{directory} was made for another base: fingerprint {described['base']}, but these params have {found}"
        )


def _form(code: str | None) -> str:
    return "not quantized" if code is None else f"kept as {code}"


def _restore(directory: Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """The arrays, read straight to where they belong beside their base."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(directory / ARRAYS, shapes)
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
        raise ValueError(f"{directory} is damaged: {str(error).splitlines()[0]}") from error


def _is_abstract(params: Any) -> bool:
    """Whether some of the base is shapes alone."""
    return any(map(placement.is_shape, paths.leaves(params)))


def _placed(saved: dict[tuple[str, ...], Any], blank: Adapted) -> dict[str, Any]:
    """The saved arrays as a tree of shapes, each with the sharding that it gets beside its base."""
    leaves = dict(paths.flatten_with_keys(blank.base)[0])
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    other = placement.alone(leaves.values()) if _is_abstract(blank.base) else device
    shapes: dict[str, Any] = {"params": {}, "frozen": {}}
    for site in blank.plan.sites:  # also where a leaf trains nothing of its own
        paths.insert(shapes["params"], site.keys, {})
    for keys, shape in placement.shapes_beside(saved, blank.plan.sites, leaves, other).items():
        paths.insert(shapes, keys, shape)
    return shapes
