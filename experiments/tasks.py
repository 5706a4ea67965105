"""The real tasks on which the studies train: a pretrained model, its data as arrays, a loss and a score.

Classification and similarity use MiniLM (22.6 million parameters) with a new head on the mean of its hidden states; text
uses the 260K-parameter Llama that comes with jlora. Data are read from the folder that `--data` or JLORA_DATA names.
"""

import csv
import functools
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from jlora import models

DATA = Path(os.environ.get("JLORA_DATA", Path(__file__).parents[2] / "shared" / "data"))

#: Rows read of a table; tests read few.
MOST_ROWS: int | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """A model and the data to train and to judge it.

    Attributes:
        name: what it is called in tables.
        kind: "classify", "detect" (of two uneven classes), "regress" (similarity from 0 to 1) or "text".
        apply: `apply(params, inputs) -> outputs`.
        train, test: `{"inputs": {...}, "targets": ...}` as numpy arrays with rows in front.
        params: `params(seed)`, the pretrained params with a head drawn by the seed.
    """

    name: str
    kind: str
    apply: Callable[..., jax.Array]
    train: dict[str, Any]
    test: dict[str, Any]
    params: Callable[[int], Any]

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The mean loss: cross-entropy in nats, or the squared error of a similarity."""
        if self.kind == "regress":
            return jnp.mean((outputs[:, 0] - targets) ** 2)
        if self.kind == "text":
            outputs, targets = outputs[:, :-1], targets[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """Accuracy, Matthews' correlation, Pearson's correlation, or minus the loss of text: more is better."""
        if self.kind == "classify":
            return float(np.mean(np.argmax(outputs, -1) == targets))
        if self.kind == "detect":
            found = np.argmax(outputs, -1)
            # Of two classes it is Pearson's of the labels, and by convention zero where all rows get one label.
            return float(np.corrcoef(found, targets)[0, 1]) if np.ptp(found) and np.ptp(targets) else 0.0
        if self.kind == "regress":
            return float(np.corrcoef(outputs[:, 0], targets)[0, 1])
        return -float(self.loss(jnp.asarray(outputs), jnp.asarray(targets)))

    def spec(self, method: jlora.Method | None) -> dict[Any, Any]:
        """The method on every linear layer of the model, and the head trained whole."""
        head = {r"classifier/(kernel|bias)": jlora.Full()} if self.kind != "text" else {}
        return head if method is None else {**head, jlora.ALL_LINEAR: method}

    @functools.cached_property
    def sites(self) -> jlora.Sites:
        """How the model reads its weights."""
        return jlora.sites(self.apply, self.params(0), rows(self.train, np.arange(2))["inputs"])


def rows(data: dict[str, Any], which: np.ndarray) -> dict[str, Any]:
    """Some rows of a data set."""
    return jax.tree.map(lambda array: array[which], data)


def batches(task: Task, seed: int, steps: int, batch: int, among: np.ndarray | None = None) -> list[np.ndarray]:
    """Row numbers of each step's batch: epochs in an order drawn by the seed, from all rows or `among` some."""
    rng = np.random.default_rng(seed)
    pool = np.arange(len(task.train["targets"])) if among is None else among
    order: list[np.ndarray] = []
    while sum(map(len, order)) < steps * batch:
        order.append(rng.permutation(pool))
    return list(np.concatenate(order)[: steps * batch].reshape(steps, batch))


