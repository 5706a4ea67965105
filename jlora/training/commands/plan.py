"""What a run would take of each chip, found from a `config.json` before there are weights or chips."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jlora
from jlora import paths
from jlora.core.products.backend import traced_for
from jlora.core.tree.adapted import count
from jlora.disk.json_files import read_object
from jlora.models.config import read_config
from jlora.models.gguf.header import is_gguf
from jlora.training.commands.chips import Chip, NoCompilerError, described
from jlora.training.hosts.placement import base_shardings, check_batch, check_slices, mesh_of, row_parts, rows_of_batch
from jlora.training.model.loop import State, make_step
from jlora.training.model.selection import trace_sites
from jlora.training.model.subject import Subject, abstract_subject, known_formats, model_directory
from jlora.training.run.continued import shown_adapters, source_of
from jlora.training.run.schedule import make_optimizer
from jlora.training.settings.axes import ROWS, mesh_axes, shard_rules
from jlora.training.settings.defaults import count_steps
from jlora.training.settings.fields import Settings

# Batches of data where no number of steps is given; it changes nothing but when schedules change.
_BATCHES = 100


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run as shapes that lie on a mesh.

    Attributes:
        settings: resolved, with steps counted.
        subject: the model, its params shapes.
        formats: where the base's number format is known from.
        chip: the kind of chip.
        mesh: of described chips, or an abstract one where their compiler is missing.
        adapted: the base with adapters.
        state: what changes from step to step.
        missing: what is missing to compile the step, or None.
    """

    settings: Settings
    subject: Subject
    formats: str
    chip: Chip
    mesh: Any
    adapted: jlora.Adapted
    state: State
    missing: str | None

    def compiled(self) -> tuple[int, int]:
        """Bytes on a chip of the compiled step: its arguments, and what it needs besides.

        Raises:
            jax.errors.JaxRuntimeError: by compilers that refuse what does not fit.
        """
        settings, mesh = self.settings, self.mesh
        assert settings.batch and settings.max_length
        cuts = jlora.mesh.cuts(self.adapted, set(mesh.shape) - set(ROWS))
        tx = _optimizer(self.adapted, settings)
        step = make_step(self.subject.forward, tx, self.state, cuts, row_parts(mesh))
        sizes = (settings.accumulate, settings.batch // settings.accumulate, settings.max_length)
        place = rows_of_batch(mesh, 1)
        whole = dict.fromkeys(("tokens", "positions", "segment_ids", "targets"), jnp.int32) | {"weights": jnp.float32}
        batch = {name: jax.ShapeDtypeStruct(sizes, dtype, sharding=place) for name, dtype in whole.items()}
        with traced_for(mesh.devices.flat[0].platform, mesh.size):
            lowered = step.lower(self.state, self.adapted.replace(params={}), batch)  # pyright: ignore[reportFunctionMemberAccess]
        memory = lowered.compile(compiler_options=self.chip.options or None).memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes, new + memory.temp_size_in_bytes


def make_plan(settings: Settings, chip: Chip, slices: int) -> Plan:
    """The plan of (resolved) settings; nothing is read but `config.json`, and headers of weights where there are any.

    Raises:
        SettingError: for a mesh that can't cut the model or the batch, or that no chips of this kind make.
        ValueError: for a model that is no language model, or a file that is not right.
        OSError: if there is no such model.
    """
    settings, config = _found(settings)
    if config.get("model_type") in ("bert", "roberta"):
        raise ValueError(f"{model_directory(settings)} is an encoder; a plan is for language models")
    source_of(settings)
    axes = mesh_axes(settings.mesh) or {"data": 1}
    mesh, missing = _mesh(axes, chip, slices)
    assert settings.batch is not None
    settings = count_steps(settings, _BATCHES * settings.batch, row_parts(mesh))
    assert settings.batch is not None
    check_batch(mesh, settings.batch, settings.accumulate)
    formats, source = known_formats(settings, config)
    subject = abstract_subject(settings, cast(Any, None), config, (), formats)
    places = base_shardings(subject.params, mesh, shard_rules(settings.shard))
    subject = dataclasses.replace(subject, params=jax.tree.map(_shape, subject.params, places))
    adapted = shown_adapters(subject, settings, trace_sites(subject, settings))
    whole = NamedSharding(mesh, PartitionSpec())
    adapted = adapted.replace(
        **{drawer: jax.tree.map(lambda leaf: _shape(leaf, leaf.sharding or whole), getattr(adapted, drawer))
           for drawer in ("params", "frozen")}
    )  # fmt: skip
    return Plan(settings, subject, source, chip, mesh, adapted, _state(adapted, settings, whole), missing)


def _found(settings: Settings) -> tuple[Settings, dict[str, Any]]:
    """The settings with the model's directory, and its config, which alone may be given."""
    path = model_directory(settings)
    if path.is_file() and not is_gguf(path):
        return dataclasses.replace(settings, model=str(path.parent)), read_object(path)
    return settings, read_config(path)


def _mesh(axes: dict[str, int], chip: Chip, slices: int) -> tuple[Any, str | None]:
    """The mesh of described chips; where their compiler is missing an abstract one, and what is missing."""
    chips = math.prod(axes.values())
    check_slices(axes, slices)
    try:
        return mesh_of(axes, described(chip, chips, slices)), None
    except NoCompilerError as error:
        return AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes)), str(error)


