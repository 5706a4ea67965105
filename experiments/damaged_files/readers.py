"""What jlora reads from disk: how each thing is made, which of its files may come to harm, and what reading it must give."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import damage
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models
from jlora.disk.checksums import checksums
from jlora.training.errors import CheckpointError
from jlora.training.model.subject import open_codec
from jlora.training.run.checkpoint import MANIFEST, find_whole
from jlora.training.run.record import read_settings
from jlora.training.settings.fields import Settings

OUTCOMES = ("refused", "equal", "other values", "wrong")
#: Longer than reading ever takes: it began to build what the file is too damaged to tell.
_SECONDS = 20.0


@dataclass(frozen=True)
class Reader:
    """One thing that is read.

    Attributes:
        make: writes it into an empty folder.
        files: pattern of the files that come to harm.
        read: reads it from the folder, as something to compare.
        checked: it carries checksums, so that it is either as written or refused.
        expected: errors that its documentation names.
    """

    make: Callable[[Path], None]
    files: str
    read: Callable[[Path], Any]
    checked: bool
    expected: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)


def _base() -> dict[str, Any]:
    return {
        "layer": {"kernel": jnp.arange(48.0).reshape(8, 6), "bias": jnp.ones(6)},
        "half": jnp.ones((6, 6), jnp.bfloat16),
    }


def _make_adapters(folder: Path) -> None:
    spec = {"layer/kernel": jlora.DoRA(jlora.LoRA(rank=2)), "layer/bias": jlora.Full(), "half": jlora.LoRA(rank=1)}
    jlora.save(folder / "adapters", jlora.adapterize(_base(), spec))


def _read_adapters(folder: Path) -> Any:
    loaded = jlora.load(folder / "adapters", _base())
    return repr(loaded.plan), _hashed(loaded.params)


def _make_checkpoints(folder: Path) -> None:
    for step in (2, 4):
        place = folder / str(step)
        (place / "state").mkdir(parents=True)
        (place / "state" / "arrays").write_bytes(np.random.default_rng(step).bytes(500))
        (place / "run").write_text(json.dumps({"step": step}))
        (place / MANIFEST).write_text(json.dumps({"step": step, "base": "0" * 32, "files": checksums(place)}))


def _read_checkpoints(folder: Path) -> Any:
    """The last step, or an error as a checkpoint that is not whole leaves it: the earlier one, with a word about the last."""
    found = find_whole(folder)
    if found.step == 2 and len(found.complaints) == 1 and "step 4" in found.complaints[0]:
        raise CheckpointError(f"{folder}: {found.complaints[0]}")
    return found


def _make_model(folder: Path) -> None:
    """A small Llama in two shards."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 512, "hidden_size": 8,
        "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": rope,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.STORIES260K / name, folder / name)
    model = models.Llama(models.LlamaConfig.from_hf(config))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    models.save(folder / "whole", model, params, folder)
    tensors = load_file(folder / "whole" / "model.safetensors")
    shards = {f"model-0000{part}-of-00002.safetensors": sorted(tensors)[part - 1 :: 2] for part in (1, 2)}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.rmtree(folder / "whole")


def _read_model(folder: Path) -> Any:
    model, params = models.load(folder)
    return repr(model), _hashed(params)


def _read_tokenizer(folder: Path) -> Any:
    codec, _ = open_codec(Settings(model=str(folder)))
    ids = codec.tokenizer.encode("Once upon a time, 1 + 1 = 2.").ids
    return codec.begin, codec.end, codec.tokenizer.get_vocab(), ids


def _read_both(folder: Path) -> Any:
    return _read_tokenizer(folder), _read_model(folder)


def _make_settings(folder: Path) -> None:
    about = {
        "asked": asdict(Settings()),
        "settings": asdict(Settings(rank=8)),
        "labels": ["bad", "good"],
        "base": "0" * 32,
    }
    (folder / "settings.json").write_text(json.dumps(about))


def _hashed(tree: Any) -> str:
    leaves = jax.tree.leaves(jax.tree.map(lambda leaf: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()), tree))
    return hashlib.sha256(repr(leaves).encode()).hexdigest()


READERS = {
    "adapters: jlora.json": Reader(_make_adapters, "adapters/jlora.json", _read_adapters, True),
    "adapters: arrays": Reader(_make_adapters, "adapters/arrays/**/*", _read_adapters, True),
    "checkpoint: manifest": Reader(_make_checkpoints, f"4/{MANIFEST}", _read_checkpoints, True),
    "checkpoint: arrays": Reader(_make_checkpoints, "4/**/[!m]*", _read_checkpoints, True),
    "model: config.json": Reader(_make_model, "config.json", _read_both, False),
    "model: index": Reader(_make_model, "*.index.json", _read_model, False),
    "model: safetensors": Reader(_make_model, "*.safetensors", _read_model, False),
    "model: tokenizer.json": Reader(_make_model, "tokenizer.json", _read_tokenizer, False),
    "model: tokenizer_config.json": Reader(_make_model, "tokenizer_config.json", _read_tokenizer, False),
    "run: settings.json": Reader(_make_settings, "settings.json", read_settings, False),
}


@dataclass
class Trial:
    """One accident, and how the reading went.

    Attributes:
        outcome: one of `OUTCOMES`.
        words: the error's, or what was wrong.
    """

    outcome: str
    words: str


def trials(name: str, count: int, seed: int) -> Iterator[Trial]:
    """`count` accidents to the files of a reader, each to a fresh copy."""
    reader, rng = READERS[name], np.random.default_rng((seed, *name.encode()))
    with tempfile.TemporaryDirectory() as place:
        (made := Path(place) / "made").mkdir()
        reader.make(made)
        whole = reader.read(shutil.copytree(made, Path(place) / "whole"))
        files = sorted(
            file.relative_to(made) for file in made.glob(reader.files) if file.is_file() and file.stat().st_size
        )
        for number in range(count):
            copy = shutil.copytree(made, Path(place) / str(number))
            file = copy / files[rng.integers(len(files))]
            content = file.read_bytes()
            file.write_bytes(damage.damaged(content, rng))
            trial = _trial(reader, copy, whole)
            shutil.rmtree(copy)
            yield trial


def _trial(reader: Reader, folder: Path, whole: Any) -> Trial:
    since, complaint = time.monotonic(), ""
    with _standard_error() as said:
        try:
            found = reader.read(folder)
            outcome = "equal" if found == whole else "wrong" if reader.checked else "other values"
        except reader.expected as error:
            outcome, complaint = "refused", str(error)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return Trial("wrong", f"{type(error).__name__}: {error}")
    if outcome == "refused" and str(folder) not in complaint:
        return Trial("wrong", f"the message names no file: {complaint}")
    if text := said():
        return Trial("wrong", f"standard error: {text}")
    if (seconds := time.monotonic() - since) > _SECONDS:
        return Trial("wrong", f"{seconds:.0f} seconds: {complaint}")
    return Trial(outcome, complaint.replace(str(folder), ""))


@contextlib.contextmanager
def _standard_error() -> Iterator[Callable[[], str]]:
    """What is written to standard error by Python or by what it calls; empty where nothing is."""
    with tempfile.TemporaryFile() as file, open(file.fileno(), "w", closefd=False) as words:
        sys.stderr.flush()
        kept, text = os.dup(2), ""
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(words):
                yield lambda: text
        finally:
            words.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read().decode(errors="replace")
