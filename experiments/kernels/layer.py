"""What one layer's training step moves on a TPU with the low-rank kernels and without, compiled without a TPU.

    pip install -U "jax[tpu]"          (only its libtpu is needed: the compiler)
    python experiments/kernels/layer.py [--only NAME ..]                            a scanned layer on one v5e
    python experiments/kernels/layer.py --topology v5e:4x4 --depths 4               four layers on 16 chips, `fsdp=16`
    python experiments/kernels/layer.py --topology v5e:4x4 --depths 4 --attention none
    python experiments/kernels/layer.py --unrolled --depths 2 --attention none      two layers on one v5e, not scanned

The rule, written before anything was measured: the kernels are kept if a layer's training step moves at least 2 % fewer bytes
of HBM with them than with XLA's own products, everything that tiles read again included on both sides.

One sequence of 4,096 tokens a chip; Llama 3 in bfloat16, scanned and rematerialised, rank 16 on all linear weights, a
vocabulary of 4,096. A layer is the difference of programs with 8 and with 4 layers, divided by 4, so neither embedding nor
head nor loss is in it; with one depth there is the whole program alone. Two counts of HBM:

once        each instruction moves its operands and its result once (hlo.py), without what the compiler keeps on the chip.
with tiles  what an instruction reads again because of its tiles is counted as often as it is read. For XLA's products by the
            windows that the program names, in the order of loops that is best for XLA; for a kernel by its grid and blocks.

XLA knows nothing of what a kernel moves: both counts of kernels are arithmetic, from `Tiles.once` and `Tiles.bytes`, and all
their arrays count as in HBM. Cycles are the compiler's own estimate of fused products and sums; a kernel's are its passes
through the units of multiplication, as if nothing else took time.

bound      only the embedding's scale is trained.
jlora      as it is.
forward    `x @ w + (x @ a) @ b` by the kernel, and XLA's own products backward, from the `t` that the kernel gives.
both       forward and backward by the kernels; `da = x.T @ u` by XLA.

`--attention none` puts the sum of queries, keys and values in attention's place, which moves next to nothing, as a kernel of
attention would: what is left are the products and what lies between them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import hlo
import jax
import jax.numpy as jnp
import low_rank
import tpu_programs
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jlora.core.products import contraction
from jlora.core.products.backend import traced_for
from jlora.models import attention

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
VARIANTS = ("bound", "jlora", "forward", "both")
DEPTHS = (4, 8)
# Units of multiplication of a v5e, each 128 x 128, with one row a cycle.
UNITS = 4


class Once(hlo.Module):
    """A program in which a kernel moves what its name says."""

    count = "once"

    def _own(self, i: hlo.Instruction, around: dict[str, hlo.Instruction]) -> hlo.Tally:
        if is_kernel(i):
            return hlo.Tally(hbm_bytes=told(i)[self.count])
        return super()._own(i, around)


class Tiled(Once):
    """A program in which what tiles read again is counted as often as it is read."""

    count = "tiled"

    def _own(self, i: hlo.Instruction, around: dict[str, hlo.Instruction]) -> hlo.Tally:
        own = super()._own(i, around)
        own.hbm_bytes += self.again(i, around)
        return own

    def again(self, i: hlo.Instruction, around: dict[str, hlo.Instruction]) -> float:
        """Bytes of HBM that a fused product reads beyond its first time."""
        found = re.search(r'"iteration_bounds":\["(\d+)","(\d+)","(\d+)"\]', i.text)
        if i.op != "fusion" or not found:
            return 0.0
        across, rows, summed = (int(n) for n in found.groups())
        sizes, body = [0.0, 0.0], self.computations[i.called["calls"][0]]
        sides = self.sides(body)
        parameters = {int(p.text.split("parameter(")[1].split(")")[0]): p for p in body.values() if p.op == "parameter"}
        for number, name in enumerate(i.operands):
            shapes = around[name].shapes if name in around else ()
            read, _ = self._read(parameters[number], body)
            for side in sides.get(number, set()):
                sizes[side] += sum(s.bytes if read is None else min(read, s.bytes) for s in shapes if not s.on_chip)
        # Over the result's columns, then its rows: the left side comes again for every window of columns, the right one
        # for every window of rows unless those are all. Or the other way round.
        left, right = sizes
        return min(
            self._reread(left, across, right, rows, summed > 1), self._reread(right, rows, left, across, summed > 1)
        )

    @staticmethod
    def _reread(inner: float, outer: int, held: float, inside: int, summed: bool) -> float:
        """Bytes read again where the loop `outer` is the slowest: `inner` goes with the loop `inside`, `held` with `outer`."""
        again = (outer - 1) * inner if inside > 1 or summed else 0.0
        return again + ((inside - 1) * held if summed else 0.0)

    def sides(self, body: dict[str, hlo.Instruction]) -> dict[int, set[int]]:
        """For each parameter of a fused product, whether it is on the product's left (0) or right side (1)."""
        product = next((i for i in reversed(body.values()) if self._is_product(i)), None)
        if product is None:
            return {}
        if product.op == "fusion":
            inner = self.sides(self.computations[product.called["calls"][0]])
            roots = [(name, side) for n, name in enumerate(product.operands) for side in inner.get(n, ())]
        else:
            roots = list(zip(product.operands, (0, 1)))
        found: dict[int, set[int]] = {}
        for name, side in roots:
            for number in self._parameters(name, body):
                found.setdefault(number, set()).add(side)
        return found

    def _is_product(self, i: hlo.Instruction) -> bool:
        if i.op == "fusion":
            return any(self._is_product(j) for j in self.computations[i.called["calls"][0]].values())
        return i.op in ("convolution", "dot")

    @staticmethod
    def _parameters(name: str, body: dict[str, hlo.Instruction]) -> set[int]:
        seen, waiting, found = set(), [name], set()
        while waiting:
            one = waiting.pop()
            if one in seen or one not in body:
                continue
            seen.add(one)
            if body[one].op == "parameter":
                found.add(int(body[one].text.split("parameter(")[1].split(")")[0]))
            waiting += body[one].operands
        return found


