"""MkDocs hooks: pages that are files of the repository, and marks in pages that become text made from the code.

README.md is the first page; CHANGELOG.md and CONTRIBUTING.md are pages too. A mark is an HTML comment on its own line,
such as `<!-- flags: finetune -->`; `MARKS` says which there are. So nothing that the code knows is written down twice.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
import methods_table

ROOT = Path(__file__).parents[1]
#: Files of the repository that are pages, by the page's name.
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files, config):
    """Adds the pages that lie outside of `docs`."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=relinked((ROOT / source).read_text(encoding="utf-8"))))
    for results in _studies():
        for picture in sorted(results.parent.glob("*.png")):
            name = f"evidence/{results.parent.name}/{picture.name}"
            files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def _studies() -> list[Path]:
    """The results pages of the experiments that come to a verdict."""
    pages = sorted((ROOT / "experiments").glob("*/results.md"))
    return [page for page in pages if "\nVerdict: " in page.read_text(encoding="utf-8")]


def studies() -> str:
    """The verdicts of all studies in a table, then each study's results."""
    rows, pages = ["| question | verdict |", "|---|---|"], []
    for results in _studies():
        name = results.parent.name
        about = ast.get_docstring(ast.parse((results.parent / "run.py").read_text(encoding="utf-8"))) or ""
        question, _, detail = about.partition("\n\n")
        text = results.read_text(encoding="utf-8")
        verdict = re.search(r"^Verdict: (.*)$", text, flags=re.MULTILINE)
        assert verdict is not None
        rows.append(f"| [{question}](#{name.replace('_', '-')}) | {verdict[1]} |")
        command, _, rest = detail.partition("\n\n")
        text = re.sub(r"\]\(([\w]+\.png)\)", rf"](evidence/{name}/\1)", text)
        heading = f"## {question} {{#{name.replace('_', '-')}}}"
        pages += [heading, "", "```bash", command.strip(), "```", "", rest, "", text]
    return "\n".join([*rows, "", *pages])


def on_page_markdown(markdown, page, config, files):
    """Replaces the marks of a page, and takes out the hidden set-up of its examples."""
    return expanded(re.sub(r"^<!-- setup\n.*?^-->\n", "", markdown, flags=re.MULTILINE | re.DOTALL))


def relinked(text: str) -> str:
    """The links of a file at the repository's top, as links between pages."""
    for page, source in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text.replace("](docs/", "](")


def expanded(markdown: str) -> str:
    """A page with its marks replaced.

    Raises:
        PluginError: for a mark that does not exist.
    """

    def one(found: re.Match[str]) -> str:
        name, argument = found["name"], found["argument"]
        if name not in MARKS:
            raise PluginError(f"unknown mark {found[0]!r}; the marks are {sorted(MARKS)}")
        return MARKS[name](argument) if argument else MARKS[name]()

    return re.sub(r"^<!-- (?P<name>[a-z ]+?)(: (?P<argument>[^\n]+?))? -->$", one, markdown, flags=re.MULTILINE)


def method_pages() -> str:
    """The table of methods, and the documentation of each."""
    # Without the functions of the protocol, which are the same for all.
    pages = [_documented(cls, f"jlora.{cls.__name__}", ", members: false") for cls in methods_table.methods()]
    return "\n".join([methods_table.table(), "", *pages])


def file_text(path: str) -> str:
    """A Python file of the repository."""
    return f"```python\n{(ROOT / path).read_text(encoding='utf-8')}```"


def checks() -> str:
    """The checks of the contract, with the first sentence of each."""
    tree = ast.parse((ROOT / "tests" / "contract" / "checks.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]
    rows = [
        f"| {node.name.removeprefix('check_')} | {(ast.get_docstring(node) or '').splitlines()[0]} |" for node in found
    ]
    return "\n".join(["| check | what it demands |", "|---|---|", *rows])


def api(argument: str) -> str:
    """The documentation of names of a module: `jlora lift merge`, or all of its `__all__`: `jlora.models`."""
    module, *names = argument.split()
    found = importlib.import_module(module)
    names = names or [name for name in found.__all__ if callable(getattr(found, name))]
    return "\n".join(_documented(getattr(found, name), f"{module}.{name}") for name in names)


def _documented(value: Any, name: str, more: str = "") -> str:
    """A directive under the public name, with the path of the definition: `jlora.lift` is a module's path too."""
    options = f"    options: {{heading: {name}, toc_label: {name.rpartition('.')[2]}{more}}}"
    return f"::: {value.__module__}.{value.__qualname__}\n{options}\n"


def run_folder() -> str:
    """What lies in the output folder of a run."""
    from jlora.training.folder import CONTENT

    return "\n".join(["| name | what |", "|---|---|", *(f"| `{name}` | {what} |" for name, what in CONTENT.items())])


def flags(command: str) -> str:
    """The arguments of a command, from its own parser."""
    from jlora.training.cli import build_parser

    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    rows = ["| argument | what |", "|---|---|"]
    for action in commands.choices[command]._actions:
        if not isinstance(action, argparse._HelpAction):
            rows.append(
                f"| {_argument(action)} | {(action.help or '').replace('%%', '%').replace('|', chr(92) + '|')} |"
            )
    return "\n".join(rows)


def _argument(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.dest}`"
    values = (
        ""
        if action.nargs == 0
        else (" " + ", ".join(action.choices) if action.choices else f" {action.metavar or action.dest.upper()}")
    )
    return ", ".join(f"`{option}{values}`" for option in action.option_strings)


def measured_table(path: str) -> str:
    """The table that a results page of an experiment begins with."""
    return (ROOT / path).read_text(encoding="utf-8").split("\n\n")[0]


MARKS: dict[str, Callable[..., str]] = {
    "table": measured_table,
    "method pages": method_pages,
    "file": file_text,
    "checks": checks,
    "api": api,
    "run folder": run_folder,
    "studies": studies,
    "flags": flags,
    # These say where a table stands that is written into the page itself.
    "methods": str,
    "kinds": str,
    "settings": str,
}
