"""The methods by family, and a section on each, made from the method files."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
from peft_table import attempt

import jlora
from jlora.analysis.explain import of_one_matrix
from jlora.core.protocol import docstrings
from jlora.core.tree.starts import blank
from jlora.disk import catalog
from jlora.disk.catalog import FAMILIES

#: The matrix on which trained values are counted.
SHAPE = (768, 768)


def methods() -> list[type[jlora.Method]]:
    """The methods that users name, by name."""
    return list(catalog.methods().values())


def families() -> dict[str, list[type[jlora.Method]]]:
    """The methods of each family, in the order of their first papers; those without one last, by name."""
    found: dict[str, list[type[jlora.Method]]] = {name: [] for name in FAMILIES}
    for cls in sorted(methods(), key=lambda cls: docstrings.papers(cls)[:1] or ["~"]):
        found[catalog.family(cls)].append(cls)
    return found


def overview(page: str) -> str:
    """A line for each family: what its methods do, and their names; with a link to its table on a page."""
    rows = ["| family | what its methods do | methods |", "|---|---|---|"]
    for name, members in families().items():
        names = ", ".join(f"`{cls.__name__}`" for cls in members)
        rows.append(f"| [{name}]({page}#{name.lower().replace(' ', '-')}) | {FAMILIES[name]} | {names} |")
    return "\n".join(rows)


def tables() -> str:
    """A heading and a table for each family."""
    parts = [f"## {name}\n\n{table(members)}" for name, members in families().items()]
    return "\n\n".join(parts)


def table(members: list[type[jlora.Method]]) -> str:
    """Name, first sentence of the docstring; what the first case trains and costs, and where it can go; papers."""
    names = ("method", "what it does", "example", f"trains, of {SHAPE[0]} x {SHAPE[1]}", "a pass costs", "merges")
    head = "| " + " | ".join([*names, "in PEFT", "for servers", "paper"]) + " |"
    return "\n".join([head, "|---" * 9 + "|", *(row(cls) for cls in members)])


def row(cls: type[jlora.Method]) -> str:
    """The line of a method."""
    case = cls.CASES[0]
    adapted = _adapted(case)
    numbers = (f"{sum(leaf.size for leaf in jax.tree.leaves(adapted.params)):,}", _cost(adapted))
    places = (_merges(case), attempt(case, "peft"), attempt(case, "serving"))
    cells = (f"`{cls.__name__}`", docstrings.first_sentence(cls), f"`{case}`", *numbers, *places, _papers(cls))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _papers(cls: type) -> str:
    """Links to the papers; the reference itself where it has a year and no arXiv number."""
    links = [f"[{number}](https://arxiv.org/abs/{number})" for number in docstrings.papers(cls)]
    told = docstrings.reference(cls) or ""
    return ", ".join(links) or (told if re.search(r"\b(19|20)\d\d\b", told) else "–")


def _adapted(method: jlora.Method) -> jlora.Adapted:
    """The shapes of a method's arrays."""
    params, spec = {"w_0": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}, {"w_0": method}
    return jax.eval_shape(lambda params: jlora.adapterize(params, spec, prepared=blank(params, spec)), params)


def _cost(adapted: jlora.Adapted) -> str:
    """Multiply-adds for each token beyond those of the matrix itself."""
    (site,) = adapted.plan.sites
    if not site.method.matrix:
        return "nothing"
    update = of_one_matrix(adapted, site)
    if update is None:
        return "forms `w`"
    part = 100 * update.cost(*SHAPE, site.kind == "gather") / (SHAPE[0] * SHAPE[1])
    return f"{float(f'{part:.2g}'):g} %"


def _merges(method: jlora.Method) -> str:
    if not method.mergeable:
        return "no"
    return f"yes, with the {', '.join(method.beside)}" if method.beside else "yes"


def sections() -> str:
    """A section for each method, in the order of the tables: its signature and its docstring."""
    return "\n\n".join(_section(cls) for members in families().values() for cls in members)


def _section(cls: type[jlora.Method]) -> str:
    file = Path(inspect.getfile(cls)).relative_to(Path(jlora.__file__).parents[1])
    arguments = [f"{field.name}: {field.type} = {_default(field)}" for field in dataclasses.fields(cls)]
    call = f"{cls.__name__}({', '.join(arguments)})"
    if len(call) > 100:
        call = "\n".join([f"{cls.__name__}(", *(f"    {each}," for each in arguments), ")"])
    body = as_markdown(inspect.getdoc(cls) or "")
    return f"### {cls.__name__}\n\n```text\n{call}\n```\n\n{body}\n\nIn [`{file}`](../{file})."


def _default(field: dataclasses.Field) -> str:
    """A hyperparameter's default as one writes it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return repr(value) if isinstance(value, str) else str(value)


def as_markdown(docstring: str) -> str:
    """A docstring with its sections as lists and code."""
    before, *rest = re.split(r"^(\w[\w ]*):\n((?:    .*\n?|\n)+)", docstring, flags=re.MULTILINE)
    parts = [before.strip()]
    for title, body, after in zip(rest[::3], rest[1::3], rest[2::3]):
        text = textwrap.dedent(body).strip()
        if title == "Example":
            text = f"```pycon\n{text}\n```"
        elif title in ("Args", "Raises"):
            text = re.sub(r"^(\w[\w, ]*): ", r"- `\1`: ", text, flags=re.MULTILINE)
            text = re.sub(r'^ +("[^"\n]+": )', r"    - \1", text, flags=re.MULTILINE)  # the values of an argument
        parts += [f"**{title}**\n\n{text}", *filter(None, [after.strip()])]
    return "\n\n".join(parts)
