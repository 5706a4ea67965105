"""The walk over a jaxpr: equations that touch no adapted weight run as they are, the others go to a rule.

The rules are in the files beside it: `passthrough` for what only moves, cuts or casts a weight, `dot`, `lookup`,
`convolution` and `experts` for what uses it, `entering` for loops, branches and checkpoints. Where no rule applies, the
effective weight is formed and handed to the primitive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jlora import _compat
from jlora.core.products.update import Unfit
from jlora.core.protocol.method import Method
from jlora.core.protocol.readings import PRODUCTS, Reading
from jlora.core.walk import notes as notes_of
from jlora.core.walk import weight as weights
from jlora.core.walk.decoding import decoding
from jlora.core.walk.weight import Several, Weight

RULES: dict[str, Callable[..., Any]] = {}
#: Rules for leaves whose roles are being found out; they come before those of `RULES` (see `jlora.core.walk.probing`).
PROBES: dict[str, Callable[..., Any]] = {}


#: Primitives that a weight passes through; they may be run ahead of their turn.
PASSES: set[str] = set()

#: Primitives that run a program of their own, to which their operands go as they are.
INLINE = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat2",
    "checkpoint",
    "remat",
)
ENTERED = (*INLINE, "scan", "while", "cond", "shard_map")


def passes(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`rule`, for primitives that a weight passes through."""
    PASSES.update(names)
    return rule(*names)


