"""NaN and infinity in tensors, which no pretrained model has and every later result would inherit."""

import numpy as np

_BLOCK = 2**20
# Bits of the exponent, which are all 1 in NaN and infinity: much faster than `isfinite` of 16-bit numbers.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


def all_finite(array: np.ndarray) -> bool:
    """Whether an array of floating-point numbers holds neither NaN nor infinity; read once, a block at a time."""
    flat = array.reshape(-1)
    exponent = _EXPONENTS.get(array.dtype.name)
    if exponent is not None:
        flat = flat.view(np.uint16)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        finite = np.isfinite(block) if exponent is None else (block & exponent) != exponent
        if not finite.all():
            return False
    return True
