"""The shims for JAX's internals: each says which release it serves, goes when that release goes, and does what it says."""

import inspect
import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jlora import _compat

ROOT = Path(__file__).parents[1]
SHIMS = {name: f for name, f in inspect.getmembers(_compat, inspect.isfunction) if f.__module__ == _compat.__name__}


def version(text):
    return tuple(int(part) for part in text.split(".")[:2])


def floor():
    """The oldest JAX that `pyproject.toml` allows."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (jax_line,) = [line for line in wanted if re.match(r"jax\b(?!-)", line)]
    return version(re.search(r">=\s*([\d.]+)", jax_line)[1])


def needed_below(function):
    """The release from which a shim can go, or None where it says that all releases need it."""
    text = " ".join((function.__doc__ or "").split())
    if "Needed in every release" in text:
        return None
    stated = re.search(r"Needed below JAX (\d+\.\d+)", text)
    assert stated, f"_compat.{function.__name__} must say 'Needed below JAX x.y' or 'Needed in every release'"
    return version(stated[1])


@pytest.mark.parametrize("name", SHIMS)
def test_no_shim_has_outlived_the_release_that_it_serves(name):
    release = needed_below(SHIMS[name])
    assert release is None or floor() < release, (
        f"JAX's floor is {floor()}: delete the part of _compat.{name} for older ones"
    )


def test_some_shims_serve_older_releases_and_a_higher_floor_would_be_noticed():
    releases = [release for release in map(needed_below, SHIMS.values()) if release is not None]
    assert releases and all(floor() < release <= (99, 0) for release in releases)


def traced(f, *args):
    (eqn,) = jax.make_jaxpr(f)(*args).eqns
    return eqn


def test_a_scans_counts_are_read_on_the_installed_release():
    eqn = traced(
        lambda c, w, xs: jax.lax.scan(lambda c, x: ((c[0] @ w + x, c[0]), c[1]), (c, c), xs), *[jnp.ones((2, 2))] * 3
    )
    consts, carry = _compat.scan_counts(eqn.params)
    assert (consts, carry, len(eqn.invars)) == (1, 2, 4)
    installed = version(jax.__version__)
    assert ("num_consts" in eqn.params) == (installed < needed_below(_compat.scan_counts))


def test_the_body_of_every_higher_order_primitive_opens_on_the_installed_release():
    constant = jnp.arange(3.0)

    def f(x):
        return jnp.sin(x) + constant

    for eqn in (traced(jax.jit(f), constant), traced(jax.checkpoint(f), constant)):
        jaxpr, consts = _compat.open_jaxpr(eqn.params["jaxpr"])
        assert len(jaxpr.constvars) == len(consts)
        assert "sin" in [inner.primitive.name for inner in jaxpr.eqns]


def test_the_line_is_the_users():
    eqn = traced(lambda x: jnp.sin(x), 1.0)
    assert re.match(rf"{re.escape(__file__)}:\d+ \(.*<lambda>\)", _compat.source_line(eqn))


def test_both_kinds_of_keys_become_the_same_key():
    new, old = jax.random.key(3), jax.random.PRNGKey(3)
    assert _compat.typed_key(new) is new
    assert jnp.array_equal(jax.random.key_data(_compat.typed_key(old)), old)


def test_arrays_tracers_and_shapes_are_arrays_and_numbers_are_not():
    seen = []
    jax.eval_shape(lambda x: seen.append(_compat.is_array(x)), jnp.ones(1))
    assert seen == [True]
    assert _compat.is_array(jax.ShapeDtypeStruct((1,), jnp.float32)) and _compat.is_array(jnp.ones(1))
    assert not _compat.is_array(1.0) and not _compat.is_array("w")
