"""The table of docs/evidence.md: each study's question, size and verdict, taken from its script and its results."""

from __future__ import annotations

import ast
import re
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def studies() -> list[Path]:
    """The results pages of the experiments that come to a verdict."""
    pages = sorted(EXPERIMENTS.glob("*/results.md"))
    return [page for page in pages if "\nVerdict: " in page.read_text(encoding="utf-8")]


def about(results: Path) -> tuple[str, str, str]:
    """The question that a study asks, its command, and the rest of its script's docstring."""
    text = ast.get_docstring(ast.parse((results.parent / "run.py").read_text(encoding="utf-8"))) or ""
    question, command, rest = text.split("\n\n", 2)
    return question, command.strip(), rest


def table(link: str = "../experiments/{}/results.md") -> str:
    """A line for each study; `link` leads to the results of the folder that is put into it."""
    rows = ["| question | size of the study | verdict |", "|---|---|---|"]
    for results in studies():
        told = results.read_text(encoding="utf-8")
        size, verdict = (_line(told, name) for name in ("Size", "Verdict"))
        rows.append(f"| [{about(results)[0]}]({link.format(results.parent.name)}) | {size} | {verdict} |")
    return "\n".join(rows)


def _line(text: str, name: str) -> str:
    found = re.search(rf"^{name}: (.*)$", text, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"a study's results must have a line that begins with {name!r}")
    return found[1].replace("|", "\\|")
