"""`sites`: how a function reads each of its weights, found by tracing it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jlora import _compat, paths
from jlora.core.protocol.readings import Leaf, Reading, Sites
from jlora.core.protocol.stored import Stored
from jlora.core.transforms.lift import run
from jlora.core.walk import output_head
from jlora.core.walk import weight as weights
from jlora.core.walk.interpreter import Walk


def sites(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Sites:
    """Traces a function once and reports, for every leaf of its first argument, how it is read.

    Nothing is computed: the arguments may be arrays or `jax.ShapeDtypeStruct`s. A weight is followed to its product through
    casts, transposes, reshapes, slices, and also through masks, scales, joins and permutations, which don't change what its
    axes mean. Pass the data as arguments: what the function closes over counts as a constant such as a mask.

    Args:
        fn: any JAX function whose first argument holds the params, such as a Flax model's `apply`.
        *args: its arguments; for Flax `{"params": params}, inputs`.
        **kwargs: its keyword arguments.

    Returns:
        A `Sites` for `adapterize(params, spec, sites=...)`.

    Raises:
        TypeError: where there is no first argument.

    Example:
        >>> report = jlora.sites(model.apply, {"params": params}, tokens)
        >>> adapted = jlora.adapterize(params, {jlora.ALL_LINEAR: jlora.LoRA(8)}, sites=report)
    """
    if not args:
        raise TypeError("sites(fn, params, ...) needs the function's arguments, the params first")
    first, _ = paths.flatten_with_keys(args[0])
    kept = [(keys, leaf) for keys, leaf in first if _compat.is_array(leaf)]
    names = ["/".join(keys) for keys, _ in kept]
    found, treedef = paths.flatten_with_keys((args, kwargs))
    leaves = [leaf for _, leaf in found]
    arrays = [_array(leaf) for leaf in leaves if _compat.is_array(leaf)]

    def call(*arrays: jax.Array) -> Any:
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(treedef, [next(given) if _compat.is_array(leaf) else leaf for leaf in leaves])
        return fn(*args, **kwargs)

    walk = Walk(readings=[])

    def probe(*arrays: jax.Array) -> Any:
        probes = [weights.probe(array, name) for name, array in zip(names, arrays)]
        return run(walk, lambda *params: call(*params, *arrays[len(names) :]), probes, must_read=False)

    jax.eval_shape(probe, *arrays)
    head = output_head.find(jax.make_jaxpr(call)(*arrays), names)
    by_name: dict[str, list[Reading]] = {}
    for reading in walk.readings or ():
        by_name.setdefault(reading.name, []).append(reading)
    return Sites(
        tuple(
            Leaf(keys, tuple(leaf.shape), tuple(by_name.get(name, ())), name in head, name in walk.origins.entered)
            for name, (keys, leaf) in zip(names, kept, strict=True)
        )
    )


def _array(leaf: Any) -> Any:
    """A leaf as something that can be traced; of one that is kept in another form its shape."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, Stored) else leaf
