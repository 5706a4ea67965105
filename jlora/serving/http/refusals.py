"""Why a call is refused, in the form of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A call that is not answered.

    Attributes:
        status: HTTP's.
        param: the field of the body that is at fault, or None.
        code: what it is, for programs.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def response(self) -> JSONResponse:
        """The answer that says so."""
        return JSONResponse(error(self.status, str(self), self.code, self.param), self.status, self.headers)


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad(param: str | None, message: str, code: str | None = None) -> Refused:
    """A field of the body is wrong; the message goes on after its name."""
    return Refused(400, f"{param} {message}" if param else message, code, param)
