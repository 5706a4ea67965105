"""Which tensors of a Hugging Face checkpoint make up which leaf of a model's params.

A leaf's path and a tensor's name hold the same words; only the ends, the transposition and the layer number differ:

    layers/self_attn/q_proj/kernel [layers, in, out]  <->  model.layers.{i}.self_attn.q_proj.weight [out, in]

and a leaf may be several tensors in each layer, such as experts, and their gates and ups side by side:

    layers/mlp/experts/gate_up_proj [layers, experts, in, 2 out]
        <->  model.layers.{i}.mlp.experts.{e}.gate_proj.weight [out, in], ….up_proj.weight [out, in]
"""

import dataclasses
import itertools
import re
from typing import Any

import numpy as np

# End of a leaf's path -> end of a tensor's name. Kernels are transposed; what is not here has the same end.
ENDS = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
# Older BERT checkpoints carry TensorFlow's names of the norms.
OLD_ENDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
STACKS = ("layers", "layer", "h")


@dataclasses.dataclass(frozen=True)
class Merged:
    """The tensors of one layer that lie in one leaf, whose axes are `[experts, in, out]`.

    Args:
        names: What stands in a tensor's name for the end of the leaf's path, with `{}` for the expert; several lie side by
            side along `out`.
        experts: The field of the config with the number of experts.
    """

    names: tuple[str, ...]
    experts: str


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of one leaf.

    Args:
        names: Tensor names; several for a leaf that stacks layers, in their order, and for one that merges tensors.
        stacked: The leaf has a leading layer axis.
        transposed: The tensors are `[out, in, *window]`, the leaf `[*window, in, out]`; only convolutions have a window.
        experts: How many experts the leaf holds, along the axis behind the layers; 0 where it has no such axis.
        parts: How many tensors lie side by side along its last axis.
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    experts: int = 0
    parts: int = 1

    @property
    def merged(self) -> bool:
        """Whether a layer is several tensors."""
        return self.experts > 0 or self.parts > 1

    @property
    def layers(self) -> int:
        """How many layers the leaf stacks; 1 where it is no stack."""
        return len(self.names) // (max(self.experts, 1) * self.parts)

    def tensor_shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape each tensor must have for a leaf of this shape."""
        one = leaf_shape[self.stacked + (self.experts > 0) :]
        one = (*one[:-1], one[-1] // self.parts) if self.parts > 1 else one
        return (*one[:-3:-1], *one[:-2]) if self.transposed else one

    def as_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor with its axes in the leaf's order."""
        return tensor.transpose(*range(2, tensor.ndim), 1, 0) if self.transposed else tensor

    def as_tensor(self, part: np.ndarray) -> np.ndarray:
        """The part of a leaf that is one tensor, with its axes in the tensor's order."""
        return part.transpose(-1, -2, *range(part.ndim - 2)) if self.transposed else part

    def place(self, number: int, leaf_shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Where the tensor of that number lies in the leaf, as an index; the first entry of a stack is its layer."""
        number, part = divmod(number, self.parts)
        layer, expert = divmod(number, max(self.experts, 1))
        lead = ((layer,) if self.stacked else ()) + ((expert,) if self.experts else ())
        if self.parts == 1:
            return lead
        width = leaf_shape[-1] // self.parts
        return (*lead, ..., slice(part * width, (part + 1) * width))


def source(
    path: tuple[str, ...],
    prefix: str,
    unprefixed: tuple[str, ...],
    layers: int,
    scanned: bool,
    transposed: bool = True,
    merged: tuple[Merged, int] | None = None,
) -> Source:
    """The tensors of the leaf at `path`.

    Args:
        path: Keys from the root of the params to the leaf.
        prefix: What the checkpoint puts before names, such as `model.`.
        unprefixed: First keys of leaves that never get the prefix, such as `lm_head`.
        layers: Number of layers.
        scanned: Layers are one stack.
        transposed: Kernels are `[out, in]` in the checkpoint.
        merged: How several tensors of a layer lie in the leaf, and the number of experts.
    """
    prefix = "" if path[0] in unprefixed else prefix
    if merged is None:
        ends, experts, parts = (ENDS.get(path[-1], path[-1]),), 0, 1
    else:
        each, experts = merged
        ends = tuple(end.format(expert) for expert in range(experts) for end in each.names)
        parts = len(each.names)
    transposed = merged is not None or (transposed and path[-1] == "kernel")
    words = [*path[:-1]]
    at = next((i for i, word in enumerate(words) if word in STACKS), None)
    if at is not None and scanned:
        before, after = words[: at + 1], words[at + 1 :]
        names = (
            prefix + ".".join([*before, str(layer), *after, end])
            for layer, end in itertools.product(range(layers), ends)
        )
        return Source(tuple(names), True, transposed, experts, parts)
    words = [re.sub(rf"^({'|'.join(STACKS)})_(\d+)$", r"\1.\2", word) for word in words]
    return Source(tuple(prefix + ".".join([*words, end]) for end in ends), False, transposed, experts, parts)


def modern_name(name: str) -> str:
    """A tensor's name with `OLD_ENDS` replaced."""
    for old, new in OLD_ENDS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
