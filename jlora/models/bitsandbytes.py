"""Checkpoints of bitsandbytes, both ways: their bytes are those of jlora's codes, transposed, and nothing is ever decoded.

Beside a weight of 4 bits, whose two-dimensional shape is in the JSON of its state, lie the tensors of what decodes it:

    X.weight                                  uint8 [out in / 2, 1]
    X.weight.absmax                           float32 [out in / block], or uint8 with a second level
    X.weight.quant_map                        float32 [16]
    X.weight.nested_absmax, .nested_quant_map float32, of a second level
    X.weight.quant_state.bitsandbytes__nf4    the JSON

and beside one of LLM.int8(), `X.weight` int8 `[out, in]`, its scales `X.SCB` float32 `[out]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.core.protocol.code import Code
from jlora.core.protocol.stored import Stored
from jlora.disk.json_files import ILL_FORMED, shown
from jlora.models.checkpoint import Checkpoint
from jlora.models.finite import all_finite
from jlora.models.tensors import FLOATS
from jlora.stored import FP4, NF4, Int8
from jlora.stored.double import DYNAMIC_MAP, NESTED, Double

KINDS: dict[str, type[Double]] = {"nf4": NF4, "fp4": FP4}
_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {str(dtype): kind for kind, dtype in FLOATS.items()}
_SIZES = {"U8": 1, "I8": 1, **{kind: dtype.itemsize for kind, dtype in FLOATS.items()}}
# Those that quantization_config has beside what it says of the code, with transformers' defaults.
_CONFIG = {
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_threshold": 6.0,
    "quant_method": "bitsandbytes",
}


def is_quantized(hf: Mapping[str, Any], directory: str | os.PathLike) -> bool:
    """Whether a `config.json` says that its weights are bitsandbytes'.

    Raises:
        ValueError: they are quantized otherwise.
    """
    config = hf.get("quantization_config")
    if not config:
        return False
    method = config.get("quant_method") if isinstance(config, dict) else None
    loaded = isinstance(config, dict) and (config.get("load_in_4bit") is True or config.get("load_in_8bit") is True)
    if method == "bitsandbytes" or (method is None and loaded):
        return True
    by = "" if method is None else f" by {shown(method)}"
    raise ValueError(
        f"{os.path.join(directory, 'config.json')}: the checkpoint is quantized{by} (quantization_config), wanted plain "
        "weights or those of bitsandbytes; dequantize it first."
    )


@dataclasses.dataclass(frozen=True)
class _Coded:
    """A weight in the form of a code, by its header: code, torch's shape `[out, in]`, dtype, and the offset of its scales."""

    code: Code
    shape: tuple[int, int]
    kind: str
    offset: float | None = None


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint of bitsandbytes: its weights have their own names and shapes, and fields in the place of values.

    Args:
        directory: As for `Checkpoint`.
        follow_links: As for `Checkpoint`.
        hf: Content of its `config.json`.

    Raises:
        ValueError: As `Checkpoint`; and where what belongs to a weight is missing, or is not as bitsandbytes makes it, or
            blocks run over the ends of rows, which no code of jlora's has.
    """

    def __init__(self, directory: str | os.PathLike, follow_links: bool, hf: Mapping[str, Any]):
        super().__init__(directory, follow_links)
        self._coded: dict[str, _Coded] = {}
        self._beside: set[str] = set()
        try:
            for name in super().names:
                weight, found, kind = name.partition(_STATE)
                if found:
                    self._add_four_bits(weight, name, kind)
                elif name.endswith(".SCB"):
                    self._add_int8(name, hf)
        except BaseException:
            self.__exit__()
            raise

    @property
    def names(self) -> list[str]:
        """Names of all tensors but those that belong to another."""
        return [name for name in super().names if name not in self._beside]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; of a weight in the form of a code, that of what it stands for."""
        return self._coded[name].shape if name in self._coded else super().shape(name)

    def kind(self, name: str) -> str:
        """Dtype of a tensor; of a weight in the form of a code, that of what it stands for."""
        return self._coded[name].kind if name in self._coded else super().kind(name)

    def code(self, name: str) -> Code | None:
        """The code that a tensor is kept in."""
        return self._coded[name].code if name in self._coded else None

    def fields(self, name: str) -> dict[str, np.ndarray]:
        """The fields of the code of a weight.

        Raises:
            ValueError: A file is damaged, or scales are not finite.
        """
        coded, rows = self._coded[name], self._coded[name].shape[0]
        along = lambda array: array.reshape(rows, -1).T  # noqa: E731
        if isinstance(coded.code, Int8):
            fields = {"codes": self.read(name).T, "scales": self.read(_stem(name) + ".SCB")}
        else:
            scales = along(self.read(name + ".absmax"))
            fields = {"codes": along(self.read(name).reshape(-1).view(np.uint8)), "scales": scales}
            if coded.offset is not None:
                fields |= {"nested_scales": self.read(name + ".nested_absmax"), "offset": np.float32(coded.offset)}
        for field, array in fields.items():
            if array.dtype == np.float32 and not all_finite(np.asarray(array)):
                raise ValueError(
                    f"{self.file(name)}: tensor {name!r} has {field} that are not finite; copy the file again."
                )
        return fields

    def _add_four_bits(self, name: str, state_name: str, kind: str) -> None:
        with self._about(name):
            if kind not in KINDS:
                raise ValueError(f"its code {kind!r} is none of {', '.join(KINDS)}")
            state = json.loads(self.read(state_name).tobytes())
            shape, block, dtype, nested = (state.get(k) for k in ("shape", "blocksize", "dtype", "nested_blocksize"))
            if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
                raise ValueError(f"its shape {shown(shape)} is not that of a matrix")
            if dtype not in _DTYPES:
                raise ValueError(f"its dtype {shown(dtype)} is none of {', '.join(_DTYPES)}")
            code = KINDS[kind](block, nested is not None)
            self._check_levels(name + ".quant_map", np.asarray(code.levels, np.float32))
            rows, columns = shape
            if columns % block:
                raise ValueError(
                    f"its blocks of {block} run over the ends of its rows of {columns}, and codes have whole blocks along "
                    "the inputs: dequantize it first"
                )
            self._check_bytes(name, rows * columns // 2)
            count, offset = rows * columns // block, None
            self._check_shape(name + ".absmax", (count,), "F32" if nested is None else "U8")
            beside = {state_name, name + ".quant_map", name + ".absmax"}
            if nested is not None:
                offset = state.get("nested_offset")
                if nested != NESTED or type(offset) is not float or not math.isfinite(offset):
                    raise ValueError(f"its second level has blocks of {shown(nested)} around {shown(offset)}")
                self._check_shape(name + ".nested_absmax", (-(-count // NESTED),), "F32")
                self._check_levels(name + ".nested_quant_map", DYNAMIC_MAP)
                beside |= {name + ".nested_absmax", name + ".nested_quant_map"}
            self._coded[name] = _Coded(code, (rows, columns), _DTYPES[dtype], offset)
            self._beside |= beside

    def _add_int8(self, scales: str, hf: Mapping[str, Any]) -> None:
        stem = scales.removesuffix(".SCB")
        name, layout = stem + ".weight", stem + ".weight_format"
        with self._about(name):
            if name not in self or super().kind(name) != "I8" or len(super().shape(name)) != 2:
                raise ValueError("wanted a matrix of int8 beside its SCB")
            if layout in self and self.read(layout).any():
                raise ValueError("its weight_format is not that of rows: save it again by a recent bitsandbytes")
            rows, columns = super().shape(name)
            self._check_shape(scales, (rows,), "F32")
            dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
            if dtype not in _DTYPES:
                raise ValueError(f"dtype {shown(dtype)} of config.json is none of {', '.join(_DTYPES)}")
            self._coded[name] = _Coded(Int8(), (rows, columns), _DTYPES[dtype])
            self._beside |= {scales, layout}

    @contextlib.contextmanager
    def _about(self, name: str) -> Iterator[None]:
        """A context in which errors say of which weight they are."""
        try:
            yield
        except ILL_FORMED as error:
            place = self.file(name) if name in self else self.directory
            raise ValueError(f"{place}: tensor {name!r} is not as bitsandbytes keeps it: {error}.") from error

    def _check_bytes(self, name: str, wanted: int) -> None:
        # bnb_4bit_quant_storage may be any dtype: the bytes are the same.
        if name not in self:
            raise ValueError("it is missing")
        got = math.prod(super().shape(name)) * _SIZES.get(super().kind(name), 0)
        if got != wanted:
            raise ValueError(f"it has {got} bytes, and its shape wants {wanted}")

    def _check_shape(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        if name not in self:
            raise ValueError(f"{name!r} is missing")
        got = super().shape(name), super().kind(name)
        if got != (shape, kind):
            raise ValueError(f"{name!r} is {got[1]} {list(got[0])}, wanted {kind} {list(shape)}")

    def _check_levels(self, name: str, levels: np.ndarray) -> None:
        self._check_shape(name, levels.shape, "F32")
        if not np.array_equal(self.read(name), levels):
            raise ValueError(f"{name!r} holds other levels than bitsandbytes'")


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def code_to_write(leaves: Mapping[tuple[str, ...], Any]) -> Code:
    """The code of all leaves that are kept in one, which must be bitsandbytes'.

    Raises:
        ValueError: There is none, or several, or one that bitsandbytes has not, or it does not run along the inputs.
    """
    codes: dict[Code, str] = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, Stored):
            codes.setdefault(leaf.code, "/".join(path))
            kernel = path[-1] == "kernel" and leaf.in_axes == (leaf.ndim - 2,) and leaf.out_axes == (leaf.ndim - 1,)
            if not kernel or not isinstance(leaf.code, NF4 | FP4 | Int8):
                raise ValueError(
                    f"params: leaf {'/'.join(path)} is kept as {leaf.code} in a form that bitsandbytes has not: it keeps the "
                    "kernels of linear layers as NF4, FP4 or Int8 along their inputs. Save without format, which decodes it."
                )
    if len(codes) != 1:
        found = ", ".join(f"{code} ({path})" for code, path in codes.items())
        raise ValueError(
            f"params: a checkpoint of bitsandbytes has one code, got {found or 'no leaf that is kept as one'}; "
            "quantize them so first (models.load(quantize=...), jlora.quantize)."
        )
    return next(iter(codes))


def config_to_write(hf: Mapping[str, Any], code: Code, dtype: str, skipped: list[str]) -> dict[str, Any]:
    """The `quantization_config` of what is written.

    Args:
        hf: The source's `config.json`, whose own settings are kept where it is bitsandbytes' too.
        code: The code of its weights.
        dtype: Of the computation, where the source says none.
        skipped: Names of the linear modules that are not in the form of the code.
    """
    four, old = isinstance(code, Double), hf.get("quantization_config") or {}
    bits = {"load_in_4bit": four, "load_in_8bit": not four}
    told = {
        **bits,
        **{f"_{name}": value for name, value in bits.items()},
        "bnb_4bit_quant_type": _kind(code) if isinstance(code, Double) else "fp4",
        "bnb_4bit_use_double_quant": isinstance(code, Double) and code.double,
        "llm_int8_skip_modules": skipped,
    }
    return {**_CONFIG, "bnb_4bit_compute_dtype": dtype, **old, **told, "bnb_4bit_quant_storage": "uint8"}


def _kind(code: Double) -> str:
    return next(name for name, cls in KINDS.items() if type(code) is cls)


def tensors_to_write(name: str, leaf: Stored, layer: int | None) -> dict[str, np.ndarray]:
    """The tensors of one weight by their names.

    Args:
        name: Of the weight.
        leaf: The leaf that it is of.
        layer: Its number in a leaf that stacks layers, else None.
    """
    fields = {field: np.asarray(array if layer is None else array[layer]) for field, array in leaf.fields.items()}
    flat = lambda array: np.ascontiguousarray(array.T).reshape(-1)  # noqa: E731
    codes = flat(fields["codes"])
    if isinstance(leaf.code, Int8):
        shaped = codes.reshape(leaf.out_size, leaf.in_size)
        return {
            name: shaped,
            _stem(name) + ".SCB": fields["scales"],
            _stem(name) + ".weight_format": np.zeros((), np.uint8),
        }
    assert isinstance(leaf.code, Double)
    state = {
        "quant_type": _kind(leaf.code),
        "blocksize": leaf.code.block,
        "dtype": str(np.dtype(leaf.dtype)),
        "shape": [leaf.out_size, leaf.in_size],
    }
    tensors = {name: codes[:, None], name + ".absmax": flat(fields["scales"]), name + ".quant_map": _levels(leaf.code)}
    if leaf.code.double:
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(fields["offset"])}
        tensors |= {name + ".nested_absmax": fields["nested_scales"], name + ".nested_quant_map": DYNAMIC_MAP}
    tensors[f"{name}{_STATE}{state['quant_type']}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


@functools.cache
def _levels(code: Double) -> np.ndarray:
    return np.asarray(code.levels, np.float32) + 0  # which takes the sign of FP4's second zero, as there
