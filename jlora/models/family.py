"""What a family of models says of itself, beside its module and config: its checkpoints, and its names in torch."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from jlora.models.names import Merged
from jlora.models.tensors import Tensors


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of one architecture are read and written.

    Args:
        module: Class of the model.
        config: Class of its config, with `from_hf`.
        model_types: The `model_type`s of `config.json` that it reads, each with the classes of transformers that hold the
            model with its head, and without.
        prefixes: What checkpoints of this family put before the names of the backbone's tensors, the usual one first.
        anchor: A tensor that every checkpoint has; shows which prefix it uses.
        sizes: Shapes that a config's sizes give to tensors that every checkpoint has, without building the model.
        layer: Name (regex, with one group for the number) of a layer's tensors.
        unprefixed: First keys of leaves that never get the prefix.
        buffers: Names (regexes) of constants that older checkpoints carry and the model computes itself.
        heads: Names (regexes) of heads that this model has no place for; `load(drop_heads=True)` leaves them out.
        encoder: It sees the whole text or image, and may have a pooler.
        head: The field of the config that says whether the model has its head; empty where it has no place for one.
        count: The key of `config.json` with the number of layers.
        transposed: Checkpoints keep linear weights as `[out, in]`; transformers' Conv1D of GPT-2 has `[in, out]`.
        embedding: The leaf of the token embedding, which a tied head is.
        renamed: Words of a leaf's path (regexes) that checkpoints spell otherwise than torch's modules, and jlora, do.
        merged: By the end of a leaf's path, leaves that are several tensors of a checkpoint in each layer, such as experts.
        bare: Modules of a layer with a linear weight that transformers has no Linear for, such as routers of experts.
        convolutions: Paths of modules whose kernel is one of a convolution, with a window of two axes.
        parameters: Paths of leaves that are parameters of a module with others inside, such as embeddings of positions.
    """

    module: Callable[..., nn.Module]
    config: Any
    model_types: Mapping[str, tuple[str, str]]
    prefixes: tuple[str, ...]
    anchor: str
    sizes: Callable[[Any], dict[str, tuple[int, ...]]]
    layer: str
    unprefixed: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    encoder: bool = False
    head: str = "language_head"
    count: str = "num_hidden_layers"
    transposed: bool = True
    embedding: tuple[str, ...] = ("embed_tokens", "embedding")
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    merged: Mapping[str, Merged] = dataclasses.field(default_factory=dict)
    bare: tuple[str, ...] = ()
    convolutions: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def headed(self, config: Any) -> bool:
        """Whether the model of a config has its head."""
        return bool(self.head) and getattr(config, self.head)

    def spelled(self, path: str) -> str:
        """A leaf's `/`-joined path in the words of checkpoints."""
        for ours, theirs in self.renamed.items():
            path = re.sub(rf"(?<![^/])(?:{ours})(?![^/])", theirs, path)
        return path

    def prefix(self, checkpoint: Tensors) -> str:
        """The prefix that a checkpoint uses.

        Raises:
            ValueError: The checkpoint has the anchor under none of the prefixes.
        """
        for prefix in self.prefixes:
            if prefix + self.anchor in checkpoint:
                return prefix
        wanted = " or ".join(repr(prefix + self.anchor) for prefix in self.prefixes)
        raise ValueError(
            f"{checkpoint.directory}: tensor {wanted} is missing from {checkpoint.source}; wrong model_type in config.json?"
        )
