"""Where the tests of the models find data, and small models made on the spot."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"


def shared_data(name: str) -> pathlib.Path:
    """A file or folder of the shared data.

    Raises:
        FileNotFoundError: It is missing.
    """
    root = pathlib.Path(os.environ.get("JLORA_DATA", REPOSITORY.parent / "shared" / "data"))
    path = root / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: test data is missing; set JLORA_DATA to the folder that holds {name}.")
    return path


def quick_jit(function, **options):
    """`jax.jit` that compiles fast rather than well."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def golden(name: str) -> dict[str, np.ndarray]:
    """What transformers computes with the golden model `name`."""
    with np.load(GOLDEN / name / "expected.npz") as file:
        return dict(file)


def copy_of(
    name: str, target: pathlib.Path, drop: tuple[str, ...] = (), add: dict | None = None, **config
) -> pathlib.Path:
    """A copy of a golden model with tensors dropped or added (or replaced) and config keys changed (None: removed)."""
    folder = target / name
    folder.mkdir()
    settings = json.loads((GOLDEN / name / "config.json").read_text()) | config
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if value is not None})
    )
    if drop or add:
        tensors = {
            key: value for key, value in load_file(GOLDEN / name / "model.safetensors").items() if key not in drop
        }
        save_file(tensors | (add or {}), folder / "model.safetensors")
    else:
        shutil.copyfile(GOLDEN / name / "model.safetensors", folder / "model.safetensors")
    return folder


def shard(folder: pathlib.Path) -> list[pathlib.Path]:
    """Cuts `model.safetensors` of a folder in two shards with an index; their paths."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return [folder / file for file in halves]
