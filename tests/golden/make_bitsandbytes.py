"""Writes `bitsandbytes.npz`: what bitsandbytes 0.50 makes of small matrices on a CPU, for `tests/stored/test_bitsandbytes.py`.

Run with a Python that has torch and bitsandbytes: `python tests/golden/make_bitsandbytes.py`. Matrices and all that is laid
along them are transposed, as `[in, out]`.
"""

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = {"small": (64, 24), "wide": (256, 40), "long": (1024, 24)}
#: name: size, kind, block, dtypes, whether decoded values are kept.
CASES = {
    "plain": ("small", "nf4", 64, tuple(DTYPES), True),
    "half": ("small", "nf4", 32, ("float32",), True),
    "blocks": ("wide", "nf4", 64, tuple(DTYPES), False),
    "large": ("wide", "nf4", 256, ("float32",), True),
    "fp4": ("small", "fp4", 64, tuple(DTYPES), True),
}


def array(tensor):
    return np.array(tensor.detach().numpy(), order="C")


def matrix(size, seed):
    """Normal numbers in rows of different sizes, with one block of zeros, in torch's `[out, in]`."""
    rows, columns = size
    generator = np.random.default_rng(seed)
    w = generator.standard_normal((columns, rows)) * np.exp(generator.standard_normal((columns, 1)))
    w[1, :64] = 0
    return torch.tensor(w, dtype=torch.float32)


def bytes_of(packed, columns):
    return array(packed.reshape(columns, -1).T)


def torch_only(op, *arguments):
    """An operation of bitsandbytes by its code in torch, which has the arithmetic of its CUDA kernels.

    Its C++ for CPUs rounds to one of 65536 numbers before it looks for the nearest.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return op.redispatch(keys, *arguments)


def four_bits(out, name, w, kind, block, dtypes, decoded):
    for dtype in dtypes:
        codes, state = functional.quantize_4bit(w.to(DTYPES[dtype]), blocksize=block, quant_type=kind)
        out[f"{name}/{dtype}/codes"] = bytes_of(codes, len(w))
        out[f"{name}/{dtype}/scales"] = array(state.absmax.reshape(len(w), -1).T)
        if decoded:
            out[f"{name}/{dtype}/decoded"] = array(functional.dequantize_4bit(codes, state).float().T)


def double(out, name, w, block, dtype):
    codes, state = functional.quantize_4bit(
        w.to(DTYPES[dtype]), blocksize=block, quant_type="nf4", compress_statistics=True
    )
    plain = functional.quantize_4bit(w.to(DTYPES[dtype]), blocksize=block, quant_type="nf4")[1].absmax
    compress = torch.ops.bitsandbytes.quantize_blockwise.default
    second, nested = torch_only(compress, plain - state.offset, state.state2.code, 256)
    scales = (
        functional.dequantize_blockwise(second, absmax=nested, code=state.state2.code, blocksize=256) + state.offset
    )
    state.absmax, state.state2.absmax = second, nested
    columns = len(w)
    out[f"{name}/codes"], out[f"{name}/nested_scales"], out[f"{name}/offset"] = (
        bytes_of(codes, columns), array(nested), array(state.offset)
    )  # fmt: skip
    out[f"{name}/scales"], out[f"{name}/expanded"] = (array(a.reshape(columns, -1).T) for a in (second, scales))
    native = compress(plain - state.offset, state.state2.code, 256)[0]
    out[f"{name}/native_scales"] = array(native.reshape(columns, -1).T)
    out[f"{name}/decoded"] = array(functional.dequantize_4bit(codes, state).float().T[:, :4])


def main():
    matrices = {name: matrix(size, seed) for seed, (name, size) in enumerate(SIZES.items())}
    out = {f"w/{name}": array(w.T) for name, w in matrices.items()}
    out["dynamic_map"] = array(functional.create_dynamic_map())
    out["fp4_levels"] = array(functional.get_4bit_type("fp4", "cpu"))
    out["nf4_levels"] = array(functional.get_4bit_type("nf4", "cpu"))
    for name, (size, *case) in CASES.items():
        four_bits(out, name, matrices[size], *case)
    double(out, "double", matrices["long"], 64, "float32")
    double(out, "double_half", matrices["wide"], 32, "bfloat16")
    for dtype in DTYPES:
        w = matrices["small"].to(DTYPES[dtype])
        codes, scales, _ = functional.int8_vectorwise_quant(w)
        out[f"int8/{dtype}/codes"], out[f"int8/{dtype}/scales"] = array(codes.T), array(scales)
    out["int8/decoded"] = array(
        functional.int8_vectorwise_dequant(*functional.int8_vectorwise_quant(matrices["small"])[:2]).T
    )
    np.savez_compressed(Path(__file__).with_name("bitsandbytes.npz"), **out)


if __name__ == "__main__":
    main()
