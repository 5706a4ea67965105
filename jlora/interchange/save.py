"""`save_peft`: adapters as a folder that PEFT, transformers and servers read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes numpy know bfloat16)
import numpy as np
from safetensors import safe_open

from jlora import paths
from jlora.compose.plain import unchained
from jlora.core.protocol.method import Method, Site
from jlora.core.tree.adapted import SHARED, Adapted
from jlora.core.walk.weight import Weight
from jlora.interchange import prompts
from jlora.interchange.files import manifest
from jlora.interchange.files.folder import CONFIG, FLOATS, TENSORS
from jlora.interchange.files.written import Written
from jlora.interchange.kinds import serving
from jlora.interchange.kinds.formats import BY_HAND, Format, formats
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.forms import Form, as_lora, confined, native, truncated
from jlora.interchange.leaves.names import Names, Slot, resolve
from jlora.interchange.trained import wholes
from jlora.interchange.trained.wholes import Keys, Parameters
from jlora.models.prefix_layout import PrefixLayout

PROFILES = ("peft", "serving")


@dataclass(frozen=True)
class PeftReport:
    """What `save_peft` wrote; prints as a table.

    Attributes:
        peft_type: PEFT's name of the method.
        rank: the rank, or the commonest; None for a method without.
        tensors: how many.
        residuals: for each leaf that was truncated `|delta - a b| / |delta|`, the largest of its matrices.
        notes: what to know about the result.
    """

    peft_type: str
    rank: int | None
    tensors: int
    residuals: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        lines = [f"{self.peft_type}{rank}, {self.tensors} tensors"]
        lines += [f"{path}: truncated, relative residual {value:.3g}" for path, value in self.residuals.items()]
        return "\n".join([*lines, *self.notes])


def save_peft(
    path: str | os.PathLike[str],
    adapted: Adapted,
    names: Names,
    profile: str = "peft",
    *,
    svd_rank: int | None = None,
    dtype: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
    prefix: PrefixLayout | None = None,
) -> PeftReport:
    """Writes adapters as PEFT does: `adapter_config.json`, `adapter_model.safetensors`, and a manifest of jlora's own.

    A trained array that has no place in the folder is an error. The folder appears whole or not at all.

    Args:
        path: the folder; it must not exist, or be empty.
        adapted: the adapters on their base.
        names: which torch parameter a leaf is: a mapping from a regex of leaf paths to a torch name or a `TorchParameter`, or
            a function of the path; `jlora.models.peft_names(config)` for the models of this package.
        profile: "peft": all that PEFT reads back, bit for bit. "serving": what vLLM, SGLang and llama.cpp read alike: the
            scale folded into B, one rank, plain LoRA.
        svd_rank: turns adapters that the profile has no place for, and those of a higher rank, into LoRA of at most this rank,
            by a truncated SVD of their change of the weight; the report says how much is lost.
        dtype: dtype of the tensors, such as `"bfloat16"`; None keeps what is trained.
        base_model: name or directory of the base, for those who load the adapter.
        task_type: PEFT's task, such as `"CAUSAL_LM"`.
        prefix: for `PrefixTuning`, how keys lie in heads and what rotary positions do to them;
            `jlora.models.peft_prefix(model)` for the models of this package.

    Returns:
        A report, which prints.

    Raises:
        ValueError: for an adapter that the format can't express, naming the leaf; nothing is written.
        FileExistsError: where `path` exists and is not empty.
        OSError: where the disk refuses; nothing is left behind.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> adapted = jlora.adapterize(params, {r".*/v_proj/kernel": jlora.Axes("batch in out", jlora.LoRA(4))})
        >>> report = jlora.save_peft("out", adapted, names=jlora.models.peft_names(model))
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {PROFILES}, got {profile!r}")
    if dtype is not None and np.dtype(dtype) not in FLOATS.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS.values()))}, got {dtype!r}")
    if svd_rank is not None and (not isinstance(svd_rank, int) or svd_rank < 1):
        raise ValueError(f"svd_rank must be a positive integer, got {svd_rank!r}")
    adapted = unchained(adapted)
    slots = resolve(names, paths.flatten_with_keys(adapted.base)[0])
    forms: list[tuple[Form, list[Slot]]] = []
    if prompts.are_prompts(adapted):
        if profile != "peft" or svd_rank is not None:
            raise ValueError('prompts have a place in profile="peft" alone, and no LoRA (svd_rank) says what they do')
        out = prompts.write(adapted, slots, prefix)
    else:
        forms = _forms(adapted, slots, profile, svd_rank)
        out = _written(adapted, forms, slots, profile)
        _check_accounts(adapted, out)
    out.config |= {"task_type": task_type, "base_model_name_or_path": base_model, "inference_mode": True}
    _check_finite(out, "holds {value}, which no adapter can; go back to a checkpoint from before training diverged")
    if dtype is not None:
        out.tensors = {key: _cast(tensor, np.dtype(dtype)) for key, tensor in out.tensors.items()}
        _check_finite(out, f"holds values too large for {np.dtype(dtype)}; choose another dtype")
    _write(Path(path), out, forms, profile)
    residuals = {f.site.path: float(np.max(f.residual)) for f, _ in forms if f.residual is not None}
    return PeftReport(out.config["peft_type"], out.config.get("r"), len(out.tensors), residuals, tuple(out.notes))


