"""What tests of codes have in common: jitted encoding and decoding, and normal matrices."""

from functools import partial

import jax
import numpy as np
import pytest

ROWS, COLUMNS = 128, 6
equal = np.testing.assert_array_equal
encode = jax.jit(lambda w, code: code.encode(w), static_argnames="code")
decode = partial(jax.jit, static_argnames=("code", "rows", "columns"))(
    lambda f, code, rows, columns: code.decode(f, rows, columns)
)
named = partial(pytest.mark.parametrize, "code", ids=str)


def normal(rows=ROWS, columns=COLUMNS, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
