"""What a run trains on: a model as a plain function of params and a batch, with its tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import models, paths
from jlora.models.bitsandbytes import is_quantized
from jlora.models.config import read_config
from jlora.models.files import located
from jlora.models.gguf.checkpoint import GgufCheckpoint
from jlora.models.gguf.header import is_gguf
from jlora.models.load import describe, family_of, stored_codes, stored_dtypes
from jlora.models.quantized import fitting, traced
from jlora.stored.names import named
from jlora.training.data.tokens import Codec
from jlora.training.errors import SettingError
from jlora.training.model.losses import Forward, LanguageModel
from jlora.training.settings.fields import Settings


@dataclasses.dataclass(frozen=True)
class Subject:
    """A pretrained model, ready to be adapted.

    Attributes:
        directory: where it came from.
        model: the Linen module.
        params: its params; for classification `{"backbone": …, "classifier": {"kernel", "bias"}}`.
        forward: params and batch to logits.
        codec: its tokenizer.
        config: the content of its `config.json`.
        labels: names of the labels, or empty for language models.
        notes: what the user must know of how it was read.
    """

    directory: Path
    model: Any
    params: Any
    forward: Forward
    codec: Codec
    config: dict[str, Any]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def with_head(self, labels: Sequence[str]) -> Subject:
        """The model as a classifier, with a new head that is the same in every run."""
        model, params = models.make_classifier(self.model, self.params, len(labels), jax.random.key(0))
        return dataclasses.replace(self, model=model, params=params, forward=classifier(model), labels=tuple(labels))


def model_directory(settings: Settings) -> Path:
    """Where the settings' model is, or the shipped one: a directory, or a GGUF file.

    Raises:
        FileNotFoundError: if it is a name whose package is not installed.
    """
    return located(settings.model) if settings.model is not None else Path(models.STORIES260K)


def open_codec(settings: Settings) -> tuple[Codec, dict[str, Any]]:
    """The tokenizer and the config of the settings' model, checked against each other.

    Raises:
        SettingError: if the model reads no texts.
        ValueError: if the model is of a type that `jlora.models` does not read, or a file is not right.
        OSError: if the directory holds no model.
    """
    directory = model_directory(settings)
    config = read_config(directory)
    # Before the tokenizer: that of another type of model may not fit either.
    if hasattr(describe(directory, config), "image_shape"):
        raise SettingError(
            "model",
            f"{directory} is a {config['model_type']}, which reads images, and the command line trains and runs models of "
            "texts alone; load it by jlora.models.load, and train it from Python as docs/models.md shows",
        )
    return Codec(models.load_tokenizer(directory), config, directory), config


def check_model(settings: Settings, config: dict[str, Any]) -> None:
    """What can be known before data and weights are read: the model does the task, and has weights and enough positions.

    Raises:
        SettingError: if it can't do the task, or rows may be longer than its positions.
        ValueError: if a file of weights is damaged or outside of the directory.
        OSError: if there is none.
    """
    _check_task(settings, config)
    stored_dtypes(model_directory(settings), settings.follow_links)
    described = describe(model_directory(settings), config)
    positions = described.max_position_embeddings - getattr(described, "position_offset", 0)
    if settings.max_length is not None and settings.max_length > positions:
        raise SettingError(
            "max_length", f"of {settings.max_length} is more than the {positions} positions of the model"
        )


def _check_task(settings: Settings, config: dict[str, Any]) -> None:
    if settings.task != "classify" and config.get("model_type") in ("bert", "roberta"):
        raise SettingError(
            "task",
            f"{settings.task} needs a model that predicts the next token; {model_directory(settings)} is an encoder: use "
            "classify",
        )


def load_subject(settings: Settings, codec: Codec, config: dict[str, Any]) -> Subject:
    """The settings' model with its weights, as a language model or without its head.

    Raises:
        SettingError: if the model cannot do the task.
        ValueError: if its directory is not right.
        OSError: if it cannot be read.
    """
    _check_task(settings, config)
    spec, notes = _codes(settings, config)
    model, params = _load(settings, spec)
    return Subject(model_directory(settings), model, params, LanguageModel(model), codec, config, notes=notes)


def load_params(settings: Settings) -> Any:
    """The params of the settings' model as its files have them, without `--quantize`."""
    return _load(settings, None)[1]


def _load(settings: Settings, codes: dict[Any, Any] | None) -> tuple[Any, Any]:
    return models.load(
        model_directory(settings),
        scan_layers=settings.scan_layers,
        remat=settings.remat,
        drop_heads=settings.task == "classify",
        follow_links=settings.follow_links,
        quantize=codes,
        **number_formats(settings),
    )


def _codes(settings: Settings, config: dict[str, Any]) -> tuple[dict[Any, Any] | None, tuple[str, ...]]:
    """The spec of `--quantize`: its code for every linear weight whose size it takes; and a note on the others.

    Raises:
        SettingError: for a model that is quantized already.
    """
    if settings.quantize is None:
        return None, ()
    if is_quantized(config, model_directory(settings)):
        raise SettingError("quantize", f"{settings.quantize}: {model_directory(settings)} is quantized already")
    model, params = _abstract(settings, config)
    spec, refused = fitting(named(settings.quantize), model, params)
    told = (
        f"--quantize {settings.quantize} leaves {path} as it is: {why.partition(';')[0]}"
        for path, why in refused.items()
    )
    return spec, tuple(told)


