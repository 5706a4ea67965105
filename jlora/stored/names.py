"""The names of codes: what `jlora.models.load(quantize=...)` and `jlora finetune --quantize` take."""

from __future__ import annotations

from jlora.core.protocol.code import Code
from jlora.stored.float8 import Float8
from jlora.stored.int4 import Int4
from jlora.stored.int8 import Int8
from jlora.stored.normal_float import NF2, NF3, NF4

#: "nf4" is the code of QLoRA's paper: double quantization, blocks of 64.
NAMES: dict[str, Code] = {
    "nf4": NF4(64, double=True),
    "int8": Int8(),
    "int4": Int4(),
    "fp8": Float8(),
    "nf3": NF3(),
    "nf2": NF2(),
}


def named(name: str) -> Code:
    """The code of a name.

    Raises:
        ValueError: for another name, with those that there are.

    Example:
        >>> jlora.stored.names.named("nf4")
        NF4(block=64, double=True)
    """
    if name not in NAMES:
        raise ValueError(f"{name!r} is no name of a code; there are {', '.join(NAMES)}")
    return NAMES[name]
