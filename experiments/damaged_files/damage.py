"""Ways in which a file comes to harm: bytes lost or changed, and JSON whose values are none that a program wrote."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DEEP = 100_000
#: What a value of a JSON file is replaced with.
VALUES = (None, True, False, 0, -1, 1, 2.5, 10**7, 10**30, 10**400, math.nan, math.inf, "", "text", "../up", "/etc/passwd",
          "nul\0", "\ud800", [], [None], {}, {"a": 1}, [[[[]]]], [1, 2, 3])  # fmt: skip


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The content after one accident, of bytes or (where it is JSON) of values."""
    ways = [*BYTES, *VALUES_OF_JSON] if _is_json(content) else BYTES
    return ways[rng.integers(len(ways))](content, rng)


def _is_json(content: bytes) -> bool:
    return content.lstrip()[:1] == b"{"


def _flipped(content: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(content)))
    return content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :]


def _overwritten(content: bytes, rng: np.random.Generator) -> bytes:
    start, size = int(rng.integers(len(content))), int(rng.integers(1, 64))
    return content[:start] + rng.bytes(size) + content[start + size :]


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content)))]


def _headless(content: bytes, rng: np.random.Generator) -> bytes:
    return content[int(rng.integers(1, len(content))) :]


def _inserted(content: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(content)))
    return content[:at] + rng.bytes(int(rng.integers(1, 16))) + content[at:]


def _repeated(content: bytes, rng: np.random.Generator) -> bytes:
    start, stop = sorted(int(at) for at in rng.integers(0, len(content), 2))
    return content[:stop] + content[start:]


def _zeroed(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    return content[:start] + bytes(len(content) - start)


def _nested(content: bytes, rng: np.random.Generator) -> bytes:
    opening = (b"[", b'{"a":')[int(rng.integers(2))]
    return opening * DEEP


def _replaced(content: bytes, rng: np.random.Generator) -> bytes:
    return _changed(content, rng, lambda holder, key: holder.__setitem__(key, VALUES[rng.integers(len(VALUES))]))


def _removed(content: bytes, rng: np.random.Generator) -> bytes:
    return _changed(content, rng, lambda holder, key: holder.__delitem__(key))


def _doubled(content: bytes, rng: np.random.Generator) -> bytes:
    def double(holder: Any, key: Any) -> None:
        if isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[f"{key}_"] = holder[key]

    return _changed(content, rng, double)


def _renamed(content: bytes, rng: np.random.Generator) -> bytes:
    def rename(holder: Any, key: Any) -> None:
        if isinstance(holder, dict):
            holder[f"{key}s"] = holder.pop(key)
        else:
            holder[key] = [holder[key]]

    return _changed(content, rng, rename)


def _changed(content: bytes, rng: np.random.Generator, change: Callable[[Any, Any], None]) -> bytes:
    """JSON with one change at a place drawn among those of one depth, so that long lists do not take all."""
    tree = json.loads(content)
    places = list(_places(tree, 0))
    deepest = max(depth for depth, _, _ in places)
    wanted = int(rng.integers(deepest + 1))
    chosen = [(holder, key) for depth, holder, key in places if depth == wanted]
    change(*chosen[int(rng.integers(len(chosen)))])
    return json.dumps(tree).encode()


def _places(tree: Any, depth: int) -> Iterator[tuple[int, Any, Any]]:
    if not isinstance(tree, dict | list):
        return
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield depth, tree, key
        yield from _places(value, depth + 1)


BYTES = (_flipped, _overwritten, _cut, _headless, _inserted, _repeated, _zeroed, _nested, lambda content, rng: b"")
# Values more often than bytes, which mostly leave no JSON at all.
VALUES_OF_JSON = (*(_replaced,) * 6, *(_removed,) * 2, *(_doubled,) * 2, *(_renamed,) * 2)
