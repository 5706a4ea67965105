"""VeRA: one frozen random pair of projections for the whole tree, and two trained vectors a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import NOT_ZERO, check_hyperparameters, integer
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Factors, Method, Site, Start, View
from jlora.core.protocol.peft import Peft
from jlora.core.tree.placement import whole
from jlora.methods.lora import shared_dtype, trained_dtype


@dataclass(frozen=True)
class VeRA(Method):
    """Vector-based random matrix adaptation: `w + (A * d) @ (B * b)` with trained `d [rank]` and `b [out]`.

    `A` and `B` are the first `in` rows and the first `out` columns of one frozen random pair that all leaves of the method
    share, as large as the largest of them: `[max in, rank]` and `[rank, max out]`, uniform within `sqrt(6 / max in)` and
    `sqrt(6 / rank)`. `b` starts at zero, so the start is the base's output, and `d` alone has no gradient in the first
    step. Trains `rank + out` values a matrix, the fewest of all low-rank methods; ranks are therefore high.

    The pair is drawn from `projection_key` alone, so that adapters of one model that were trained apart share it. It lies
    in `adapted.frozen["~shared"]["VeRA"]`, and is saved with the adapters, since no generator is promised to stay the
    same forever. It lies whole on every device of a mesh; where `shard_map` cuts a leaf, the weight is formed, unless
    it is gathered there first.

    Worth trying where many adapters have to be kept. The vectors want a learning rate well above LoRA's.

    Args:
        rank: columns of `A`; may exceed the sides of the matrix.
        d_initial: the value that `d` starts at; the paper advises 0.1 or less.
        projection_key: the number that the shared pair is drawn from.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.VeRA(rank=256)})

    Reference:
        Kopiczko et al. 2023, arXiv:2310.11454; shapes, slices and starting values as in PEFT.
    """

    rank: int = 256
    d_initial: float = 0.1
    projection_key: int = 0
    dropout: float = 0.0

    family: ClassVar[str] = "Shared random projections"

    # Two vectors learn slowly: ten times LoRA's rate, within 1e-3 to 1e-2. That range is from memory, and no run here chose it.
    recipe: ClassVar[Recipe] = Recipe(rank=256, learning_rate=5e-3)

    def __post_init__(self) -> None:
        d_initial = (NOT_ZERO[0], "finite and not zero")
        bounds = {"rank": integer(1), "projection_key": integer(0), "d_initial": d_initial}
        check_hyperparameters(self, bounds=bounds, of=VeRA)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Those of the two vectors; the shared pair belongs to no leaf and has no roles."""
        return {"d": ("rank",), "b": ("out",)}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """The projections `A` and `B`."""
        return ("a", "b")

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Arrays:
        """Draws the projections for the largest input and the largest output, which may belong to different leaves."""
        # By a named generator, so that a user's default one changes nothing, and without `key`, which differs between adapters
        # that were trained apart and must share the projections.
        key_a, key_b = jax.random.split(jax.random.key(self.projection_key, impl="threefry2x32"))
        rows, columns = max(site.in_size for site in sites), max(site.out_size for site in sites)
        dtype = shared_dtype(sites)
        return {
            "a": _kaiming_uniform(key_a, (rows, self.rank), dtype),
            "b": _kaiming_uniform(key_b, (self.rank, columns), dtype),
        }

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`d` filled with `d_initial`, `b` zero; nothing is drawn here."""
        dtype = trained_dtype(w)
        return Start({"d": jnp.full(self.rank, self.d_initial, dtype), "b": jnp.zeros(w.shape[1], dtype)})

    def weight(self, view: View) -> jax.Array:
        """`w + (A * d) @ (B * b)`."""
        a, b = _slices(view)
        d, scale = view.params["d"], view.params["b"]
        return view.w.astype(d.dtype) + (a * d) @ (b * scale)

    def factors(self, view: View) -> Factors:
        """`A` and `d * B * b`: with both vectors on one side, the other has no gradient to compute."""
        a, b = _slices(view)
        # Gathered themselves where `b` is cut, and not the product with a matrix that every device has.
        d, scale = whole((view.params["d"], view.params["b"]))
        return Factors(a, d[:, None] * b * scale, dropout=self.dropout)

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft:
        """PEFT's VeRA, with its projections."""
        return Peft("vera", {name: params[name] for name in ("d", "b")}, dropout=self.dropout, shared=shared)


def _slices(view: View) -> tuple[jax.Array, jax.Array]:
    """The projections of one matrix: `A [in, rank]`, `B [rank, out]`."""
    rows, columns = view.w.shape
    dtype = view.params["d"].dtype
    return whole((view.shared["a"][:rows].astype(dtype), view.shared["b"][:, :columns].astype(dtype)))


def _kaiming_uniform(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Uniform within `sqrt(6 / shape[0])`, which is Kaiming's bound for a rectifier."""
    bound = math.sqrt(6 / shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


VeRA.CASES = (VeRA(rank=4), VeRA(rank=12, d_initial=0.5, projection_key=3, dropout=0.25))
