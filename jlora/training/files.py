"""Files that are never half-written, and the words for a disk that is full."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file so that at every moment it has either its old content or all of the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON whole, see `write_whole`."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that there is no room left."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # Orbax writes arrays in C++, whose errors arrive as text.
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
