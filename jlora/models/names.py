"""Which tensors of a Hugging Face checkpoint make up which leaf of a model's params.

A leaf's path and a tensor's name hold the same words; only the ends, the transposition and the layer number differ:

    layers/self_attn/q_proj/kernel [layers, in, out]  <->  model.layers.{i}.self_attn.q_proj.weight [out, in]
"""

import dataclasses
import re

# End of a leaf's path -> end of a tensor's name. Kernels are transposed.
ENDS = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
# Older BERT checkpoints carry TensorFlow's names of the norms.
OLD_ENDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
STACKS = ("layers", "layer")


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors of one leaf.

    Args:
        names: Tensor names; several for a leaf that stacks layers, in their order.
        stacked: The leaf has a leading layer axis.
        transposed: The tensors are `[out, in]`, the leaf `[in, out]`.
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool

    def tensor_shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape each tensor must have for a leaf of this shape."""
        one = leaf_shape[1:] if self.stacked else leaf_shape
        return one[::-1] if self.transposed else one


def source(path: tuple[str, ...], prefix: str, unprefixed: tuple[str, ...], layers: int, scanned: bool) -> Source:
    """The tensors of the leaf at `path`.

    Args:
        path: Keys from the root of the params to the leaf.
        prefix: What the checkpoint puts before names, such as `model.`.
        unprefixed: First keys of leaves that never get the prefix, such as `lm_head`.
        layers: Number of layers.
        scanned: Layers are one stack.
    """
    prefix = "" if path[0] in unprefixed else prefix
    words = [*path[:-1], ENDS[path[-1]]]
    transposed = path[-1] == "kernel"
    at = next((i for i, word in enumerate(words) if word in STACKS), None)
    if at is not None and scanned:
        before, after = [*words[: at + 1]], words[at + 1 :]
        names = tuple(prefix + ".".join([*before, str(layer), *after]) for layer in range(layers))
        return Source(names, True, transposed)
    words = [re.sub(rf"^({'|'.join(STACKS)})_(\d+)$", r"\1.\2", word) for word in words]
    return Source((prefix + ".".join(words),), False, transposed)


def modern_name(name: str) -> str:
    """A tensor's name with `OLD_ENDS` replaced."""
    for old, new in OLD_ENDS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
