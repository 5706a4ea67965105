"""`summary`: the adapted leaves as a table."""

from __future__ import annotations

from jlora import paths
from jlora.core.protocol.method import Site
from jlora.core.tree.adapted import Adapted, count


def summary(adapted: Adapted) -> str:
    """A table of the adapted leaves: path, shape, roles, method and number of trained values."""
    rows = [("leaf", "shape", "in x out", "method", "trained")]
    for site in adapted.plan.sites:
        trained = count(paths.lookup(adapted.params, site.keys))
        rows.append((site.path, "x".join(map(str, site.shape)), _matrix_text(site), str(site.method), f"{trained:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    total, base = count(adapted.params), count(adapted.base)
    lines.append(f"trained {total:,} of {base:,} values in the base ({100 * total / max(base, 1):.2f} %)")
    return "\n".join(lines)


def _matrix_text(site: Site) -> str:
    if not site.method.matrix:
        return "-"
    stacked = "".join(f"{size} of " for size in site.batch_shape)
    return f"{stacked}{site.in_size} x {site.out_size}"