@functools.cache
def load(name: str, data: Path = DATA) -> Task:
    """A task by name: sst2, banking77, rte, cola, stsb, e2e or shakespeare.

    Raises:
        FileNotFoundError: where the data are not in the folder.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"{data}: no such folder; say --data or set JLORA_DATA")
    if name in _SENTENCES:
        return _sentences(name, data)
    return _text(name, TEXT[name](data))


def _table(path: Path, delimiter: str = "\t", header: bool = True) -> list[list[str]]:
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file, delimiter=delimiter, quoting=quoting))[header:]


# For each task: files, longest text in tokens, the columns of the texts and of the target, and what the target is.
_SENTENCES: dict[str, tuple[Any, ...]] = {
    "sst2": ("sst2/train.tsv", "sst2/test.tsv", 24, (0,), 1, "classify"),
    "banking77": ("banking77/train.csv", "banking77/test.csv", 24, (0,), 1, "classify"),
    "rte": ("rte/train.tsv", "rte/dev.tsv", 64, (1, 2), 3, "classify"),
    "cola": ("cola/in_domain_train.tsv", "cola/in_domain_dev.tsv", 24, (3,), 1, "detect"),
    "stsb": ("stsb_cc/train.tsv", "stsb_cc/test.tsv", 40, (5, 6), 4, "regress"),
}


def model_of(name: str) -> str:
    """What the model of a task is called in reports."""
    return "MiniLM of 22.6 million parameters" if name in _SENTENCES else "Llama of 260,000 parameters"


def encoder(data: Path) -> tuple[Any, Any]:
    """The pretrained encoder of sentences and its params in float32."""
    model, pretrained = models.load(data / "minilm_l6_v2")
    return model, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), pretrained)


def _sentences(name: str, data: Path) -> Task:
    train_file, test_file, length, texts, target, kind = _SENTENCES[name]
    options = {"delimiter": "," if train_file.endswith("csv") else "\t", "header": name not in ("cola", "stsb")}
    tables = [_table(data / file, **options) for file in (train_file, test_file)]
    labels = sorted({row[target] for row in tables[0]})
    tokenizer = models.load_tokenizer(data / "minilm_l6_v2")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)

    def arrays(table: list[list[str]]) -> dict[str, Any]:
        pairs = [row[texts[0]] if len(texts) == 1 else (row[texts[0]], row[texts[1]]) for row in table]
        found = tokenizer.encode_batch(pairs)
        inputs = {
            "tokens": np.array([each.ids for each in found], np.int32),
            "attention_mask": np.array([each.attention_mask for each in found], np.int32),
            "token_types": np.array([each.type_ids for each in found], np.int32),
        }
        if kind == "regress":
            return {"inputs": inputs, "targets": np.array([float(row[target]) / 5 for row in table], np.float32)}
        return {"inputs": inputs, "targets": np.array([labels.index(row[target]) for row in table], np.int32)}

    model, pretrained = encoder(data)
    outputs = (
        2 if kind == "regress" else len(labels)
    )  # a classifier has two outputs at least; regression reads the first
    classifier, _ = models.make_classifier(model, pretrained, outputs, jax.random.key(0))

    def params(seed: int) -> Any:
        return models.make_classifier(model, pretrained, outputs, jax.random.key(1000 + seed))[1]

    def apply(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
        return classifier.apply({"params": params}, **inputs)

    train, test = (arrays(table[:MOST_ROWS]) for table in tables)
    return Task(name, kind, apply, train, test, params)


def _shakespeare(data: Path) -> tuple[str, str]:
    text = (data / "tiny_shakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def _e2e(data: Path) -> tuple[str, str]:
    """Meaning representations with a sentence that says them, one pair a line, as the data set splits them."""
    with zipfile.ZipFile(data / "e2e_nlg" / "e2e-dataset.zip") as archive:

        def read(ending: str) -> str:
            (name,) = [each for each in archive.namelist() if each.endswith(ending) and "__MACOSX" not in each]
            table = csv.reader(io.StringIO(archive.read(name).decode("utf-8")))
            return "\n".join(f"{row[0]} = {row[1]}" for row in list(table)[1:])

        return read("trainset.csv"), read("devset.csv")


#: The tasks that are text.
TEXT = {"e2e": _e2e, "shakespeare": _shakespeare}


def _text(name: str, parts: tuple[str, str], length: int = 64, most: int = 400_000) -> Task:
    """Windows of `length` tokens, of the first `most` characters of the training text and a tenth of that for the test."""
    tokenizer = models.load_tokenizer(models.STORIES260K)
    model, pretrained = models.load(models.STORIES260K)

    def arrays(text: str, most: int) -> dict[str, Any]:
        ids = np.array(tokenizer.encode(text[:most]).ids, np.int32)
        windows = ids[: len(ids) // length * length].reshape(-1, length)
        return {"inputs": {"tokens": windows}, "targets": windows}

    def apply(params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
        return model.apply({"params": params}, inputs["tokens"])

    train, test = arrays(parts[0], most), arrays(parts[1], most // 10)
    return Task(name, "text", apply, train, test, lambda seed: pretrained)