def probes(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`rule`, for leaves whose roles are being found out; such a rule sees one of them at a time."""
    return rule(*names, registry=PROBES)


def rule(
    *names: str, registry: dict[str, Callable[..., Any]] = RULES
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function `(walk, eqn, *values) -> list of outputs, or None to fall back` for some primitives."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            registry[name] = function
        return function

    return register


_GATHER = (
    "What `shard_map` cuts along an axis that the method may not be cut along is to be gathered there before anything else, by "
    "jax.lax.all_gather(w, mesh_axis, axis=..., tiled=True) for each cut axis. "
)
#: What may be done about a weight that has to be formed, by primitive.
_HINTS = {"shard_map": _GATHER, "all_gather": _GATHER}


@dataclass
class Walk:
    """One pass over a function: what was asked of it, and what it saw.

    Attributes:
        strict: refuse to form an effective weight where its form of update is made to avoid that.
        plan: how dense products are computed (see `jlora.core.products.contraction.choose`).
        cuts: into how many pieces a mesh cuts the input of a leaf's product (see `jlora.lift`).
        rows: into how many pieces it cuts the rows of activations.
        runs: how many adapters of one base are mapped over (see `jlora.each_run`).
        seen: names of the leaves that were read.
        together: computes contractions that share an activation (see `jlora.core.walk.grouping`).
        observer: takes statistics of what products multiply weights with (see `jlora.observe`); None in a lift.
        says: whether what methods say beside a product is taken (see `jlora.lift`).
        taps: the statistics that the observer took so far, or what methods said.
        readings: how the leaves were read, where roles are being found out (see `jlora.sites`); None in a lift.
        origins: where the function's values come from, likewise (see `jlora.core.walk.origins`).
        notes: what the leaves of each layer were told so far (see `jlora.core.walk.notes`).
        spread: arrays that devices of a `shard_map` have alike though they count as different, as a product with a weight that
            differs wants it: by number, with what they were before.
    """

    strict: bool = False
    plan: str = "auto"
    cuts: Mapping[str, int] = field(default_factory=dict)
    rows: int = 1
    runs: int = 1
    seen: set[str] = field(default_factory=set)
    readings: list[Reading] | None = None
    together: Callable[[Walk, list[Any], Callable[[Any], Any]], list[list[Any]] | None] | None = None
    observer: Any = None
    says: bool = False
    taps: list[Any] = field(default_factory=list)
    origins: Any = None
    notes: notes_of.Notes = field(default_factory=dict)
    spread: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _uses: int = 0

    def aside(self, run: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """What `run` returns, and the taps made meanwhile: a traced body has to return them. What is told there stays there."""
        outer, self.taps = self.taps, []
        told, self.notes = self.notes, dict(self.notes)
        try:
            return run(), self.taps
        finally:
            self.taps, self.notes = outer, told

    def sealed(self, eqn: Any, run: Callable[[], Any]) -> Any:
        """What `run` returns, for a body that can't return taps.

        Raises:
            ValueError: where there are some, with leaf, primitive and source line.
        """
        result, taps = self.aside(run)
        if taps and self.observer is None:
            raise ValueError(
                f"aux: {taps[0].name} is used inside {_where(eqn)}, which can't return what its method says; lift without aux, "
                "or take the product out of there"
            )
        if taps:
            raise ValueError(
                f"observe: {taps[0].name} is used inside {_where(eqn)}, which can't return a statistic; leave it out "
                "with at=..., or take the product out of there"
            )
        return result

    @contextlib.contextmanager
    def on_one_device(self) -> Iterator[None]:
        """While the body of a `shard_map` is walked, whose rows are those of one device."""
        rows, self.rows = self.rows, 1
        try:
            yield
        finally:
            self.rows = rows

    def next_key(self, key: jax.Array | None, x: jax.Array | None = None) -> jax.Array | None:
        """A dropout key of its own for every use of a weight.

        For an input `x` that differs between the devices of a `shard_map` also for each of them, so that a row, or a feature,
        is dropped by itself; where devices have the same input, they drop the same.
        """
        self._uses += 1
        if key is None:
            return None
        key = jax.random.fold_in(key, self._uses)
        x = self.spread.get(id(x), (x, x))[1]
        for name in () if x is None else _compat.varying(x):
            key = jax.random.fold_in(key, jax.lax.axis_index(name))
        return key

    def materialise(self, value: Any, eqn: Any = None) -> Any:
        """A plain array for a value: itself, or the effective weight."""
        if self.readings is not None:
            for member in weights.members(value):
                if not member.lookups:
                    self.note(Reading(member.name, "other" if eqn is None else eqn.primitive.name))
            return getattr(value, "array", value) if isinstance(value, Weight | Several) else value
        if not isinstance(value, Weight):
            return value
        self.seen.add(value.name)
        if self.observer is not None:
            self.observer.check_formed(value, eqn, _where(eqn))
        if value.key is not None:
            raise ValueError(
                f"{value.name}: the effective weight has to be formed for {_where(eqn)}, and dropout can't act there. "
                "Set dropout=0 for this leaf, or give no dropout key"
            )
        if value.acts_alone:
            raise ValueError(
                f"{value.name}: {value.method} acts on the input of a product `x @ w`, and no weight in its place does the "
                f"same, as {_where(eqn)} needs one; leave this leaf out of the spec, or adapt it by another method"
            )
        if type(value.method).weight is Method.weight:
            raise TypeError(
                f"{value.name}: {_where(eqn)} needs the effective weight, and {value.method} gives none: let it "
                "have weight(view), or say mergeable = False"
            )
        if self.strict and value.method.form is not None and value.method.form.refuses_forming:
            name = "" if eqn is None else eqn.primitive.name
            raise ValueError(
                f"strict: the effective weight of {value.name}, shape {value.array.shape}, would have to be formed for "
                f"{_where(eqn)}. {_HINTS.get(name, '')}Use the weight in a product there, leave it out of the spec, or lift "
                "without strict"
            )
        return weights.effective(value)

    def evaluate(self, jaxpr: Any, consts: list[Any], args: list[Any]) -> list[Any]:
        """The outputs of a jaxpr; inputs may be `Weight`s, and outputs may be too."""
        return Frame(self, jaxpr, consts, args).run()

    def equation(self, eqn: Any, values: list[Any]) -> list[Any]:
        """The outputs of one equation."""
        if self.readings is not None:
            return self._probed(eqn, values)
        values = [self.materialise(value, eqn) if _is_whole(value) else value for value in values]
        if any(isinstance(value, Weight) for value in values):
            outputs = self.by_rule(eqn, values)
            if outputs is not None:
                return outputs
            values = [self.materialise(value, eqn) for value in values]
        outputs = bind(eqn, values)
        if eqn.primitive.name == "pvary":
            # Kept with the array itself, so that no other one has its number.
            self.spread |= {id(new): (new, old) for new, old in zip(outputs, values, strict=True)}
        return outputs

    def note(self, reading: Reading) -> None:
        """Adds a reading of a leaf."""
        assert self.readings is not None
        self.seen.add(reading.name)
        self.readings.append(reading)

    def forget(self, reading: Reading) -> None:
        """Takes back one reading that turned out to be another."""
        if self.readings is not None and reading in self.readings:
            self.readings.remove(reading)

    def _probed(self, eqn: Any, values: list[Any]) -> list[Any]:
        """The outputs of one equation where roles are being found out; each leaf is followed as if it were the only one."""
        if not any(isinstance(value, Weight | Several) for value in values):
            return bind(eqn, values)
        name = eqn.primitive.name
        if name in ENTERED:
            # `shard_map` takes arrays and single leaves.
            values = [self.materialise(v, eqn) if isinstance(v, Several) and name == "shard_map" else v for v in values]
            return RULES[name](self, eqn, *values)
        handler = PROBES.get(name) or RULES.get(name)
        plain = [value.array if isinstance(value, Weight | Several) else value for value in values]
        found: dict[int, list[Weight]] = {}
        for at, value in enumerate(values):
            for member in weights.members(value):
                results = handler and handler(self, eqn, *plain[:at], member, *plain[at + 1 :])
                if results is None:
                    self.materialise(member, eqn)
                for n, result in enumerate(results or ()):
                    found.setdefault(n, []).extend(weights.members(result))
        return [weights.joined(array, found.get(n, ())) for n, array in enumerate(bind(eqn, plain))]

    def by_rule(self, eqn: Any, values: list[Any]) -> list[Any] | None:
        """The outputs by the primitive's rule; None where there is none, or it does not apply."""
        handler = RULES.get(eqn.primitive.name)
        if handler is None:
            return None
        if eqn.primitive.name not in PRODUCTS:
            return handler(self, eqn, *values)
        # On a mesh with explicit axes: how the update's own products are cut is left to the compiler, the result's cut is kept.
        product = decoding(lambda *values: self.aside(lambda: handler(self, eqn, *values)), values)
        whole = lambda sharding: (sharding, PartitionSpec())  # noqa: E731  (what is said lies whole on every device)
        outputs, taps = _compat.automatic(product, eqn.outvars[0].aval, whole)(*values)
        self.taps += notes_of.kept(self.notes, taps)
        return outputs

    def arrays(self, values: list[Any], eqn: Any = None) -> list[Any]:
        """`materialise` over a list."""
        return [self.materialise(value, eqn) for value in values]


class Frame:
    """The values of one jaxpr while it is walked."""

    def __init__(self, walk: Walk, jaxpr: Any, consts: list[Any], args: list[Any]):
        """Args: the walk; the jaxpr; the values of its constants and inputs."""
        self.walk, self.jaxpr = walk, jaxpr
        self.env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        self.env.update(zip(jaxpr.invars, args, strict=True))
        self.done: dict[int, list[Any]] = {}  # outputs of equations that were run ahead of their turn
        self.defined = {var: index for index, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
        has_weights = any(isinstance(value, Weight) for value in self.env.values())
        self.groups = _sharing(jaxpr) if walk.together and has_weights else {}

    def run(self) -> list[Any]:
        """The outputs."""
        last = _last_uses(self.jaxpr)
        for index, eqn in enumerate(self.jaxpr.eqns):
            scope = str(eqn.source_info.name_stack)
            with jax.named_scope(scope) if scope else contextlib.nullcontext():
                self.env.update(zip(eqn.outvars, self._placed_outputs(index), strict=True))
            for var in last.get(index, ()):
                self.env.pop(var, None)
        return [self.read(atom) for atom in self.jaxpr.outvars]

    def _placed_outputs(self, index: int) -> list[Any]:
        """`outputs`, with the place of the equation in what a form of update refuses."""
        try:
            return self.outputs(index)
        except Unfit as error:
            raise ValueError(f"{error}, at {_where(self.jaxpr.eqns[index])}") from error

    def outputs(self, index: int) -> list[Any]:
        """The outputs of an equation, by itself or together with those that share its activation."""
        eqn = self.jaxpr.eqns[index]
        if self.walk.observer is not None and eqn.primitive.name in PRODUCTS:
            self.walk.observer.tap(self.walk, eqn, [self.read(atom) for atom in eqn.invars], _where(eqn))
        if self.walk.together and index in self.groups and index not in self.done:
            members = self.groups[index]
            found = self.walk.together(self.walk, [self.jaxpr.eqns[n] for n in members], self.ahead)
            self.done.update(zip(members, found or ()))
        if index in self.done:
            return self.done.pop(index)
        return self.walk.equation(eqn, [self.read(atom) for atom in eqn.invars])

    def read(self, atom: Any) -> Any:
        """The value of a variable or literal."""
        return atom.val if hasattr(atom, "val") else self.env[atom]

    def ahead(self, atom: Any) -> Any:
        """The value of a variable that is computed already; of a weight also ahead of its turn, through casts and the like.

        None for any other.
        """
        if hasattr(atom, "val") or atom in self.env:
            return self.read(atom)
        index = self.defined[atom]
        eqn = self.jaxpr.eqns[index]
        if not _passes(eqn):
            return None
        values = [self.ahead(each) for each in eqn.invars]
        if not any(isinstance(value, Weight) for value in values) or any(value is None for value in values):
            return None
        if index not in self.done:
            self.done[index] = self.walk.equation(eqn, values)
        return self.done[index][eqn.outvars.index(atom)]


def _sharing(jaxpr: Any) -> dict[int, list[int]]:
    """For the first of several contractions that share an operand, the indices of all of them."""
    by_operand: dict[Any, list[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive.name == "dot_general":
            for atom in eqn.invars:
                if not hasattr(atom, "val"):
                    by_operand.setdefault(atom, []).append(index)
    return {found[0]: found for found in by_operand.values() if len(found) > 1}


def _passes(eqn: Any) -> bool:
    """Whether a weight passes through an equation; of several operands all but one must be numbers."""
    arrays = sum(atom.aval.ndim > 0 for atom in eqn.invars)
    return eqn.primitive.name in PASSES and (arrays == 1 or eqn.primitive.name not in ("mul", "div"))


def _is_whole(value: Any) -> bool:
    """Whether a value is a leaf that its method replaces as a whole, so that there is no product to shorten."""
    return isinstance(value, Weight) and value.site is not None and not value.method.matrix


def bind(eqn: Any, values: list[Any], **changed: Any) -> list[Any]:
    """Runs an equation's primitive on plain arrays."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Which variables are used for the last time at each equation; eager calls free them there."""
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        last.update({atom: index for atom in eqn.invars if not hasattr(atom, "val")})
    for atom in jaxpr.outvars:
        if not hasattr(atom, "val"):
            last.pop(atom, None)
    uses: dict[int, list[Any]] = {}
    for var, index in last.items():
        uses.setdefault(index, []).append(var)
    return uses


def _where(eqn: Any) -> str:
    if eqn is None:
        return "the function's output"
    return f"`{eqn.primitive.name}` at {_compat.source_line(eqn)}"
