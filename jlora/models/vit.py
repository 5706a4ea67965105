"""Vision Transformers: images in patches, as plain Linen modules.

Parameters are named as the modules of transformers' ViT, kernels are `[in, out]`, that of the patches `[height, width, in,
out]`, and layers are one stack with a leading layer axis (`scan_layers=True`) or `layers_0`, `layers_1`, ... Reference:
arXiv:2010.11929.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.disk.json_files import shown
from jlora.models import attention
from jlora.models.bert import LayerNorm
from jlora.models.config import LARGEST_SIZE, MOST_LAYERS, activation, flag, optional, positive, refuse, whole
from jlora.models.decoder import dense
from jlora.models.family import Family
from jlora.models.quantized import refuse_codes


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a Vision Transformer; `from_hf` reads it from a Hugging Face `config.json`.

    Args:
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch. Pixels that fill no whole patch, at the right and below, are not read.
        num_channels: Channels of a pixel.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        num_hidden_layers: Layers.
        num_attention_heads: Heads; divides the width.
        num_labels: Classes of the head.
        layer_norm_eps: Added to the variance in every norm.
        hidden_act: Activation of the feed-forward layer.
        qkv_bias: Queries, keys and values have a bias.
        classifier: Has the head, a linear layer on the first hidden state; without it the model returns hidden states.
        pooler: Has the pooler, a dense layer on the first hidden state.
        pooler_size: Width of the pooler.
        pooler_act: Activation of the pooler.
        scan_layers: One stack of layers under `nn.scan`, else one subtree a layer.
        remat: Recompute each layer in the backward pass rather than keep its activations.
        dtype: Dtype of the computation; norms and softmax are float32.
        param_dtype: Dtype of parameters made by `init`.

    Raises:
        ValueError: The heads don't divide the width, or an image is smaller than a patch.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_labels: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    classifier: bool = True
    pooler: bool = False
    pooler_size: int | None = None
    pooler_act: str = "tanh"
    scan_layers: bool = True
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}."
            )
        if min(self.grid) < 1:
            raise ValueError(f"image_size {list(self.image_size)} is less than patch_size {list(self.patch_size)}.")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom, and from left to right."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, `(height, width, channels)`."""
        return (*self.image_size, self.num_channels)

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **options: Any) -> "ViTConfig":
        """Reads a config of model type `vit`; what it leaves out is as in ViT-Base.

        Args:
            hf: Content of `config.json`.
            **options: `classifier`, `num_labels`, `pooler`, `scan_layers`, `remat`, `dtype`, `param_dtype`.

        Raises:
            ValueError: A key is of a wrong type or out of range, or asks for what is not supported.
        """
        hidden_size, heads = whole(hf, "hidden_size", 768), whole(hf, "num_attention_heads", 12)
        refuse(hf, "head_dim", "heads share the width", hidden_size // heads)
        acts = {"hidden_act": optional(hf, "hidden_act", "gelu"), "pooler_act": optional(hf, "pooler_act", "tanh")}
        for name in acts.values():
            activation(name)
        return cls(
            image_size=_pair(hf, "image_size", 224),
            patch_size=_pair(hf, "patch_size", 16),
            num_channels=whole(hf, "num_channels", 3),
            hidden_size=hidden_size,
            intermediate_size=whole(hf, "intermediate_size", 3072),
            num_hidden_layers=whole(hf, "num_hidden_layers", 12, most=MOST_LAYERS),
            num_attention_heads=heads,
            layer_norm_eps=positive(hf, "layer_norm_eps", 1e-12),
            qkv_bias=flag(hf, "qkv_bias", True),
            pooler_size=whole(hf, "pooler_output_size", hidden_size),
            **acts,
            **{"num_labels": _labels(hf), **options},
        )


def _pair(hf: dict[str, Any], key: str, default: int) -> tuple[int, int]:
    """A size as a whole number for both height and width, or as a list of the two."""
    value = optional(hf, key, default)
    both = value if isinstance(value, list) else [value, value]
    if len(both) != 2 or not all(type(size) is int and 1 <= size <= LARGEST_SIZE for size in both):
        raise ValueError(
            f"config.json: {key!r} must be a whole number from 1, or a list of height and width, got {shown(value)}."
        )
    return both[0], both[1]


def _labels(hf: dict[str, Any]) -> int:
    """The number of classes: transformers names them in `id2label`, but for two."""
    names = optional(hf, "id2label", {})
    if not isinstance(names, dict):
        raise ValueError(f"config.json: 'id2label' must be an object from numbers to names, got {shown(names)}.")
    return len(names) or whole(hf, "num_labels", 2)


class PatchEmbeddings(nn.Module):
    """A linear layer on every patch, as a convolution whose strides are the patch."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[batch, patches, hidden]` of `[batch, height, width, channels]`, row by row."""
        c = self.config
        convolution = nn.Conv(
            c.hidden_size,
            c.patch_size,
            c.patch_size,
            "VALID",
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            name="projection",
        )
        return convolution(images).reshape(images.shape[0], -1, c.hidden_size)


class Embeddings(nn.Module):
    """The class token and the patches, each with the embedding of its position."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[batch, 1 + patches, hidden]` of `[batch, height, width, channels]`."""
        c = self.config
        draw, count = nn.initializers.truncated_normal(0.02), 1 + c.grid[0] * c.grid[1]
        token = self.param("cls_token", draw, (1, 1, c.hidden_size), c.param_dtype)
        positions = self.param("position_embeddings", draw, (1, count, c.hidden_size), c.param_dtype)
        patches = PatchEmbeddings(c, name="patch_embeddings")(images)
        token = jnp.broadcast_to(token.astype(c.dtype), (images.shape[0], 1, c.hidden_size))
        return jnp.concatenate([token, patches], axis=1) + positions.astype(c.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention over the class token and all patches."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Mixes `x` `[batch, length, hidden]` over positions."""
        c = self.config
        heads = (*x.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        query, key, value = (
            dense(c, c.hidden_size, c.qkv_bias, name)(x).reshape(heads) for name in ("q_proj", "k_proj", "v_proj")
        )
        one = jnp.ones(x.shape[:2], jnp.int32)
        return dense(c, c.hidden_size, True, "o_proj")(attention.attend(query, key, value, attention.Visible(one, one)))


class FeedForward(nn.Module):
    """`fc2(act(fc1(x)))`."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms every position of `x` `[batch, length, hidden]`."""
        c = self.config
        return dense(c, c.hidden_size, True, "fc2")(
            activation(c.hidden_act)(dense(c, c.intermediate_size, True, "fc1")(x))
        )


class Layer(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the stream."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """`x` `[batch, length, hidden]` after the layer; the None is what `nn.scan` wants beside it."""
        c: Any = self.config
        x = x + SelfAttention(c, name="attention")(LayerNorm(c, name="layernorm_before")(x))
        return x + FeedForward(c, name="mlp")(LayerNorm(c, name="layernorm_after")(x)), None


class Pooler(nn.Module):
    """`act(dense(x))` of the class token."""

    config: ViTConfig

    @nn.compact
    def __call__(self, first: jax.Array) -> jax.Array:
        """`[batch, pooler_size]` of the first hidden states `[batch, hidden]`."""
        c = self.config
        return activation(c.pooler_act)(dense(c, c.pooler_size or c.hidden_size, True, "dense")(first))


class ViT(nn.Module):
    """A Vision Transformer: `model.apply({"params": params}, images) -> logits`, or hidden states where it has no head."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array, return_hidden: bool = False, return_pooled: bool = False) -> Any:
        """Classifies images.

        Args:
            images: `[batch, height, width, channels]`, in the numbers that the checkpoint was trained on (its
                `preprocessor_config.json` says which mean and deviation they have). Torch has the channels in front.
            return_hidden: Return the last hidden states, also where there is a head.
            return_pooled: Return the pair of the last hidden states and the pooler's output.

        Returns:
            Logits `[batch, num_labels]`; or the last hidden states `[batch, 1 + patches, hidden_size]`, the class token
            first; or the pair of these and the pooled `[batch, pooler_size]`. All float32.

        Raises:
            ValueError: The images have another shape, or the checkpoint has no pooler.
            TypeError: Images are no floating numbers, or params are kept in the form of a code: run the model by
                `jlora.lift(model.apply)`.
        """
        refuse_codes(self.variables)
        c: Any = self.config
        _check_images(c, images)
        if return_pooled and not c.pooler:
            raise ValueError("return_pooled: this checkpoint has no pooler; take the first of the hidden states.")
        x = self._layers(Embeddings(c, name="embeddings")(images.astype(c.dtype)))
        x = LayerNorm(c, name="layernorm")(x)
        hidden, building = x.astype(jnp.float32), self.is_initializing()
        pooled = logits = None
        if c.pooler and (return_pooled or building):
            pooled = Pooler(c, name="pooler")(x[:, 0]).astype(jnp.float32)
        if c.classifier and (building or not (return_hidden or return_pooled)):
            logits = dense(c, c.num_labels, True, "classifier")(x[:, 0]).astype(jnp.float32)
        if return_pooled:
            return hidden, pooled
        return hidden if return_hidden or logits is None else logits

    def _layers(self, x: jax.Array) -> jax.Array:
        c = self.config
        # Under scan the loop itself keeps XLA from merging the recomputation with the forward pass.
        layer = nn.remat(Layer, prevent_cse=not c.scan_layers) if c.remat else Layer
        if not c.scan_layers:
            for i in range(c.num_hidden_layers):
                x, _ = layer(c, name=f"layers_{i}")(x)
            return x
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_hidden_layers)
        return stack(c, name="layers")(x)[0]


def _check_images(c: ViTConfig, images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[1:] != c.image_shape:
        height, width, channels = c.image_shape
        turned = images.shape[1:] == (channels, height, width)
        raise ValueError(
            f"images: wanted [batch, height, width, channels] = [batch, {height}, {width}, {channels}] by the model's config, "
            f"got shape {list(images.shape)}"
            + (", which has its channels in front, as torch has them." if turned else ".")
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images: wanted floating numbers, scaled as in training, got {images.dtype}.")


def sizes(c: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes that the config gives to tensors of every checkpoint."""
    return {
        "embeddings.patch_embeddings.projection.weight": (c.hidden_size, c.num_channels, *c.patch_size),
        "embeddings.position_embeddings": (1, 1 + c.grid[0] * c.grid[1], c.hidden_size),
        "encoder.layer.0.intermediate.dense.weight": (c.intermediate_size, c.hidden_size),
    }


FAMILY = Family(
    ViT,
    ViTConfig,
    {"vit": ("ViTForImageClassification", "ViTModel")},
    prefixes=("vit.", ""),
    anchor="embeddings.patch_embeddings.projection.weight",
    sizes=sizes,
    layer=r"encoder\.layer\.(\d{1,9})\..+",
    unprefixed=("classifier",),
    heads=(r"classifier\.(weight|bias)", r"decoder\.0\.(weight|bias)", r"(vit\.)?embeddings\.mask_token"),
    encoder=True,
    head="classifier",
    renamed={
        r"layers(_\d+)?": r"encoder/layer\1",
        "attention/q_proj": "attention/attention/query",
        "attention/k_proj": "attention/attention/key",
        "attention/v_proj": "attention/attention/value",
        "attention/o_proj": "attention/output/dense",
        "mlp/fc1": "intermediate/dense",
        "mlp/fc2": "output/dense",
    },
    convolutions=("embeddings/patch_embeddings/projection",),
    parameters=("embeddings/cls_token", "embeddings/position_embeddings"),
)
