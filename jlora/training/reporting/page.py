"""The parts of an HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 860px; margin: 2.5em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin-bottom: .1em; } h2 { font-size: 1.1em; margin-top: 2em; color: #3b6ea5; }
p.about { color: #666; margin-top: 0; } p.wrong { background: #fbe9e5; border-left: 4px solid #c8553d; padding: .6em .9em; }
img { width: 100%; }
table { border-collapse: collapse; font-size: .9em; }
td, th { padding: .25em 1.2em .25em 0; text-align: left; vertical-align: top; }
th { color: #666; font-weight: 600; border-bottom: 1px solid #ccc; } td.number, th.number { text-align: right; }
td:nth-child(2) { white-space: nowrap; }
summary { font-size: 1.1em; font-weight: 600; margin-top: 2em; color: #3b6ea5; cursor: pointer; }
.figures { display: flex; flex-wrap: wrap; gap: 1em; margin: 1.4em 0; padding: 0; }
.figures div { flex: 1; min-width: 150px; border: 1px solid #ddd; border-radius: 8px; padding: .6em .9em; }
.figures b { display: block; font-size: 1.35em; } .figures span { color: #666; font-size: .85em; }
pre { background: #f5f6f8; border-radius: 8px; padding: .8em 1em; font-size: .88em;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre em { color: #888; font-style: normal; } code { font-size: .92em; } .wide { overflow-x: auto; }
tr.best td { font-weight: 600; background: #eef5ee; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole page of a title (a plain text) and parts (HTML)."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def image(png: bytes, words: str) -> str:
    """A picture inside of the page, with words for those who don't see it."""
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def figures(shown: Iterable[tuple[str, str]]) -> str:
    """Large figures side by side, each with a line of words."""
    cells = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>" for value, label in shown
    )
    return f'<div class="figures">{cells}</div>'


def folded(title: str, content: str) -> str:
    """Content that shows when its title is clicked."""
    return f"<details><summary>{title}</summary>{content}</details>"


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = (), best: int | None = None
) -> str:
    """A table of plain texts.

    Args:
        header: names of the columns.
        rows: the rows.
        numbers: columns of numbers, which stand at the right.
        best: a row to show as the best one.
    """

    def cells(tag: str, values: Sequence[Any]) -> str:
        kinds = [' class="number"' if index in numbers else "" for index in range(len(values))]
        return "".join(f"<{tag}{kind}>{html.escape(str(value))}</{tag}>" for kind, value in zip(kinds, values))

    def line(number: int, row: Sequence[Any]) -> str:
        mark = ' class="best"' if number == best else ""
        return f"<tr{mark}>{cells('td', row)}</tr>"

    lines = "".join(line(number, row) for number, row in enumerate(rows))
    return f'<div class="wide"><table><tr>{cells("th", header)}</tr>{lines}</table></div>'