def _cast(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # _check_finite refuses it, naming the leaf
        return tensor if tensor.dtype.kind in "iu" else tensor.astype(dtype)


def _forms(
    adapted: Adapted, slots: Mapping[Keys, list[Slot]], profile: str, svd_rank: int | None
) -> list[tuple[Form, list[Slot]]]:
    """The form in which each leaf is written, with its slots, in the order of the plan."""
    if not adapted.plan.sites:
        raise ValueError("there is nothing to save: no leaf is adapted")
    adapters = [confined(weight, _slots_of(weight, slots)) for weight in adapted.weights()]
    adapters = [(weight, places) for weight, places in adapters if places]
    found = [native(weight) for weight, _ in adapters]
    kinds = {form.kind if form is not None else None for form in found} - {"whole"}
    matrices = [(form, slots) for form, (_, slots) in zip(found, adapters) if form is None or form.kind != "whole"]
    known = _formats([weight.method for weight, _ in adapters])
    peft_type = next((f for f in known if kinds == {f.kind} and f.holds(matrices)), BY_HAND["LORA"])
    if profile == "serving":
        peft_type = BY_HAND["LORA"]
    chosen = []
    for form, (weight, places) in zip(found, adapters):
        if profile == "serving" or form is None or form.kind not in (peft_type.kind, "whole", "rows"):
            form = _as_plain_lora(form, weight, places, profile, svd_rank)
        elif svd_rank is not None and form.kind == "lora" and form.rank > svd_rank:
            form = truncated(weight, places, svd_rank)
        chosen.append((form, places))
    return chosen


def _formats(methods: list[Method]) -> list[Format]:
    """All formats, those of methods outside of the catalogue too."""
    return list(formats(type(method) for method in methods).values())


def _slots_of(weight: Weight, slots: Mapping[Keys, list[Slot]]) -> list[Slot]:
    site = weight.site
    assert site is not None
    if site.keys not in slots:
        close = paths.nearest(site.path, ["/".join(keys) for keys in slots])
        raise ValueError(f"names: {site.path} is adapted but has no torch name; the nearest that have one are {close}")
    layout.check_site(slots[site.keys][0], site)
    _check_attention(site, slots)
    return slots[site.keys]


def _check_attention(site: Site, slots: Mapping[Keys, list[Slot]]) -> None:
    """Refuses an adapter of the `out_proj` alone of torch's MultiheadAttention, since PEFT never calls it."""
    known = {slot.name for each in slots.values() for slot in each}
    for slot in slots[site.keys] if site.method.matrix else ():
        if slot.name.endswith(".out_proj.weight") and slot.name.replace("out_proj.weight", "in_proj_weight") in known:
            raise ValueError(
                f"{site.path}: PEFT does not use an adapter of {slot.name!r}, the out_proj of torch's MultiheadAttention; "
                "leave it out of the spec, or save the merged model (jlora merge)"
            )


def _as_plain_lora(form: Form | None, weight: Weight, slots: list[Slot], profile: str, svd_rank: int | None) -> Form:
    """The leaf's change as LoRA: exactly, or truncated where that is allowed."""
    exact = form if form is not None and form.kind == "lora" else as_lora(weight)
    fits = exact is not None and (svd_rank is None or exact.rank <= svd_rank)
    if profile == "serving" and exact is not None and "m" in exact.arrays:
        fits = svd_rank is None  # then serving.check refuses DoRA
    if exact is not None and fits:
        form = exact
    elif svd_rank is not None:
        form = truncated(weight, slots, svd_rank)
    if profile == "serving" and form is not None:
        serving.check(form, slots)
    if form is None or form.kind != "lora":
        site = weight.site
        assert site is not None
        if weight.acts_alone or weight.beside:
            raise ValueError(
                f"{site.path}: {site.method} has no place in a PEFT adapter that holds the others too, and no LoRA says what "
                "it does beside changing the weight; keep it by jlora.save"
                + (", or save the merged model (jlora merge)" if site.method.mergeable else "")
            )
        raise ValueError(
            f"{site.path}: {site.method} has no place in a PEFT adapter that holds the others too, and no exact LoRA; pass "
            "svd_rank= to turn its change of the weight into LoRA, or save the merged model (jlora merge)"
        )
    return form


def _written(
    adapted: Adapted, forms: list[tuple[Form, list[Slot]]], slots: Mapping[Keys, list[Slot]], profile: str
) -> Written:
    """The tensors and settings of the folder, but for those that the caller adds."""
    base = dict(paths.flatten_with_keys(adapted.base)[0])
    trained = {form.site.keys: form.arrays["w"] for form, _ in forms if form.kind == "whole"}
    parameters = Parameters(slots, base, trained)
    adapters = [(form, places) for form, places in forms if form.kind != "whole"]
    kind = next((form.kind for form, _ in adapters if form.kind != "rows"), "lora")
    known = _formats([form.site.method for form, _ in adapters])
    format = next(format for format in known if format.kind == kind)
    out = Written()
    targets = format.write(out, adapters, parameters, profile == "serving")
    wholes.write(out, parameters, targets, format.own_biases)
    return out


def _check_accounts(adapted: Adapted, out: Written) -> None:
    """Refuses to leave out a trained array: each must be an origin of some tensor in the folder.

    Leaves of which no matrix is in use have none.
    """
    told = {(line["leaf"], name) for lines in out.origins.values() for line in lines for name in line["fields"]}
    drawers = adapted.plan.shared_names()
    for site in adapted.plan.sites:
        if (active := site.method.active(paths.lookup(adapted.frozen, site.keys))) is not None and not np.any(active):
            continue
        own = [(site.path, name) for name in paths.lookup(adapted.params, site.keys)]
        shared = paths.lookup(adapted.params, (SHARED, drawers.get(site.method, "")))
        # What leaves share is in each leaf's tensors, or in one of its own, whose origin is no leaf.
        own += [(site.path, name) for name in shared if ("", name) not in told]
        for path, name in own:
            if (path, name) not in told:
                raise ValueError(
                    f"{path}: its trained array {name!r} has no place in the adapter; this is a bug of jlora"
                )


def _check_finite(out: Written, problem: str) -> None:
    """Refuses a tensor that holds NaN or infinity."""
    for key, tensor in out.tensors.items():
        if tensor.dtype.kind in "iu" or (finite := np.isfinite(tensor)).all():
            continue
        leaves = ", ".join(dict.fromkeys(f"{line['leaf']} ({', '.join(line['fields'])})" for line in out.origins[key]))
        raise ValueError(f"{leaves}: {key!r} {problem.format(value=float(tensor[~finite][0]))}")


def _write(directory: Path, out: Written, forms: list[tuple[Form, list[Slot]]], profile: str) -> None:
    # Imported here, so that `import jlora` doesn't import the models.
    from jlora.models.save import new_directory, write_json, write_safetensors

    with new_directory(directory) as place:
        file = Path(place) / TENSORS
        write_safetensors(out.tensors, str(file))
        _read_back(file, out)
        write_json(place, CONFIG, dict(sorted(out.config.items())))
        write_json(place, manifest.FILE, manifest.describe(out, forms, profile, manifest.sha256(file)))


def _read_back(file: Path, out: Written) -> None:
    """Refuses a file that does not read back as it was written, bit for bit."""
    with safe_open(file, framework="numpy") as handle:
        for key, tensor in out.tensors.items():
            if handle.get_tensor(key).tobytes() != tensor.tobytes():
                raise OSError(f"{file.name}: {key!r} reads back otherwise than it was written; the disk may be damaged")
