"""What stands before every call: who may call, and the counting of calls."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jlora.serving.http.metrics import Metrics
from jlora.serving.http.refusals import Refused

#: What may be asked without the token: the page, which holds nothing, and whether the server lives.
OPEN = ("/", "/health")


class Guard:
    """Refuses calls without the token, and those for another host; counts all of them."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: Collection[str], token: str | None, hosts: Collection[str] | None
    ):
        """Args: whom it guards; numbers; paths that are counted by name; the token, or None; names of this host, or None."""
        self._app, self._metrics, self._routes, self._token, self._hosts = app, metrics, routes, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # where nothing is answered: the client is gone

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._refused(Request(scope))
            await (self._app if refused is None else refused.response())(scope, receive, counted)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.calls.labels(route, str(status)).inc()

    def _refused(self, request: Request) -> Refused | None:
        host = request.headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            # A page of another site may have given its own name the address of this machine.
            return Refused(403, f"this server answers to {', '.join(self._hosts)}, not to {host[:100]!r}", "wrong_host")
        if self._token is None or request.url.path in OPEN:
            return None
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are Latin-1 to Starlette, and may be any bytes.
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._token.encode()):
            return None
        message = "wanted the header 'Authorization: Bearer TOKEN' with the token that the server was started with"
        return Refused(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[").lower()
    return host.partition(":")[0].lower()
