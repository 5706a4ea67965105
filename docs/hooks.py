"""MkDocs hooks: pages that are files of the repository, and what the site shows in more detail than the repository does.

README.md is the first page; CHANGELOG.md and CONTRIBUTING.md are pages too, and so are notebooks, without a plugin. What pages
show of the code is written into them by `docs/generated.py`; between some of its marks the site has more: whole docstrings,
files and results.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
import generated
import methods_table
import verdicts_table

ROOT = Path(__file__).parents[1]
#: Files of the repository that are pages, by the page's name.
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files, config):
    """Adds the pages that lie outside of `docs`, and the figures of the studies."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=relinked((ROOT / source).read_text(encoding="utf-8"))))
    for notebook in (ROOT / "docs").glob("*.ipynb"):
        files.append(File.generated(config, f"{notebook.stem}.md", content=notebook_text(notebook)))
    for results in verdicts_table.studies():
        for picture in sorted(results.parent.glob("*.png")):
            name = f"evidence/{results.parent.name}/{picture.name}"
            files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Puts what the site shows between the marks, and takes out the hidden set-up of examples."""
    text = re.sub(r"^<!-- setup\n.*?^-->\n", "", markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", text)
    # Files that are no pages have no place on the site: their names stay, without the link.
    return re.sub(r"\[([^]]+)\]\(\.\./[^)]+\)", r"\1", generated.filled(text, ON_SITE, only=True))


def notebook_text(path: Path) -> str:
    """The cells of a notebook as a page."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if code else text for text, code in texts) + "\n"


def relinked(text: str) -> str:
    """The links of a file at the repository's top, as links between pages."""
    for page, source in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text.replace("](docs/", "](")


def method_pages() -> str:
    """The documentation of each method, without the functions of the protocol, which are the same for all."""
    ordered = [cls for members in methods_table.families().values() for cls in members]
    return "\n".join(_documented(cls, f"jlora.{cls.__name__}", ", members: false") for cls in ordered)


def api(argument: str) -> str:
    """The documentation of the names of an `api` mark."""
    return "\n".join(_documented(value, name) for value, name in generated.api_names(argument))


def _documented(value: Any, name: str, more: str = "") -> str:
    """A directive under the public name, with the path of the definition, where the docstring is."""
    options = f"    options: {{heading: {name}, toc_label: {name.rpartition('.')[2]}{more}}}"
    return f"::: {value.__module__}.{value.__qualname__}\n{options}\n"


def file_text(path: str) -> str:
    """A Python file of the repository."""
    return f"```python\n{(ROOT / path).read_text(encoding='utf-8')}```"


def studies() -> str:
    """The verdicts of all studies in a table, then each study's results."""
    pages = []
    for results in verdicts_table.studies():
        name = results.parent.name
        question, command, rest = verdicts_table.about(results)
        text = re.sub(r"\]\(([\w]+\.png)\)", rf"](evidence/{name}/\1)", results.read_text(encoding="utf-8"))
        pages += [f"## {question} {{#{name}}}", "", "```bash", command, "```", "", rest, "", text]
    return "\n".join([verdicts_table.table("#{}"), "", *pages])


ON_SITE = {"method pages": method_pages, "api": api, "file": file_text, "studies": studies}
