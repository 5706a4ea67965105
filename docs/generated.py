"""What pages show of the code, written into them: `python docs/generated.py`; `--check` only says whether it is up to date.

It stands between two marks, HTML comments on lines of their own, such as `<!-- flags: finetune -->` and `<!-- /flags -->`;
`MARKS` says which there are. So a page reads well in the repository, and nothing that the code knows is kept up by hand.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import methods_table
import peft_table
import verdicts_table

from jlora.core.protocol import docstrings
from jlora.disk import catalog
from jlora.models import families
from jlora.training.cli import build_parser
from jlora.training.folder import CONTENT
from jlora.training.settings import told
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings
from jlora.training.settings.named import named

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_MARK = re.compile(
    r"^<!-- (?P<name>[a-z ]+?)(?:: (?P<argument>[^\n]+?))? -->\n(?P<body>.*?)^<!-- /(?P=name) -->$", re.M | re.S
)
_LONE = re.compile(r"^<!-- /?(?P<name>[a-z ]+?)(?:: [^\n]+?)? -->$", re.M)

Maker = Callable[..., str]


def filled(text: str, makers: Mapping[str, Maker], only: bool = False) -> str:
    """A page's text with what stands between its marks made anew.

    Args:
        text: the page.
        makers: for each mark's name a function of its argument, if it has one, that gives what stands there.
        only: leaves marks without a maker as they are.

    Raises:
        ValueError: for an unknown mark, and for one that has no end or no start.
    """

    def one(found: re.Match[str]) -> str:
        name, argument = found["name"], found["argument"]
        if name not in makers:
            if only:
                return found[0]
            raise ValueError(f"unknown mark {name!r}; the marks are {sorted(makers)}")
        start, end = found[0][: found.start("body") - found.start()], found[0][found.end("body") - found.start() :]
        return f"{start}{makers[name](argument) if argument else makers[name]()}\n{end}"

    if lone := _LONE.search(_MARK.sub("", text)):
        raise ValueError(f"the mark {lone[0]} stands alone; its other half is missing")
    return _MARK.sub(one, text)


def makers(page: Path) -> dict[str, Maker]:
    """What is written into a page, by mark."""
    own = peft_table.TABLES if page == peft_table.PAGE else {}
    return {**MARKS, **{name: functools.partial(_lines, rows) for name, rows in own.items()}}


def _lines(rows: Callable[[], list[str]]) -> str:
    return "\n".join(rows())


def api(argument: str) -> str:
    """A line for each name of a module: `jlora lift merge`, or for all of its `__all__`: `jlora.models`."""
    found = [(value, name.removeprefix("jlora.")) for value, name in api_names(argument)]
    rows = [f"| [`{name}`]({_source(value)}) | {_cell(_first_sentence(value))} |" for value, name in found]
    return "\n".join(["| name | what |", "|---|---|", *rows])


def api_names(argument: str) -> list[tuple[Any, str]]:
    """The values that an `api` mark names, with their public names."""
    module, *names = argument.split()
    found = importlib.import_module(module)
    names = names or [name for name in found.__all__ if callable(getattr(found, name))]
    return [(getattr(found, name), f"{module}.{name}") for name in names]


def _first_sentence(value: Any) -> str:
    paragraph = (inspect.getdoc(value) or "").split("\n\n")[0]
    return re.split(r"(?<=\.)\s", " ".join(paragraph.split()))[0]


def _source(value: Any) -> str:
    return f"../{Path(inspect.getfile(inspect.unwrap(value))).relative_to(ROOT)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def flags(command: str) -> str:
    """The arguments of a command, from its own parser."""
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = [a for a in commands.choices[command]._actions if not isinstance(a, argparse._HelpAction)]
    rows = [f"| {_argument(a)} | {_cell((a.help or '').replace('%%', '%'))} |" for a in actions]
    return "\n".join(["| argument | what |", "|---|---|", *rows])


def _argument(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.dest}`"
    # Many choices are told by the help text.
    few = action.choices is not None and len(list(action.choices)) < 6
    values = ", ".join(map(str, action.choices or ())) if few else str(action.metavar or action.dest.upper())
    values = "" if action.nargs == 0 else f" {values}"
    return ", ".join(f"`{option}{values}`" for option in action.option_strings)


def job_methods() -> str:
    """The values of `--method` of the catalogue: what each does, and what it stands for."""
    rows = [
        "| `--method` | what it does | in a run of 2,000 steps, of any model but the shipped one |",
        "|---|---|---|",
    ]
    recipes = catalog.recipes()
    for name in told.names():
        asked = {each: [0] for each in recipes[name].asks}
        method = named(resolve(Settings(model="DIR", data="FILE", method=name, steps=2000, set=asked)))
        does = docstrings.first_sentence(type(method)).partition(": `")[0].rstrip(".")
        needs = "".join(f", asks for `--set {each}=...`" for each in asked)
        rows.append(f"| `{name}` | {does}{needs} | `{method}` |")
    return "\n".join(rows)


def run_folder() -> str:
    """What lies in the output folder of a run."""
    return "\n".join(["| name | what |", "|---|---|", *(f"| `{name}` | {what} |" for name, what in CONTENT.items())])


def checks() -> str:
    """The checks of the contract, with the first sentence of each."""
    tree = ast.parse((ROOT / "tests" / "contract" / "checks.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]
    rows = [f"| {f.name.removeprefix('check_')} | {(ast.get_docstring(f) or '').splitlines()[0]} |" for f in found]
    return "\n".join(["| check | what it demands |", "|---|---|", *rows])


def measured_table(path: str) -> str:
    """The first table of a results page of an experiment, with what is said above it."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return text[: re.search(r"(^\|.*\n)+", text, re.MULTILINE).end()].strip()  # type: ignore[union-attr]


def model_families() -> str:
    """The classes of models that are read, with the types of `config.json`."""
    found: dict[Any, list[str]] = {}
    for family in families.ALL:
        found.setdefault(family.module, []).extend(family.model_types)
    rows = [
        f"| [`models.{module.__name__}`]({_source(module)}) | {', '.join(f'`{each}`' for each in types)} |"
        for module, types in found.items()
    ]
    return "\n".join(["| class | `model_type` of config.json |", "|---|---|", *rows])


MARKS: dict[str, Maker] = {
    "families": methods_table.overview,
    "methods": methods_table.tables,
    "method pages": methods_table.sections,
    "api": api,
    "flags": flags,
    "job methods": job_methods,
    "run folder": run_folder,
    "model families": model_families,
    "checks": checks,
    "table": measured_table,
    "claims": verdicts_table.ruled,
    "studies": verdicts_table.table,
    "file": lambda path: f"[`{path}`](../{path})",
}


def main() -> int:
    """Write the pages, or check them."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text, makers(page))
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                page.write_text(new, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)}: out of date or now made anew by `python docs/generated.py`", file=sys.stderr)
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
