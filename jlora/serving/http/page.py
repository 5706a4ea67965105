"""The page on which adapters are compared on one prompt: one file, with nothing from elsewhere."""

from __future__ import annotations

import functools
from importlib import resources

from starlette.responses import HTMLResponse, Response

# Nothing from elsewhere may be loaded, and nothing sent elsewhere.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@functools.cache
def _text() -> str:
    return resources.files("jlora.serving.http").joinpath("page.html").read_text(encoding="utf-8")


def page() -> Response:
    """The page."""
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(_text(), headers=headers)
