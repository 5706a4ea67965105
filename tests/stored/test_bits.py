"""Codes have the same bits however they are compiled, on every release of JAX; and once they are decoded, again."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coded import COLUMNS, ROWS, decode, encode, equal, named, normal

from jlora.stored import FP4, NF2, NF3, NF4, Float8, Int4, Int8, Uniform

pytestmark = pytest.mark.once

AGAIN = [NF4(32), NF3(32), NF2(32), Int4(32), Int8(), Float8(), Float8("e5m2")]


@named(AGAIN)
def test_a_decoded_matrix_has_the_same_fields_again(code):
    fields = encode(normal(ROWS, 100), code)
    jax.tree.map(equal, encode(decode(fields, code, ROWS, 100), code), fields)


@named([NF4(32, double=True), NF3(32), FP4(32), Int4(32), Int8(), Float8(), Uniform(2)])
def test_a_stack_is_coded_as_its_matrices(code):
    stack = np.stack([normal(seed=seed) for seed in range(2)])
    fields = jax.jit(jax.vmap(code.encode))(stack)
    decoded = jax.jit(jax.vmap(partial(code.decode, rows=ROWS, columns=COLUMNS)))(fields)
    for n in range(2):
        one = encode(stack[n], code)
        jax.tree.map(lambda own, field: equal(own[n], field), fields, one)
        equal(decoded[n], decode(one, code, ROWS, COLUMNS))


@named([NF4(32, double=True), FP4(32), Int4(32), Int8(), Float8(), Uniform(2)])
def test_without_jit_the_bits_are_the_same(code):
    w = jnp.asarray(normal())
    fields = code.encode(w)
    jax.tree.map(equal, fields, encode(w, code))
    equal(code.decode(fields, ROWS, COLUMNS), decode(fields, code, ROWS, COLUMNS))


@pytest.mark.once  # JAX 0.10 fuses what it is told to keep apart
@named([NF4(32, double=True), NF3(32), Int8(), Float8(), Uniform(2)])
def test_with_all_optimizations_the_bits_are_the_same(code):
    optimized = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    w = jnp.asarray(normal(512, 16))
    fields = encode(w, code)
    jax.tree.map(equal, optimized(code.encode)(w), fields)
    equal(optimized(partial(code.decode, rows=512, columns=16))(fields), decode(fields, code, 512, 16))
