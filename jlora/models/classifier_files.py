"""Saving and loading a classifier: the Hugging Face directory of its backbone, with the head in two files more.

Transformers loads the backbone (`AutoModel`); `classifier.safetensors` holds the head as a torch linear layer would
(`weight` `[labels, hidden]`, `bias` `[labels]`), `classifier.json` the names of the labels and the pooling.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jlora.core.protocol.stored import decoded
from jlora.disk.json_files import read_object as read_json
from jlora.models.classify import Classifier
from jlora.models.finite import all_finite
from jlora.models.load import load
from jlora.models.save import save, write_json, write_safetensors

TENSORS = "classifier.safetensors"
SETTINGS = "classifier.json"


def save_classifier(
    directory: str | os.PathLike,
    model: Classifier,
    params: dict[str, Any],
    source: str | os.PathLike,
    labels: Sequence[str],
) -> None:
    """Writes a classifier; see `save` for how and for what it refuses.

    Args:
        directory: Must not exist, or be empty.
        model: A classifier by `make_classifier`.
        params: Its params.
        source: The directory that the backbone was loaded from.
        labels: Name of every class, in the order of the logits.

    Raises:
        ValueError: There are not as many labels as classes; and as `save`.
    """
    if len(labels) != model.num_labels:
        raise ValueError(f"labels: wanted {model.num_labels} names, got {len(labels)}.")
    head = params["classifier"]
    tensors = {"weight": np.ascontiguousarray(np.asarray(decoded(head["kernel"])).T), "bias": np.asarray(head["bias"])}

    def write_head(place: str) -> None:
        write_safetensors(tensors, os.path.join(place, TENSORS))
        write_json(place, SETTINGS, {"labels": list(labels), "pooling": model.pooling})

    save(directory, model.backbone, params["backbone"], source, extra=write_head)


def load_classifier(directory: str | os.PathLike, **options: Any) -> tuple[Classifier, dict[str, Any], list[str]]:
    """Reads what `save_classifier` wrote.

    Args:
        directory: Holds a model, `classifier.json` and `classifier.safetensors`.
        **options: As `load`.

    Returns:
        The classifier, its params, and the labels.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the head doesn't fit the backbone; and as `load`.
    """
    for name in (SETTINGS, TENSORS):
        if not os.path.isfile(os.path.join(directory, name)):
            raise FileNotFoundError(
                f"{os.path.join(directory, name)}: no such file; the directory holds no classifier."
            )
    settings = read_json(os.path.join(directory, SETTINGS))
    labels, pooling = settings.get("labels"), settings.get("pooling")
    if not isinstance(labels, list) or pooling not in ("mean", "last"):
        raise ValueError(f"{os.path.join(directory, SETTINGS)}: wanted a list 'labels' and 'pooling' of mean or last.")
    backbone, params = load(directory, **options)
    head = _read_head(os.path.join(directory, TENSORS), len(labels), backbone, options.get("allow_nonfinite", False))
    return Classifier(backbone, len(labels), pooling), {"backbone": params, "classifier": head}, labels


def _read_head(path: str, num_labels: int, backbone: Any, allow_nonfinite: bool) -> dict[str, Any]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again.") from error
    wanted = {"weight": (num_labels, backbone.config.hidden_size), "bias": (num_labels,)}
    got = {name: tensor.shape for name, tensor in tensors.items()}
    if got != wanted:
        raise ValueError(f"{path}: wanted tensors {wanted} by the labels and the backbone, got {got}.")
    for name, tensor in tensors.items():
        if not (allow_nonfinite or all_finite(tensor)):
            raise ValueError(
                f"{path}: tensor {name!r} holds NaN or infinity; copy the file again, or load with allow_nonfinite=True."
            )
    return {"kernel": jnp.asarray(np.ascontiguousarray(tensors["weight"].T)), "bias": jnp.asarray(tensors["bias"])}
