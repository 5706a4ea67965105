"""A few sentences to train on: a row of the default data is a page, which makes hundreds of batches to validate on."""

import json
import random
from pathlib import Path

WORDS = (
    "the",
    "a",
    "dog",
    "cat",
    "boy",
    "girl",
    "sun",
    "ball",
    "house",
    "saw",
    "had",
    "and",
    "but",
    "with",
    "big",
    "small",
)


def sentences(folder: Path, count: int = 60) -> str:
    """The path of a file of rows in the folder, of six to twelve words each."""
    rng, path = random.Random(0), folder / "sentences.jsonl"
    texts = (" ".join(rng.choices(WORDS, k=rng.randint(6, 12))) for _ in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)
