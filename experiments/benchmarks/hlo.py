"""What an optimized HLO text says of one device's work: flops, bytes and collectives, loop bodies times their trips.

XLA's own `cost_analysis()` counts the body of a loop once, whatever its trips, so for a scanned stack it says little. The
rules here are XLA's: a product costs two flops a multiplication; every instruction moves its operands and its result once,
of a slice only the slice, and of a fusion only what goes in and out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# They only rename what is there, or their work is that of the computations they call.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "iota", "partition-id", "replica-id", "optimization-barrier", "add-dependency",
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")


@dataclass(frozen=True)
class Shape:
    """An array: its element type, its axes, and whether the compiler keeps it in on-chip memory."""

    dtype: str
    sizes: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> float:
        """Without padding."""
        digits = re.search(r"\d+", self.dtype)
        width = WIDTHS.get(self.dtype, int(digits.group()) / 8 if digits else 1)
        return width * math.prod(self.sizes)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]
    text: str


@dataclass
class Tally:
    """One device's work.

    Attributes:
        flops: of products and convolutions.
        bytes: moved by all instructions, as XLA counts them.
        hbm_bytes: the same without what stays in on-chip memory.
        collectives: {(kind, shape as text, bytes of one): how often}.
    """

    flops: float = 0.0
    bytes: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Counter = field(default_factory=Counter)

    def add(self, other: Tally, times: int = 1) -> None:
        """Adds another's work, done `times` times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.hbm_bytes += times * other.hbm_bytes
        for key, count in other.collectives.items():
            self.collectives[key] += times * count


