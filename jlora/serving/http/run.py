"""A server process: its socket, its signals and its end."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from jlora.serving.http.app import Service, application

# After the engine has finished everything: for clients that don't read what was written.
_LAST_SECONDS = 10


def is_local(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket at that address, not yet listening.

    Raises:
        OSError: where it is taken, or no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A server that was killed leaves its address in a state in which others must wait.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(f"can't listen at {host}:{port}: {error.strerror or error}") from error
    return found


def configured(service: Service) -> uvicorn.Config:
    """The service as uvicorn serves it."""
    return uvicorn.Config(
        application(service),
        log_level="warning",
        access_log=False,
        lifespan="off",
        loop="asyncio",
        http="h11",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )


class _Server(uvicorn.Server):
    """The first SIGTERM or Ctrl-C lets it finish what it has begun, the second ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service, say: Callable[[str], None], what: str):
        super().__init__(config)
        self._service, self._say, self._what = service, say, what

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._say(f"serves {self._what} (Ctrl-C ends it)")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        state = self._service.engine.state()
        self._say(f"ends after {state.running} running and {state.waiting} waiting requests; again to end at once")
        try:
            self._service.engine.close(drain=True)
        finally:
            self.should_exit = True


def serve(service: Service, place: socket.socket, say: Callable[[str], None], what: str) -> None:
    """Serves until SIGTERM or Ctrl-C, with an engine that has been started.

    Args:
        service: what is served.
        place: where.
        say: takes what a user must know.
        what: what is served, and where, in words.
    """
    config = configured(service)
    try:
        _Server(config, service, say, what).run(sockets=[place])
    finally:
        service.engine.close(drain=False)
        place.close()
