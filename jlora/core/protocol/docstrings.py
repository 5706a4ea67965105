"""What the docstring of a method says, taken apart: its formula, its count of trained values, its cost, its source."""

from __future__ import annotations

import inspect
import re

_SECTIONS = ("Args", "Raises", "Example", "Reference", "Returns")


#: An arXiv number after the word or in an address: `arXiv:2106.09685`, `arXiv 2106.09685v2`, `arxiv.org/abs/cs/0101001`.
_ARXIV = re.compile(
    r"arxiv(?:\.org/(?:abs|pdf)/|\s*:\s*|\s+)(\d{4}\.\d{4,5}|[a-z-]+(?:\.[a-z]{2})?/\d{7})", re.IGNORECASE
)


def first_sentence(cls: type) -> str:
    """What the method does, with its formula, as one line."""
    return re.split(r"(?<=[^.]\.)\s", _joined(_text(cls).split("\n\n")[0]))[0]


def count_formula(cls: type) -> str | None:
    """The closed form of the sentence "Trains `...` values", in the method's hyperparameters, `in` and `out`."""
    found = re.search(r"Trains\s+`([^`]+)`\s+values", _text(cls))
    return _joined(found[1]) if found else None


def shared_count_formula(cls: type) -> str | None:
    """The closed form of the sentence "Shares `...` trained values", for all leaves of a method together.

    In the method's hyperparameters; in `in` and `out`, the largest input and output; and in the numbers of `matrices`, of
    `layers`, of `kinds` of leaves, or of `pairs` of matrices.
    """
    found = re.search(r"Shares\s+`([^`]+)`\s+trained\s+values", _text(cls))
    return _joined(found[1]) if found else None


def costs(cls: type) -> str | None:
    """The sentences that begin with "Costs", as one line."""
    body = _joined(re.split(rf"\n(?:{'|'.join(_SECTIONS)}):\n", _text(cls))[0])
    found = [sentence for sentence in re.split(r"(?<=\.)\s+", body) if sentence.startswith("Costs ")]
    return " ".join(found) or None


def reference(cls: type) -> str | None:
    """The section "Reference", as one line."""
    found = re.search(rf"\nReference:\n(.*?)(?=\n(?:{'|'.join(_SECTIONS)}):\n|\Z)", _text(cls), re.DOTALL)
    return _joined(found[1]) if found else None


def papers(cls: type) -> list[str]:
    """The arXiv numbers, in the order of the docstring."""
    return list(dict.fromkeys(_ARXIV.findall(_joined(_text(cls)))))


def arguments(cls: type) -> dict[str, str]:
    """What the section "Args" says of each, as one line."""
    found = re.search(r"\nArgs:\n(.*?)(?=\n\S|\Z)", _text(cls), re.DOTALL)
    lines = inspect.cleandoc("\n" + found[1]) if found else ""
    parts = re.split(r"^(\w+(?:, \w+)*): ", lines, flags=re.MULTILINE)[1:]
    return {name: _joined(text) for names, text in zip(parts[::2], parts[1::2]) for name in names.split(", ")}


def _text(cls: type) -> str:
    """The class's own docstring, or nothing: what a parent's says need not hold, and a dataclass's made-up one says nothing."""
    text = inspect.cleandoc(vars(cls).get("__doc__") or "")
    return "" if text.startswith(f"{cls.__name__}(") else text


def _joined(text: str) -> str:
    return " ".join(text.split())
