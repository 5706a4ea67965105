"""The table of methods in README.md, made from the method files.

`python docs/methods_table.py` writes it between the two marks; `--check` only says whether it is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora
import jlora.methods
from jlora import docstrings

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- methods -->", "<!-- /methods -->"
#: The matrix on which trained values are counted.
SHAPE = (768, 768)


def methods() -> list[type[jlora.Method]]:
    """The methods that `jlora/methods/__init__.py` names, by name."""
    found = {value for value in vars(jlora.methods).values() if isinstance(value, type)}
    return sorted((cls for cls in found if issubclass(cls, jlora.Method)), key=lambda cls: cls.__name__)


def table() -> str:
    """The table: name, first sentence of the docstring, values trained by the first case, papers."""
    lines = [
        f"| method | what it does | example | trains, of {SHAPE[0]} x {SHAPE[1]} | paper |",
        "|---|---|---|---|---|",
    ]
    for cls in methods():
        case = cls.CASES[0]
        cells = (f"`{cls.__name__}`", docstrings.first_sentence(cls), f"`{case}`", f"{_trained(case):,}", _papers(cls))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """A page's text with the table between its marks made anew.

    Raises:
        ValueError: where the marks are missing.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"the page must have the marks {START} and {END} once each")
    before, rest = text.split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


def _papers(cls: type) -> str:
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in docstrings.papers(cls)) or "–"


def _trained(method: jlora.Method) -> int:
    params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    adapted = jax.eval_shape(lambda params: jlora.adapterize(params, {"w": method}), params)
    return sum(leaf.size for leaf in jax.tree.leaves(adapted.params))


def main() -> int:
    """Write the table, or check it."""
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            print("README.md's table of methods is out of date: run `python docs/methods_table.py`", file=sys.stderr)
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