class Module:
    """An optimized HLO module, parsed from its text."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._parse(text)
        self._done: dict[str, Tally] = {}
        self._started = {
            channel: name
            for name, body in self.computations.items()
            if any("AsyncCollectiveStart" in i.text for i in body.values())
            for channel in map(_channel, body.values())
            if channel
        }

    def _parse(self, text: str) -> None:
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" ") and (found := _NAME.search(line)):
                current = self.computations.setdefault(found.group(1), {})
                if line.startswith("ENTRY"):
                    self.entry = found.group(1)
            elif line.startswith("}"):
                current = None
            elif current is not None and " = " in line:
                instruction = _instruction(line)
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text holds no ENTRY computation: wanted compiled.as_text() of an optimized program")

    def tally(self, loops: bool = True) -> Tally:
        """The work of one call; without `loops` a loop's body counts once, as XLA's `cost_analysis` has it."""
        self._done = {}
        return self._tally(self.entry, loops)

    def _tally(self, name: str, loops: bool) -> Tally:
        if name in self._done:
            return self._done[name]
        total = Tally()
        for instruction in self.computations[name].values():
            if not self._continues(instruction, name):
                total.add(self._own(instruction, self.computations[name]))
            for role, names in instruction.called.items():
                trips = self.trips(instruction) if instruction.op == "while" and loops else 1
                for called in names:
                    inner = self._tally(called, loops)
                    fused = instruction.op in ("fusion", "reduce", "scatter", "sort", "map", "reduce-window")
                    if fused or (role == "to_apply" and instruction.op != "call"):
                        inner = Tally(flops=inner.flops, collectives=inner.collectives)
                    total.add(inner, trips)
        self._done[name] = total
        return total

    def _continues(self, i: Instruction, name: str) -> bool:
        """Whether it is a later part of a collective that was started elsewhere and runs beside other work."""
        return self._started.get(_channel(i) or "", name) != name

    def _own(self, i: Instruction, around: dict[str, Instruction]) -> Tally:
        own = Tally()
        kind = next((kind for kind in COLLECTIVES if i.op in (kind, kind + "-start")), None)
        if kind:
            shape = max((s for s in (*i.shapes, *self._inputs(i, around))), key=lambda s: s.bytes)
            many = [s for s in i.shapes if s.sizes and s.bytes] if i.op == kind else [shape]
            for one in many if len(many) > 1 else [shape]:
                own.collectives[_scattered(kind, i), f"{one.dtype}{list(one.sizes)}", int(one.bytes)] += 1
        if i.op == "dot":
            own.flops = _dot_flops(i, self._inputs(i, around))
        elif i.op == "convolution":
            own.flops = _convolution_flops(i, self._inputs(i, around))
        if i.op not in FREE and not i.op.endswith("-done") and i.op != "async-start":
            moved = list(self._moved(i, around))
            own.bytes = sum(size for size, _ in moved)
            own.hbm_bytes = sum(size for size, on_chip in moved if not on_chip)
        return own

    def _inputs(self, i: Instruction, around: dict[str, Instruction]) -> list[Shape]:
        return [shape for name in i.operands if name in around for shape in around[name].shapes]

    def _moved(self, i: Instruction, around: dict[str, Instruction]) -> Iterator[tuple[float, bool]]:
        """(bytes, on chip) of every array that an instruction reads or writes."""
        body = self.computations[i.called["calls"][0]] if i.op == "fusion" else None
        if body is not None:
            yield from self._fusion_moved(i, around, body)
        elif i.op in ("dynamic-slice", "slice", "gather"):
            yield from ((2 * s.bytes, s.on_chip) for s in i.shapes)
        elif i.op == "dynamic-update-slice":
            update = around[i.operands[1]].shapes[0]
            yield 2 * update.bytes, update.on_chip
        else:
            started = i.shapes[1:2] if i.op.endswith("-start") and len(i.shapes) > 1 else i.shapes
            yield from ((s.bytes, s.on_chip) for s in (*started, *self._inputs(i, around)))

    def _fusion_moved(
        self, i: Instruction, around: dict[str, Instruction], body: dict[str, Instruction]
    ) -> Iterator[tuple[float, bool]]:
        parameters = {int(p.text.split("parameter(")[1].split(")")[0]): p for p in body.values() if p.op == "parameter"}
        in_place = set()
        for name, outer in enumerate(i.operands):
            shapes = around[outer].shapes if outer in around else ()
            read, updated = self._read(parameters[name], body)
            in_place |= {s.sizes for s in shapes} if updated else set()
            for shape in shapes:
                yield (shape.bytes if read is None else min(read, shape.bytes)), shape.on_chip
        for shape, passed in zip(i.shapes, self._passed(body, len(i.shapes))):
            whole = shape.sizes not in in_place
            if not passed:
                yield (shape.bytes if whole else self._written(body, shape)), shape.on_chip

    def _passed(self, body: dict[str, Instruction], count: int) -> list[bool]:
        """Which results of a fusion are its parameters, handed on as they are."""
        root = _root(body)
        if root.op != "tuple":
            return [False] * count
        return [body[name].op == "parameter" or self._handed(body[name], body) for name in root.operands]

    def _handed(self, i: Instruction, body: dict[str, Instruction]) -> bool:
        return _channel(i) in self._started and not any("AsyncCollectiveStart" in j.text for j in body.values())

    def _read(self, parameter: Instruction, body: dict[str, Instruction]) -> tuple[float | None, bool]:
        """Bytes read of a fusion's parameter, None for all of it; and whether it is updated in place."""
        names, total, updated = {parameter.name}, 0.0, False
        for user in body.values():
            if not names & set(user.operands):
                continue
            if user.op in ("bitcast", "copy", "reshape") or (user.op == "fusion" and user.called):
                inner = self._read_inside(user, names)
                if user.op == "bitcast":
                    names.add(user.name)
                elif inner is None:
                    return None, updated
                else:
                    total += inner
            elif user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] in names:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.op == "dynamic-update-slice" and user.operands[0] in names:
                updated = True
            elif user.op != "tuple" and not self._handed(user, body):
                return None, updated
        return total, updated

    def _read_inside(self, user: Instruction, names: set[str]) -> float | None:
        if user.op != "fusion":
            return None
        body, total = self.computations[user.called["calls"][0]], 0.0
        for p in body.values():
            if p.op == "parameter" and user.operands[int(p.text.split("parameter(")[1].split(")")[0])] in names:
                read, _ = self._read(p, body)
                if read is None:
                    return None
                total += read
        return total

    def _written(self, body: dict[str, Instruction], shape: Shape) -> float:
        updates = [u for u in body.values() if u.op == "dynamic-update-slice" and u.shapes[0].sizes == shape.sizes]
        return sum(body[u.operands[1]].shapes[0].bytes for u in updates) or shape.bytes

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: what XLA found, or its counter's end divided by its step.

        Raises:
            ValueError: where the text tells neither.
        """
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
            return int(found.group(1))
        condition, body = self.computations[loop.called["condition"][0]], self.computations[loop.called["body"][0]]
        compared = [condition[name] for name in _root(condition).operands]
        counters = [int(i.text.split("index=")[1].split(",")[0]) for i in compared if i.op == "get-tuple-element"]
        ends = [end for i in compared if (end := _constant(i)) is not None]
        if "direction=LT" in _root(condition).text and len(counters) == len(ends) == 1:
            counted = body[_root(body).operands[counters[0]]]
            steps = [step for name in counted.operands if (step := _constant(body[name])) is not None]
            if counted.op == "add" and len(steps) == 1:
                return -(-ends[0] // steps[0])
        raise ValueError(
            f"the trips of loop {loop.name} can't be told from its condition {_root(condition).text[:160]}"
        )


def _root(body: dict[str, Instruction]) -> Instruction:
    return next(i for i in body.values() if i.text.lstrip().startswith("ROOT"))


def _constant(i: Instruction) -> int | None:
    found = re.search(r"[su]32\[\](?:\{[^}]*\})? constant\((\d+)\)", i.text)
    return int(found.group(1)) if found else None


def _instruction(line: str) -> Instruction:
    left, right = line.split(" = ", 1)
    cut = _closing(right) if right.startswith("(") else right.index(" ")
    kind, rest = right[:cut], right[cut:].lstrip()
    op, arguments = rest.split("(", 1)
    end = _closing("(" + arguments) - 2
    attributes = arguments[end:].split(", metadata=")[0]
    called = {role: tuple(_NAME.findall(names)) for role, names in _CALLED.findall(attributes)}
    name = left.replace("ROOT", "").strip().lstrip("%")
    return Instruction(name, op, tuple(shapes(kind)), tuple(_NAME.findall(arguments[:end])), called, line)


def _channel(i: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", i.text)
    return found.group(1) if found else None


def _closing(text: str) -> int:
    """Where the bracket that opens a text has been closed."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"a bracket is never closed in {text[:80]!r}")


