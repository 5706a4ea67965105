"""The table of methods, and a section on each, made from the method files."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora
from jlora.core.protocol import docstrings
from jlora.disk import catalog

#: The matrix on which trained values are counted.
SHAPE = (768, 768)


def methods() -> list[type[jlora.Method]]:
    """The methods that users name, by name."""
    return list(catalog.methods().values())


def table() -> str:
    """Name, first sentence of the docstring, values trained by the first case, papers."""
    head = f"| method | what it does | example | trains, of {SHAPE[0]} x {SHAPE[1]} | paper |"
    return "\n".join([head, "|---|---|---|---|---|", *(row(cls) for cls in methods())])


def row(cls: type[jlora.Method]) -> str:
    """The line of a method."""
    case = cls.CASES[0]
    cells = (f"`{cls.__name__}`", docstrings.first_sentence(cls), f"`{case}`", f"{_trained(case):,}", _papers(cls))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _papers(cls: type) -> str:
    """Links to the papers; the reference itself where it has a year and no arXiv number."""
    links = [f"[{number}](https://arxiv.org/abs/{number})" for number in docstrings.papers(cls)]
    told = docstrings.reference(cls) or ""
    return ", ".join(links) or (told if re.search(r"\b(19|20)\d\d\b", told) else "–")


def _trained(method: jlora.Method) -> int:
    params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    adapted = jax.eval_shape(lambda params: jlora.adapterize(params, {"w": method}), params)
    return sum(leaf.size for leaf in jax.tree.leaves(adapted.params))


def sections() -> str:
    """A section for each method: its signature and its docstring."""
    return "\n\n".join(_section(cls) for cls in methods())


def _section(cls: type[jlora.Method]) -> str:
    file = Path(inspect.getfile(cls)).relative_to(Path(jlora.__file__).parents[1])
    arguments = [str(each).replace("'", "") for each in inspect.signature(cls).parameters.values()]
    call = f"{cls.__name__}({', '.join(arguments)})"
    if len(call) > 100:
        call = "\n".join([f"{cls.__name__}(", *(f"    {each}," for each in arguments), ")"])
    body = as_markdown(inspect.getdoc(cls) or "")
    return f"## {cls.__name__}\n\n```text\n{call}\n```\n\n{body}\n\nIn [`{file}`](../{file})."


def as_markdown(docstring: str) -> str:
    """A docstring with its sections as lists and code."""
    before, *rest = re.split(r"^(\w[\w ]*):\n(?=    )", docstring, flags=re.MULTILINE)
    parts = [before.strip()]
    for title, body in zip(rest[::2], rest[1::2]):
        text = inspect.cleandoc(body)
        if title == "Example":
            text = f"```pycon\n{text}\n```"
        elif title in ("Args", "Raises"):
            text = re.sub(r"^(\w[\w, ]*): ", r"- `\1`: ", text, flags=re.MULTILINE)
        parts.append(f"**{title}**\n\n{text}")
    return "\n\n".join(parts)
