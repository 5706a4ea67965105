"""JAX internals that differ between releases, each shim named after the release it serves.

Everything that touches the inside of a jaxpr goes through here, so a new JAX release is met in one file. A function says
"Needed below JAX x.y" where it goes when older releases go, or "Needed in every release"; a test fails when JAX's floor in
`pyproject.toml` has reached that release.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

# Frames of these packages are never what the user wrote.
_LIBRARIES = tuple(
    os.path.sep + name + os.path.sep for name in ("jax", "flax", "equinox", "haiku", "jlora", "einops", "optax")
)


def open_jaxpr(closed: Any) -> tuple[Any, list[Any]]:
    """Splits what an equation holds into (jaxpr, values of its constants).

    Needed below JAX 0.11. JAX 0.10 holds a `ClosedJaxpr` in most primitives and a bare `Jaxpr` in `remat2` and `shard_map`;
    from JAX 0.11 on it is a `Jaxpr` that carries its own constants everywhere.
    """
    return getattr(closed, "jaxpr", closed), list(getattr(closed, "consts", ()))


def live(jaxpr: Any) -> Any:
    """A jaxpr, and the bodies in it, without the equations whose results nobody uses; effects and inputs stay.

    Needed in every release: `partial_eval` is no stable interface. Below JAX 0.12 it keeps all that a `while` carries.
    """
    return partial_eval.dce_jaxpr(jaxpr, True, instantiate=True)[0]


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Number of constants and of carried values of a `scan` equation.

    Needed below JAX 0.11. JAX 0.10 states them; from JAX 0.11 on there is a tree of three groups (constants, carry, scanned
    inputs).
    """
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def is_unspecified(sharding: Any) -> bool:
    """Whether a `jit` equation's sharding says nothing.

    Needed in every release: JAX has no public name for that value.
    """
    return type(sharding).__name__ == "UnspecifiedValue"


def source_line(eqn: Any) -> str:
    """`file:line (function)` of the user's line that made an equation, or "an unknown line".

    Needed in every release: JAX's own summary is private.
    """
    traceback = eqn.source_info.traceback
    frames = [] if traceback is None else list(traceback.frames)
    mine = [f for f in frames if not any(name in f.file_name for name in _LIBRARIES)]
    if not mine:
        return "an unknown line"
    return f"{mine[0].file_name}:{mine[0].line_num} ({mine[0].function_name})"


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, a tracer or the shape of one (not a Python scalar).

    Needed in every release: the three have no common class.
    """
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def typed_key(key: jax.Array) -> jax.Array:
    """A new-style key array from either kind of key.

    Needed in every release that has both kinds.
    """
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def varying(x: jax.Array) -> tuple[str, ...]:
    """The axes of a `shard_map` with check_vma=True between whose devices an array differs, sorted.

    Needed in every release: the type that says so is not documented.
    """
    return tuple(sorted(jax.typeof(x).mat.varying))


def varying_as(x: jax.Array, *others: jax.Array) -> jax.Array:
    """An array that counts as different between all devices between which one of the others differs, as a loop's start must.

    Needed in every release: see `varying`.
    """
    more = sorted(set().union(*map(varying, others)) - set(varying(x)))
    return jax.lax.pcast(x, tuple(more), to="varying") if more else x


def explicit_sharding(aval: Any) -> Any:
    """The sharding of an abstract value that lies on a mesh with explicit axes, else None.

    Needed in every release: the kinds of axes are found by hand.
    """
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return None
    explicit = any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types)
    return sharding if explicit else None


def automatic(function: Callable[..., Any], aval: Any, out: Callable[[Any], Any] | None = None) -> Callable[..., Any]:
    """The function; where `aval` lies on a mesh with explicit axes, one that runs it with these axes automatic.

    Then what it computes on the way need not say how it is cut; only its results do.

    Needed in every release: a program with explicit axes must say how each sort, factorisation or product is cut.

    Args:
        function: of arrays.
        aval: the abstract value by which the mesh is known.
        out: from the sharding of `aval`, the partition specs of the results; by default they are cut as `aval` is.
    """
    sharding = explicit_sharding(aval)
    if sharding is None:
        return function
    return jax.sharding.auto_axes(function, out_sharding=sharding.spec if out is None else out(sharding))


def coordination_client() -> Any:
    """The client of the key-value store that the processes of `jax.distributed` share; None where none were joined.

    Needed in every release: JAX has no public name for it.
    """
    from jax._src import distributed

    return distributed.global_state.client
