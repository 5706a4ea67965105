"""VeRA in PEFT's format, both ways."""

from __future__ import annotations

from jlora.interchange.files.config import Settings
from jlora.interchange.files.folder import AdapterFolder
from jlora.interchange.files.parse import SHARED, Contents
from jlora.interchange.files.recorded import Recorded
from jlora.interchange.files.written import PREFIX, Written, origin
from jlora.interchange.kinds.adalora import plain_matrix, single
from jlora.interchange.kinds.lora import shortest
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.index import Index, Read, trained_dtype
from jlora.interchange.leaves.names import Slot
from jlora.methods.vera import VeRA


def holds(adapters: list[tuple[Form | None, list[Slot]]]) -> bool:
    """Whether all adapters have one method, and so one pair of projections, and are on plain matrices."""
    methods = {form.site.method for form, _ in adapters if form is not None}
    return len(methods) == 1 and all(single(slots) for _, slots in adapters)


def write(out: Written, adapters: list[tuple[Form, list[Slot]]], modules: set[str], serve: bool) -> set[str]:
    """Adds VeRA adapters and their shared projections to a folder; returns the adapted modules."""
    targets = []
    for form, slots in adapters:
        for slot in slots:
            index = layout.batch_index(slot, form.site)
            for role, name in (("b", "vera_lambda_b"), ("d", "vera_lambda_d")):
                array = form.arrays[role][index]
                out.add(f"{PREFIX}{slot.module}.{name}", array, [origin(slot, form.fields[role])])
            targets.append(slot.module)
    first, method = adapters[0][0], adapters[0][0].site.method
    assert isinstance(method, VeRA)
    for key, name in SHARED.items():
        out.add(key, first.shared[name].T, [{"leaf": "", "fields": [name], "shared": "VeRA"}])
    out.config.update(
        peft_type="VERA",
        r=method.rank,
        d_initial=method.d_initial,
        projection_prng_key=method.projection_key,
        save_projection=True,
        vera_dropout=method.dropout,
        target_modules=shortest(targets, modules),
        fan_in_fan_out=any(slot.kind == "conv1d_gpt2" for _, slots in adapters for slot in slots),
        init_weights=True,
    )
    return set(targets)


def find(folder: AdapterFolder, settings: Settings, contents: Contents, index: Index) -> dict[str, dict[str, str]]:
    """The keys of each torch parameter's vectors, with their shapes checked; those of the projections stand under the name "".

    Raises:
        ValueError: for a missing tensor, one of another shape, or projections too small for a matrix.
    """
    rank, rows, columns = settings.integer("r", 256), 0, 0
    found = {}
    for module, roles in contents.adapters.items():
        name = plain_matrix(module, key := next(iter(roles.values())), index)
        settings.check_target(module, key)
        if missing := {"b", "d"} - set(roles):
            raise ValueError(f"{folder.file}: {module!r} has no vera_lambda_{min(missing)}; the file is not whole")
        slot = index.by_name[name][0]
        columns_here, rows_here = layout.b_shape(slot, 1)[0], layout.a_shape(slot, 1)[1]
        folder.check(roles["b"], (columns_here,), name)
        folder.check(roles["d"], (rank,), f"rank {rank} of {name!r}")
        rows, columns = max(rows, rows_here), max(columns, columns_here)
        found[name] = roles
    if not found:
        raise ValueError(f"{folder.file}: has no vera_lambda_b and vera_lambda_d; the file is not whole")
    for key, role in SHARED.items():
        if role not in contents.shared:
            raise ValueError(
                f"{folder.file}: {key!r} is missing, and torch's random numbers can't be drawn again here; save the adapter "
                "with save_projection=True"
            )
    # PEFT uses the first rows and columns, so larger projections are fine.
    wide, high = folder.shape(contents.shared["a"])[-1], folder.shape(contents.shared["b"])[0]
    folder.check(contents.shared["a"], (rank, max(rows, wide)), "the largest input")
    folder.check(contents.shared["b"], (max(columns, high), rank), "the largest output")
    return {**found, "": contents.shared}


def read(
    folder: AdapterFolder, settings: Settings, found: dict[str, dict[str, str]], index: Index, recorded: Recorded
) -> list[Read]:
    """The adapters, by leaf; a layer of a stack without one has zeros."""
    shared_keys = found.pop("")
    initial, seed = settings.number("d_initial", 0.1), int(settings.number("projection_prng_key", 0))
    plain = VeRA(settings.integer("r", 256), initial, seed, settings.probability("vera_dropout"))
    leaves = index.leaves_of(set(found))
    dtype = max((trained_dtype(index.leaves[keys].dtype) for keys in leaves), key=lambda kind: kind.itemsize)
    shared = {name: folder.read_as(key, dtype).T for name, key in shared_keys.items()}
    result = []
    for keys in leaves:
        slots = [slot for slot in index.slots[keys] if slot.name in found]
        kind = trained_dtype(index.leaves[keys].dtype)
        arrays = {slot: {role: folder.read_as(key, kind) for role, key in found[slot.name].items()} for slot in slots}
        method = recorded.one(slots, VeRA)
        site = index.site(keys, plain if method is None or method.rank != plain.rank else method)
        result.append(Read(site, index.stack(site, list(arrays.items())), shared=shared))
    return result