def _shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _optimizer(adapted: jlora.Adapted, settings: Settings) -> optax.GradientTransformation:
    """The run's optimizer; rules that take numbers from constants, as LoRAFA's does, get zeros."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), adapted.frozen)
    return make_optimizer(adapted.replace(frozen=zeros), settings)


def _state(adapted: jlora.Adapted, settings: Settings, whole: NamedSharding) -> State:
    """The first state; an array of the optimizer's that is named and shaped as a trained one lies as that does."""
    trained = dict(paths.flatten_with_keys(adapted.params)[0])

    def place(keys: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        like = next((trained[keys[n:]] for n in range(len(keys)) if keys[n:] in trained), None)
        return _shape(leaf, like.sharding if like is not None and like.shape == leaf.shape else whole)

    found = jax.eval_shape(_optimizer(adapted, settings).init, adapted.params)
    flat, treedef = paths.flatten_with_keys(found)
    opt_state = jax.tree.unflatten(treedef, [place(keys, leaf) for keys, leaf in flat])
    step, key = jax.eval_shape(lambda: (jnp.zeros((), jnp.int32), jax.random.key(0)))
    rest: Any = (_shape(step, whole), _shape(key, whole))
    return State(adapted.params, opt_state, *rest)


def bytes_on_chip(tree: Any) -> int:
    """Bytes of a tree of shapes on each chip that its arrays are cut over."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def report(plan: Plan) -> tuple[str, bool]:
    """The plan in words and tables, and whether a chip's memory is known to be too small."""
    counted = {
        "weights": bytes_on_chip(plan.adapted.base),
        "adapters": bytes_on_chip(plan.adapted.params),
        "constants of adapters": bytes_on_chip(plan.adapted.frozen),
        "optimizer": bytes_on_chip(plan.state.opt_state),
    }
    rows: list[tuple[str, float, str]] = [(name, size, "counted") for name, size in counted.items() if size]
    total, known, note = float(sum(counted.values())), "so far, the step not counted", f"not counted: {plan.missing}"
    if plan.missing is None:
        arguments, besides, note = _step(plan)
        total, known = arguments + besides, ""
        if math.isfinite(total):
            rows.append(("these and a batch, in tiles", arguments, f"as XLA compiles the step for {plan.chip.name}"))
            rows.append(("activations, gradients, buffers", besides, "likewise"))
    large = total > plan.chip.memory
    verdict = "does not fit" if large else f"fits {known}".strip()
    rows.append(("in all", total, f"of {plan.chip.memory / 1e6:,.0f}: {verdict}"))
    lines = [f"  {name:<31}  {size / 1e6:>11,.3f}  {what}" for name, size, what in rows]
    parts = [_head(plan), weights_table(plan), "\n".join(["MB a chip:", *lines]), note, _KNOWN]
    return "\n\n".join(filter(None, parts)), large


_KNOWN = (
    "Counted is what shapes and cuts say. A plan knows nothing of validation, of the samples before and after, of what a\n"
    "chip's runtime keeps for itself, and of hyperparameters and starts that are measured in the data."
)


def _step(plan: Plan) -> tuple[float, float, str]:
    """Bytes of the step's arguments and of what it needs besides; without end where the compiler refuses, with its words."""
    try:
        return *plan.compiled(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        words = " ".join(str(error).split())[:300]
        return math.inf, math.inf, f"XLA's compiler for {plan.chip.name} finds no program that fits: {words}"


def _head(plan: Plan) -> str:
    settings, mesh = plan.settings, plan.mesh
    held = ", ".join(sorted({str(leaf.dtype) for leaf in paths.leaves(plan.adapted.base)}))
    rows = settings.batch // settings.accumulate // row_parts(mesh) if settings.batch else 0
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return "\n".join(
        [
            f"model {model_directory(settings)}, {count(plan.adapted.base):,} parameters in {held} ({plan.formats})",
            f"mesh  {axes}: {mesh.size:,} chips of {plan.chip.name}, {rows:,} of {settings.batch:,} rows of "
            f"{settings.max_length:,} tokens on a chip at once",
            jlora.summary(plan.adapted),
        ]
    )


def weights_table(plan: Plan) -> str:
    """How the base is cut: a line for each path (layers of one kind together), with shape, cut and bytes on a chip."""
    found: dict[tuple[str, ...], list[int]] = {}
    for keys, leaf in paths.flatten_with_keys(plan.adapted.base)[0]:
        pattern = re.sub(r"(?<=_)\d+(?=/)", "*", "/".join(keys))
        kept = str(leaf.code) if isinstance(leaf, jlora.Stored) else str(leaf.dtype)
        spec = tuple(leaf.sharding.spec)
        entries = (*spec, *[None] * (leaf.ndim - len(spec)))
        cut = ", ".join(
            "-" if each is None else "+".join([each] if isinstance(each, str) else each) for each in entries
        )
        row = (pattern, "x".join(map(str, leaf.shape)), kept, cut if any(entries) else "whole")
        found.setdefault(row, []).append(bytes_on_chip(leaf))
    rows: list[tuple[str, ...]] = [("path", "shape", "kept as", "cut by", "MB a chip", "")]
    for row, sizes in found.items():
        rows.append((*row, f"{sum(sizes) / 1e6:,.3f}", f"all {len(sizes)}" if len(sizes) > 1 else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  "
        + "  ".join(cell.rjust(w) if n == 4 else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
    return "\n".join(["how the weights are cut:", *lines])
