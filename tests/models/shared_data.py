"""Where the tests of the models find data, and how they compare."""

import os
import pathlib

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
