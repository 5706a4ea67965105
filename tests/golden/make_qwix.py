"""Numbers of qwix for `tests/stored/test_qwix.py`.

pip install qwix
python tests/golden/make_qwix.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import qwix

CASES = {  # shape, what qwix makes of it, dtype
    "int8": ((16, 12), {"qtype": "int8", "channelwise_axes": [1]}, "float32"),
    "int4_tiles": ((16, 12), {"qtype": "int4", "channelwise_axes": [1], "tiled_axes": {0: 8}}, "bfloat16"),
    "nf4": ((16, 12), {"qtype": "nf4", "channelwise_axes": [1], "tiled_axes": {0: 4}}, "bfloat16"),
    "asymmetric": ((16, 12), {"qtype": "int8", "channelwise_axes": [1], "calibration_method": "minmax"}, "float32"),
    "float8": ((16, 12), {"qtype": "float8_e4m3fn"}, "float32"),
    "heads": ((3, 8, 2, 6), {"qtype": "int8", "channelwise_axes": [0, 3], "tiled_axes": {1: 4}}, "float32"),
}


def main():
    """Writes qwix.npz."""
    found = {}
    for number, (name, (shape, how, dtype)) in enumerate(CASES.items()):
        w = jnp.asarray(np.random.default_rng(number).standard_normal(shape), dtype)
        array = qwix.quantize(w, **how)
        found[f"{name}/qvalue"] = np.asarray(array.qvalue.astype(jnp.float32))
        found[f"{name}/scale"] = np.asarray(array.scale.astype(jnp.float32))
        found[f"{name}/decoded"] = np.asarray(qwix.dequantize(array).astype(jnp.float32))
        if array.zero_point is not None:
            found[f"{name}/zero_point"] = np.asarray(array.zero_point.astype(jnp.float32))
        kinds = [str(array.qvalue.dtype), str(array.scale.dtype), str(array.qtype)]
        found[f"{name}/kinds"] = np.array([*kinds, str(getattr(array.zero_point, "dtype", ""))])
        print(name, array.qvalue.shape, array.scale.shape, kinds)
    np.savez_compressed(Path(__file__).parent / "qwix.npz", **found)


if __name__ == "__main__":
    print(jax.__version__)
    main()
