"""The tables of docs/evidence.md: what each study asks and found, taken from its script, its criterion and its results."""

from __future__ import annotations

import ast
import json
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
    """A line for each study of the older rules; `link` leads to the results of the folder that is put into it."""
    rows = ["| question | size of the study | verdict |", "|---|---|---|"]
    for results in studies():
        if _criterion(results).exists():
            continue
        told = results.read_text(encoding="utf-8")
        size, verdict = (_lines(told, name)[0] for name in ("Size", "Verdict"))
        rows.append(f"| [{about(results)[0]}]({link.format(results.parent.name)}) | {size} | {verdict} |")
    return "\n".join(rows)


def ruled(folder: str = "../experiments/{}") -> str:
    """A line for each claim that was tried by the rules of experiments/README.md, the newest criterion first."""
    head = "| claim | paper | ours | verdict | cost | written down |"
    rows = [head, "|---|---|---|---|---|---|"]
    held = [
        (json.loads(_criterion(each).read_text(encoding="utf-8")), each)
        for each in studies()
        if _criterion(each).exists()
    ]
    for criterion, results in sorted(held, key=lambda pair: pair[0]["registered"], reverse=True):
        at, told = folder.format(results.parent.name), results.read_text(encoding="utf-8")
        found = [_lines(told, name) for name in ("Paper", "Ours", "Verdict")]
        if {len(each) for each in found} != {len(criterion["criteria"])}:
            raise ValueError(f"{results} must say what follows for each of its {len(criterion['criteria'])} criteria")
        cost = _lines(told, "Cost")[0].rstrip(".")
        links = ", ".join(f"[{name}]({at}/{file})" for name, file in FILES.items())
        for one, paper, ours, verdict in zip(criterion["criteria"], *found):
            word = verdict.removesuffix(f": {one['claim']}.")
            told_of = (f"{one['claim']} ({links})", paper, ours, word, cost, criterion["registered"])
            rows.append(f"| {' | '.join(told_of)} |")
    return "\n".join(rows)


#: What a claim links to.
FILES = {"script": "run.py", "criterion": "criterion.json", "runs": "results.jsonl", "results": "results.md"}


def _criterion(results: Path) -> Path:
    return results.parent / "criterion.json"


def _lines(text: str, name: str) -> list[str]:
    found = re.findall(rf"^{name}: (.*)$", text, flags=re.MULTILINE)
    if not found:
        raise ValueError(f"a study's results must have a line that begins with {name!r}")
    return [each.replace("|", "\\|") for each in found]
