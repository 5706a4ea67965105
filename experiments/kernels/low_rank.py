"""The low-rank product and its derivative as one TPU kernel each (Pallas, Mosaic).

    forward     y = x @ w + t @ b, t = x @ a        x [T, K], w [K, N], a [K, r], b [r, N]
    backward    dx = g @ w.T + u @ a.T (+ rest), u = g @ b.T, db = t.T @ g        g [T, N]

What is left to the caller is `da = x.T @ u`. Each kernel reads `x`, or `g`, for the wide and the thin products at once, and
adds the low-rank part to the wide one's tile in float32, so that neither is written apart. Tiles are `(m, n, k)` pieces of
`T`, `N` and `K`; they are chosen for the fewest bytes between the kernel and HBM (`Tiles.bytes`) that the chip's VMEM allows.

A TPU stores rows of 128 values, so `t` and `u` take `T * 128` values there, and are counted so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MIB = 2**20
# VMEM of one core (v5e 128 MiB, v5p 64 MiB), less what the compiler keeps for itself and for the arrays around.
BUDGETS = {"v5e": 110 * MIB, "v5p": 52 * MIB}
SLACK = 10 * MIB
# Rows of a tile that are multiplied at a time; the compiler writes each such product out.
ROWS = 512
# A grid of fewer steps has nothing to fetch while it computes.
STEPS = 8
# Values of a tile of `w`; the compiler takes ten times as long for 2**24.
WEIGHTS = 2**22
Kind = Literal["forward", "backward"]
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


@dataclass(frozen=True)
class Block:
    """One array of a kernel, as the pieces in which it comes or goes.

    Attributes:
        shape: of a piece.
        loops: the loops of the grid by which its index goes.
        width: bytes of a value.
    """

    shape: tuple[int, int]
    loops: tuple[int, ...]
    width: int

    @property
    def bytes(self) -> int:
        """In a TPU's memory, with rows filled up to whole lanes."""
        return self.width * self.shape[0] * -(-self.shape[1] // LANES) * LANES


@dataclass(frozen=True)
class Tiles:
    """A kernel's tiles `(m, n, k)` for `x [T, K]` and `w [K, N]`, what they move, and the VMEM they take; static.

    Attributes:
        kind: the forward grid goes over (T, N, K), the last fastest, the backward one over (T, K, N).
        rest: whether the backward kernel adds its `dx` to another.
    """

    kind: Kind
    tokens: int
    rows: int
    columns: int
    rank: int
    m: int
    n: int
    k: int
    width: int = 2
    rest: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        across, along = self.columns // self.n, self.rows // self.k
        return (self.tokens // self.m, *((across, along) if self.kind == "forward" else (along, across)))

    @property
    def blocks(self) -> dict[str, Block]:
        """What comes and goes, by name."""
        m, n, k, r, wide = self.m, self.n, self.k, self.rank, self.width
        if self.kind == "forward":
            return {
                "x": Block((m, k), (0, 2), wide),
                "w": Block((k, n), (2, 1), wide),
                "a": Block((r, k), (2,), wide),
                "b": Block((r, n), (1,), wide),
                "y": Block((m, n), (0, 1), wide),
                "t": Block((m, r), (0,), wide),
            }
        blocks = {
            "g": Block((m, n), (0, 2), wide),
            "w": Block((k, n), (1, 2), wide),
            "a": Block((r, k), (1,), wide),
            "b": Block((r, n), (2,), wide),
            "t": Block((m, r), (0,), wide),
            "dx": Block((m, k), (0, 1), wide),
            "u": Block((m, r), (0,), wide),
            "db": Block((r, self.columns), (), 4),
        }
        return blocks | ({"rest": Block((m, k), (0, 1), wide)} if self.rest else {})

    def times(self, block: Block) -> int:
        """How often a piece comes or goes: whenever its index changes."""
        changing = [loop for loop in block.loops if self.grid[loop] > 1]
        return math.prod(self.grid[: max(changing) + 1]) if changing else 1

    @property
    def bytes(self) -> int:
        """Between HBM and the kernel, all that is read more than once included."""
        return sum(self.times(block) * block.bytes for block in self.blocks.values())

    @property
    def once(self) -> int:
        """The same if each array came or went once."""
        sizes = (math.prod(self.grid[loop] for loop in block.loops) * block.bytes for block in self.blocks.values())
        return sum(sizes)

    @property
    def vmem(self) -> int:
        """Pieces, twice where the next one comes while one is worked on, sums in float32, and the rows that are worked on."""
        pieces = sum(block.bytes * self.buffers(block) for block in self.blocks.values())
        wide = self.n if self.kind == "forward" else self.k
        sums = 4 * self.m * (wide if self.grid[2] > 1 else 0)
        return pieces + sums + 4 * self.m * LANES + 8 * min(ROWS, self.m) * wide

    def buffers(self, block: Block) -> int:
        return 1 if self.times(block) == 1 else 2

    @property
    def passes(self) -> int:
        """Rows that pass through a 128 x 128 unit of multiplication; a thin side counts as 128."""
        thin = (self.rows + self.columns) + (self.columns if self.kind == "backward" else 0)
        return self.tokens * (self.rows * self.columns + LANES * thin) // LANES**2

    @property
    def flops(self) -> int:
        thin = self.rank * (self.rows + self.columns) + (self.rank * self.columns if self.kind == "backward" else 0)
        return 2 * self.tokens * (self.rows * self.columns + thin)


def pieces(size: int, least: int) -> list[int]:
    """Divisors of a size that are multiples of `least`."""
    return [d for d in range(least, size + 1, least) if size % d == 0]


def candidates(kind: Kind, x: tuple[int, int], columns: int, rank: int, width: int, rest: bool) -> Iterator[Tiles]:
    tokens, rows = x
    for m, n, k in itertools.product(pieces(tokens, 256), pieces(columns, LANES), pieces(rows, LANES)):
        if min(n, k) >= 256 and n * k <= WEIGHTS:
            yield Tiles(kind, tokens, rows, columns, rank, m, n, k, width, rest)


def choose(
    kind: Kind, x: tuple[int, int], columns: int, rank: int, budget: int, width: int = 2, rest: bool = False
) -> Tiles:
    """The tiles that move the fewest bytes within the budget of VMEM; of equal ones those with the fewest steps.

    Raises:
        ValueError: where no tiles divide the shapes and fit.
    """
    found = [
        t for t in candidates(kind, x, columns, rank, width, rest) if t.vmem <= budget and math.prod(t.grid) >= STEPS
    ]
    if not found:
        raise ValueError(
            f"no tiles for x {x} and w {(x[1], columns)} within {budget} bytes of VMEM: wanted tokens that 256 divides, "
            f"and sides of w that tiles of at least 256, multiples of {LANES}, divide"
        )
    return min(found, key=lambda t: (t.bytes, math.prod(t.grid), -t.n * t.k))


def forward(
    x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, tiles: Tiles, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`(x @ w + t @ b, t)` with `t = x @ a`, all sums in float32; `t` is rounded to the dtype of `x` before it meets `b`."""
    blocks = tiles.blocks
    last = tiles.grid[2] - 1

    def kernel(x, w, a, b, y, t, total, low):
        across, along = pl.program_id(1), pl.program_id(2)

        def part(at: Any) -> None:
            rows = pl.ds(at * step, step)
            piece = x[rows, :]

            @pl.when(across == 0)
            def _() -> None:
                thin = jax.lax.dot_general(piece, a[...], NT, preferred_element_type=jnp.float32)
                low[rows, :] = thin if last == 0 else jnp.where(along == 0, 0.0, low[rows, :]) + thin

            wide = jnp.dot(piece, w[...], preferred_element_type=jnp.float32)
            if last:
                wide = jnp.where(along == 0, 0.0, total[rows, :]) + wide
                total[rows, :] = wide

            @pl.when(along == last)
            def _() -> None:
                thin = low[rows, :].astype(t.dtype)
                t[rows, :] = thin
                y[rows, :] = (wide + jnp.dot(thin, b[...], preferred_element_type=jnp.float32)).astype(y.dtype)

        step = min(ROWS, tiles.m)
        _each(tiles.m // step, part)

    specs = {name: _spec(tiles, block) for name, block in blocks.items()}
    return _call(
        tiles,
        kernel,
        [specs[name] for name in "xwab"],
        [specs[name] for name in "yt"],
        [jax.ShapeDtypeStruct((tiles.tokens, n), x.dtype) for n in (tiles.columns, tiles.rank)],
        [(tiles.m, tiles.n) if last else (8, LANES), (tiles.m, tiles.rank)],
        interpret,
    )(x, w, a.T, b)


def backward(
    g: jax.Array,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    t: jax.Array,
    tiles: Tiles,
    rest: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(g @ w.T + u @ a.T + rest, u, t.T @ g)` with `u = g @ b.T`; the last in float32, the others in the dtype of `g`."""
    blocks = tiles.blocks
    last = tiles.grid[2] - 1

    def kernel(g, w, a, b, t, *others):
        rest, (dx, u, db, total, low) = (others[0], others[1:]) if tiles.rest else (None, others)
        block, across, along = (pl.program_id(n) for n in range(3))

        def part(at: Any) -> None:
            rows = pl.ds(at * step, step)
            piece = g[rows, :]

            @pl.when(across == 0)
            def _() -> None:
                thin = jax.lax.dot_general(piece, b[...], NT, preferred_element_type=jnp.float32)
                low[rows, :] = thin if last == 0 else jnp.where(along == 0, 0.0, low[rows, :]) + thin
                columns = pl.ds(pl.multiple_of(along * tiles.n, LANES), tiles.n)
                own = jax.lax.dot_general(t[rows, :], piece, TN, preferred_element_type=jnp.float32)
                db[:, columns] = jnp.where((block == 0) & (at == 0), 0.0, db[:, columns]) + own

            wide = jax.lax.dot_general(piece, w[...], NT, preferred_element_type=jnp.float32)
            if last:
                wide = jnp.where(along == 0, 0.0, total[rows, :]) + wide
                total[rows, :] = wide

            @pl.when(along == last)
            def _() -> None:
                thin = low[rows, :].astype(u.dtype)
                u[rows, :] = thin
                result = wide + jnp.dot(thin, a[...], preferred_element_type=jnp.float32)
                if rest is not None:
                    result = result + rest[rows, :].astype(jnp.float32)
                dx[rows, :] = result.astype(dx.dtype)

        step = min(ROWS, tiles.m)
        _each(tiles.m // step, part)

    specs = {name: _spec(tiles, block) for name, block in blocks.items()}
    more = ["rest"] if tiles.rest else []
    shapes = [(tiles.tokens, tiles.rows), (tiles.tokens, tiles.rank), (tiles.rank, tiles.columns)]
    return _call(
        tiles,
        kernel,
        [specs[name] for name in ("g", "w", "a", "b", "t", *more)],
        [specs[name] for name in ("dx", "u", "db")],
        [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, (g.dtype, g.dtype, jnp.float32))],
        [(tiles.m, tiles.k) if last else (8, LANES), (tiles.m, tiles.rank)],
        interpret,
    )(g, w, a.T, b, t, *([rest] if tiles.rest else []))


def _each(count: int, part: Any) -> None:
    """`part(0)`, `part(1)`, .. in a loop of the kernel."""
    if count == 1:
        part(0)
    else:
        jax.lax.fori_loop(0, count, lambda at, _: part(at), None)


def _spec(tiles: Tiles, block: Block) -> pl.BlockSpec:
    loops = (*block.loops, *(None,) * (2 - len(block.loops)))
    if len(block.loops) == 1:
        # Of the arrays with one loop, `t` and `u` are cut by their rows, `a` and `b` by their columns.
        loops = (0, None) if block.loops == (0,) else (None, block.loops[0])

    def index(*at: Any) -> tuple[Any, ...]:
        return tuple(0 if loop is None else at[loop] for loop in loops)

    return pl.BlockSpec(block.shape, index, pipeline_mode=pl.Buffered(tiles.buffers(block)))


def _call(
    tiles: Tiles,
    kernel: Any,
    inputs: list[pl.BlockSpec],
    outputs: list[pl.BlockSpec],
    shapes: list[jax.ShapeDtypeStruct],
    sums: list[tuple[int, int]],
    interpret: bool,
) -> Any:
    return pl.pallas_call(
        kernel,
        grid=tiles.grid,
        in_specs=inputs,
        out_specs=outputs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=tiles.vmem + SLACK
        ),
        cost_estimate=pl.CostEstimate(flops=tiles.flops, bytes_accessed=tiles.bytes, transcendentals=0),
        name=f"low_rank_{tiles.kind}_once{tiles.once}_tiled{tiles.bytes}_passes{tiles.passes}",
        interpret=interpret,
    )