def number_formats(settings: Settings) -> dict[str, Any]:
    """The `dtype` of the computation and the `param_dtype` of the base.

    As asked for; else as the model's files have it, since another format than theirs would change how much memory the base
    takes. Float16 is too narrow for the gradients of activations, so that such a base is computed with in float32. Files of
    several formats, or of 64 bits, make a base in float32.
    """
    if settings.dtype is not None:
        return dict.fromkeys(("dtype", "param_dtype"), jnp.dtype(settings.dtype))
    stored = stored_dtypes(model_directory(settings), settings.follow_links)
    only = stored.pop() if len(stored) == 1 else jnp.dtype(jnp.float32)
    kept = only if only.itemsize == 2 else jnp.dtype(jnp.float32)
    return {"dtype": kept if kept == jnp.bfloat16 else jnp.dtype(jnp.float32), "param_dtype": kept}


def known_formats(settings: Settings, config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The `number_formats` of base and computation, and where they are known from; the model's weights need not be there."""
    if settings.dtype is not None:
        return number_formats(settings), "by --dtype"
    try:
        return number_formats(settings), "as in its files"
    except FileNotFoundError:
        said = config.get("dtype", config.get("torch_dtype"))
        kept = jnp.dtype(said if said in ("bfloat16", "float16") else "float32")
        dtype = kept if kept == jnp.bfloat16 else jnp.dtype(jnp.float32)
        source = "as its config says" if said else "its config names none"
        return {"dtype": dtype, "param_dtype": kept}, source


def memory(subject: Subject, settings: Settings) -> str:
    """The number format of the base and the memory it takes, beside that of its files, in words."""
    leaves = paths.leaves(subject.params["backbone"] if subject.labels else subject.params)
    held = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    stored = ", ".join(sorted(map(str, stored_dtypes(subject.directory, settings.follow_links))))
    source = "as in its files" if held == stored else f"its files hold {stored}"
    if is_gguf(subject.directory):
        source = f"dequantized, its file holds {', '.join(GgufCheckpoint(subject.directory).kept_as)}"
    codes = dict.fromkeys(str(leaf.code) for leaf in leaves if isinstance(leaf, jlora.Stored))
    kept = "".join(f", linear weights as {code}" for code in codes)
    return f"{held} ({source}){kept}, {sum(leaf.nbytes for leaf in leaves) / 1e6:,.2f} MB"


def classifier(model: models.Classifier) -> Forward:
    """Tokens to logits for the labels, `[rows, labels]`."""
    encoder = isinstance(model.backbone, models.Bert)

    def forward(params: Any, batch: dict[str, jax.Array]) -> Any:
        types: Any = {"token_types": batch["types"]} if encoder else {}
        mask = batch["segment_ids"] > 0
        return model.apply({"params": params}, batch["tokens"], attention_mask=mask, **types)

    return forward


def _abstract(settings: Settings, config: dict[str, Any], formats: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The model and the shapes of its params: nothing is read but `config.json`."""
    directory, dtype = model_directory(settings), jnp.dtype(settings.dtype or jnp.float32)
    options = {"scan_layers": settings.scan_layers, "remat": settings.remat, "dtype": dtype, "param_dtype": dtype}
    options |= formats or {}
    model = family_of(config, directory).module(describe(directory, config, **options))
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    return model, jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def prefix_of(model: Any) -> jlora.PrefixLayout | None:
    """The layout of a prefix in PEFT, which is asked for where there is one; None for a model that can't have one there."""
    with contextlib.suppress(ValueError):
        return models.peft_prefix(model)
    return None


def example_batch(settings: Settings) -> dict[str, Any]:
    """Shapes of a small batch, for tracing."""
    rows, length = 1, 8
    shape = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch: dict[str, Any] = {"tokens": shape, "positions": shape, "segment_ids": shape}
    if settings.task == "classify":
        return batch | {"types": shape}
    return batch


def abstract_subject(
    settings: Settings,
    codec: Codec,
    config: dict[str, Any],
    labels: Sequence[str],
    formats: dict[str, Any] | None = None,
) -> Subject:
    """The model with shapes in place of weights: nothing is read but `config.json`, and headers where weights are quantized.

    Args:
        settings: resolved.
        codec: the tokenizer.
        config: the content of `config.json`.
        labels: names of the labels of a classifier.
        formats: as of `number_formats`; by default all is in float32, or as `--dtype` says, which is enough for a trace.
    """
    directory = model_directory(settings)
    model, params = _abstract(settings, config, formats)
    spec, _ = _codes(settings, config)
    if is_quantized(config, directory):
        spec = {
            re.escape("/".join(path)): code
            for path, code in stored_codes(directory, config, model, settings.follow_links).items()
        }
    if spec:
        sites = traced(model, params)
        params = jax.eval_shape(lambda params: jlora.quantize(params, spec, sites), params)
    subject = Subject(directory, model, params, LanguageModel(model), codec, config)
    if settings.task != "classify":
        return subject
    whole = jax.eval_shape(
        lambda params: models.make_classifier(model, params, len(labels), jax.random.key(0))[1], params
    )
    classified, _ = models.make_classifier(model, {}, len(labels), jax.random.key(0))
    return dataclasses.replace(
        subject, model=classified, params=whole, forward=classifier(classified), labels=tuple(labels)
    )
