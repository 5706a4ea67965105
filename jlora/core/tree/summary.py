"""`summary`: the adapted leaves as a table."""

from __future__ import annotations

from jlora import paths
from jlora.core.protocol.method import Method, Site
from jlora.core.protocol.stored import Stored, kept_bytes
from jlora.core.tree.adapted import SHARED, Adapted, count


def summary(adapted: Adapted) -> str:
    """A table of the adapted leaves: path, shape, roles, method and number of trained values; what leaves share; codes."""
    rows = [("leaf", "shape", "in x out", "method", "trained")]
    for site in adapted.plan.sites:
        trained = count(paths.lookup(adapted.params, site.keys))
        rows.append((site.path, "x".join(map(str, site.shape)), _matrix_text(site), str(site.method), f"{trained:,}"))
    for method, (path, trained) in shared_counts(adapted).items():
        rows.append((path, "-", "-", str(method), f"{trained:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    total, base = count(adapted.params), count(adapted.base)
    lines += _kept_as(adapted)
    lines.append(f"trained {total:,} of {base:,} values in the base ({100 * total / max(base, 1):.2f} %)")
    return "\n".join(lines)


def _kept_as(adapted: Adapted) -> list[str]:
    """For each code of the base a line: how many leaves, weights and bits for each."""
    leaves = [leaf for leaf in paths.leaves(adapted.base) if isinstance(leaf, Stored)]
    lines = []
    for code in dict.fromkeys(leaf.code for leaf in leaves):
        mine = [leaf for leaf in leaves if leaf.code == code]
        size, nbytes = sum(leaf.size for leaf in mine), kept_bytes(mine)
        bits, room = 8 * nbytes / size, nbytes / 1e6
        lines.append(f"{len(mine)} leaves kept as {code}: {size:,} values of {bits:.3f} bits, {room:,.1f} MB")
    return lines


def shared_counts(adapted: Adapted) -> dict[Method, tuple[str, int]]:
    """For each method whose leaves share trained arrays the path of these in `adapted.params`, and the number of values."""
    names = adapted.plan.shared_names().items()
    found = {
        method: (f"{SHARED}/{name}", count(paths.lookup(adapted.params, (SHARED, name)))) for method, name in names
    }
    return {method: (path, trained) for method, (path, trained) in found.items() if trained}


def _matrix_text(site: Site) -> str:
    if not site.method.matrix:
        return "-"
    stacked = "".join(f"{size} of " for size in site.batch_shape)
    return f"{stacked}{site.in_size} x {site.out_size}"