class Cycles(hlo.Module):
    """A program's products and loops in the compiler's own estimate of cycles, in place of flops."""

    def _own(self, i: hlo.Instruction, around: dict[str, hlo.Instruction]) -> hlo.Tally:
        if is_kernel(i):
            return hlo.Tally(flops=told(i)["passes"] / UNITS)
        found = re.search(r'"estimated_cycles":"(\d+)"', i.text)
        return hlo.Tally(flops=float(found.group(1)) if found else 0.0)


def is_kernel(i: hlo.Instruction) -> bool:
    return i.op == "custom-call" and "low_rank_" in i.text


def told(i: hlo.Instruction) -> dict[str, int]:
    """What a kernel's name says of it."""
    found = re.search(r"low_rank_\w+?_once(\d+)_tiled(\d+)_passes(\d+)", i.text)
    if found is None:
        raise ValueError(f"a kernel that says nothing of its bytes: {i.text[:200]}")
    return dict(zip(("once", "tiled", "passes"), map(int, found.groups())))


@dataclass(frozen=True)
class Kernels:
    """How the products of a program are computed; static.

    Attributes:
        mesh: rows of activations are cut by its axis `fsdp`, and each chip has its own kernels, by `shard_map`.
        budget: bytes of VMEM.
        backward: whether the derivative has a kernel too.
    """

    mesh: Mesh
    budget: int
    backward: bool = True
    interpret: bool = False

    def tiles(
        self, kind: low_rank.Kind, x: jax.Array, w: jax.Array, a: jax.Array, rest: bool = False
    ) -> low_rank.Tiles:
        rows = x.shape[0] // self.mesh.shape["fsdp"], w.shape[0]
        return low_rank.choose(kind, rows, w.shape[1], a.shape[1], self.budget, x.dtype.itemsize, rest)

    def forward(self, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        fn = partial(low_rank.forward, tiles=self.tiles("forward", x, w, a), interpret=self.interpret)
        return self._on_each(fn, (True, False, False, False), (True, True))(x, w, a, b)

    def gradient(
        self, x: jax.Array, g: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, t: jax.Array, rest: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`(dx, u, db)`, the last summed over the chips."""
        tiles = self.tiles("backward", x, w, a, rest is not None)

        def fn(g: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, t: jax.Array, *rest: jax.Array) -> Any:
            dx, u, db = low_rank.backward(g, w, a, b, t, tiles, *rest, interpret=self.interpret)
            return dx, u, jax.lax.psum(db, "fsdp")

        more = () if rest is None else (rest,)
        cut = (True, False, False, False, True, *(True,) * len(more))
        return self._on_each(fn, cut, (True, True, False))(g, w, a, b, t, *more)

    def _on_each(self, fn: Callable[..., Any], cut: tuple[bool, ...], out: tuple[bool, ...]) -> Callable[..., Any]:
        specs = [tuple(P("fsdp") if one else P() for one in each) for each in (cut, out)]
        return jax.shard_map(fn, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def group(kernels: Kernels, x: jax.Array, weights: list, a: list, b: list) -> list[jax.Array]:
    """`x @ (w + a @ b)` for weights that share their input."""
    return _group_forward(kernels, x, weights, a, b)[0]


def _group_forward(kernels: Kernels, x: jax.Array, weights: list, a: list, b: list) -> Any:
    pairs = [kernels.forward(x, *each) for each in zip(weights, a, b)]
    return [y for y, _ in pairs], (x, weights, a, b, [t for _, t in pairs])


def _group_backward(kernels: Kernels, kept: Any, cotangents: list[jax.Array]) -> Any:
    x, weights, a, b, low = kept
    dx, thin, db = None, [], []
    for g, w, one, other, t in zip(cotangents, weights, a, b, low):
        if kernels.backward:
            dx, u, own = kernels.gradient(x, g, w, one, other, t, dx)
        else:
            u = contraction.matmul(g, other.T, g.dtype)
            own = contraction.matmul(t.T, g, jnp.float32)
            term = contraction.matmul(g, w.T, g.dtype) + contraction.matmul(u, one.T, g.dtype)
            dx = term if dx is None else dx + term
        thin.append(u)
        db.append(own.astype(other.dtype))
    together = contraction.matmul(jnp.concatenate(thin, axis=1).T, x, jnp.float32)
    ends = [sum(m.shape[1] for m in a[: n + 1]) for n in range(len(a))]
    da = [together[end - m.shape[1] : end].T.astype(m.dtype) for m, end in zip(a, ends)]
    return dx, [jnp.zeros_like(w) for w in weights], da, db


group.defvjp(_group_forward, _group_backward)


def products(kernels: Kernels) -> Callable[..., Any]:
    """What stands for `contraction.products`; refuses what the kernels don't do."""

    def product(x, weights, a, b, scales, constants, options):
        if any(scale is not None for scale in scales) or any(constants):
            raise ValueError("the kernels know neither scales nor constant columns")
        return contraction.in_rows(lambda x: group(kernels, x, list(weights), list(a), list(b)), x)

    return product


def no_attention(query: jax.Array, key: jax.Array, value: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """The sum of queries, keys and values."""
    shared = jnp.repeat(key + value, query.shape[2] // key.shape[2], axis=2)
    return (query + shared).reshape(*query.shape[:2], -1)


def measure(name: str, chip: str, topology: str, model: str, layers: int, scan: bool, o: Any) -> dict[str, Any]:
    """What a step of a model with so many layers moves on one chip."""
    dump = o.dump
    devices = tpu_programs.topology_devices(topology)
    devices = devices if topology != TOPOLOGIES[chip] else devices[:1]
    mesh = tpu_programs.make_mesh(devices, 1)
    config = replace(
        tpu_programs.model_config(model), num_hidden_layers=layers, vocab_size=4096, scan_layers=scan, remat=True
    )
    kind = "bound" if name == "bound" else "jlora"
    program = tpu_programs.Program(model, topology, 1, kind)
    start = time.perf_counter()
    instead = {"SCORES_OF_A_TPU": o.scores, **({} if o.attention == "jlora" else {"attend": no_attention})}
    with traced_for("tpu", len(devices)), mock.patch.multiple(attention, **instead):
        step = tpu_programs.make_step(program, config, mesh, len(devices))
        place = mock.patch.object(
            contraction, "products", products(Kernels(mesh, low_rank.BUDGETS[chip], name == "both"))
        )
        jitted = jax.jit(step.fn, donate_argnums=(1, 2))
        arguments = step.base, step.trained, step.state, step.tokens
        if name in ("forward", "both"):
            with place:
                lowered = jitted.lower(*arguments)
        else:
            lowered = jitted.lower(*arguments)
    compiled = lowered.compile(compiler_options=tpu_programs.WHOLE_PRODUCTS)
    text = compiled.as_text()
    if dump:
        (Path(dump) / f"{name}-{model}-{topology.replace(':', '-')}-{layers}.hlo").write_text(text)
    once, tiled = Once(text).tally(), Tiled(text).tally()
    return {
        "variant": name,
        "layers": layers,
        "once": once.hbm_bytes,
        "tiled": tiled.hbm_bytes,
        "cycles": Cycles(text).tally().flops,
        "temporary_mb": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    """Prints a line for each program, and then a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, default="v5e")
    parser.add_argument("--topology", help="such as v5e:4x4; one chip of the kind unless given")
    parser.add_argument("--model", choices=("8b", "70b"), default="8b")
    parser.add_argument("--unrolled", action="store_true", help="no scan over layers")
    parser.add_argument("--attention", choices=("jlora", "none"), default="jlora")
    parser.add_argument(
        "--scores", type=int, default=attention.SCORES_OF_A_TPU, help="scores of attention at a time on a chip"
    )
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="one number: the whole program")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--dump", help="a folder for the programs' texts")
    o = parser.parse_args()
    for name in o.only:
        rows = []
        for layers in o.depths:
            topology = o.topology or TOPOLOGIES[o.chip]
            rows.append(measure(name, o.chip, topology, o.model, layers, not o.unrolled, o))
            print(json.dumps(rows[-1]), flush=True)
        if len(rows) < 2:
            continue
        layer = {
            key: (rows[1][key] - rows[0][key]) / (o.depths[1] - o.depths[0]) for key in ("once", "tiled", "cycles")
        }
        print(json.dumps({"variant": name, "layer": {key: round(n / 1e6, 1) for key, n in layer.items()}}), flush=True)


if __name__ == "__main__":
    main()