def shapes(text: str) -> Iterator[Shape]:
    """The arrays that a type names."""
    for dtype, sizes, layout in _SHAPE.findall(text):
        yield Shape(dtype, tuple(int(n) for n in sizes.split(",") if n), "S(1)" in layout)


def _scattered(kind: str, i: Instruction) -> str:
    """TPU programs write a reduce-scatter as a fusion of an all-reduce and a slice of it."""
    return "reduce-scatter" if "all-reduce-scatter" in i.name else kind


def _dot_flops(i: Instruction, inputs: list[Shape]) -> float:
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)
    contracted = [inputs[0].sizes[int(axis)] for axis in axes.group(1).split(",") if axis] if axes else []
    return 2.0 * math.prod(i.shapes[0].sizes) * math.prod(contracted)


def _convolution_flops(i: Instruction, inputs: list[Shape]) -> float:
    """Multiplications with what is really there, neither padding nor holes: so XLA writes products with batch axes."""
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
    if found is None:
        raise ValueError(f"a convolution without dim_labels: {i.text[:120]}")
    left, kernel, out = found.groups()
    x, w, y = inputs[0].sizes, inputs[1].sizes, i.shapes[0].sizes
    total = 2.0 * y[out.index("b")] * y[out.index("f")] * w[kernel.index("i")]
    for n, spatial in enumerate(sorted(c for c in out if c.isdigit())):
        sizes = x[left.index(spatial)], w[kernel.index(spatial)], y[out.index(spatial)]
        total *= _valid(*sizes, *(_window(i.text, part, n, default) for part, default in _WINDOW_PARTS))
    return total


_WINDOW_PARTS = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))


def _window(text: str, part: str, n: int, default: int) -> int:
    found = re.search(rf"window=\{{[^}}]*\b{part}=([\d_x\-]+)", text)
    return int(found.group(1).split("x")[n].split("_")[0]) if found else default


def _valid(size: int, kernel: int, out: int, stride: int, pad: int, holes: int, spread: int) -> int:
    """Pairs of a result and a kernel position that meet an element of the input."""
    reach = (size - 1) * holes
    positions = (at * stride - pad + k * spread for at in range(out) for k in range(kernel))
    return sum(0 <= position <= reach and position % holes == 0 for position in positions)
