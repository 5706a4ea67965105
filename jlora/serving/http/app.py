"""The routes: OpenAI's completions and chats, vLLM's loading and unloading of adapters, health, metrics and the page."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jlora.serving.engine import Engine
from jlora.serving.http import asked as asking
from jlora.serving.http.answers import Answers, Failed, joined
from jlora.serving.http.asked import Asked, Limits
from jlora.serving.http.body import Body, read
from jlora.serving.http.guard import Guard
from jlora.serving.http.metrics import Metrics
from jlora.serving.http.page import page
from jlora.serving.http.refusals import Refused, error
from jlora.serving.http.shapes import Shape, event
from jlora.serving.http.shelf import Entry, Shelf
from jlora.serving.http.voice import Voice

Asking = Callable[[Body, Entry, Voice, Limits], Asked]


@dataclass
class Service:
    """What the routes stand on.

    Attributes:
        engine: who answers.
        voice: the model's words.
        shelf: what `model` may name.
        token: what calls must bring, or None.
        hosts: names by which this host may be called, or None for any.
        body: bytes of a call, at most.
        choices: answers to one call, at most; as many as may wait, so that a call that is refused can be taken later.
        draining: whether the server is about to end, and takes no more calls.
    """

    engine: Engine
    voice: Voice
    shelf: Shelf
    token: str | None = None
    hosts: Collection[str] | None = None
    body: int = 2 * 2**20
    choices: int = 64
    draining: bool = False

    def __post_init__(self):
        self.metrics, self.limits = Metrics(self.engine), Limits(self.engine.length, self.choices)


def application(service: Service) -> ASGIApp:
    """The ASGI application of a service."""
    routes = _Routes(service)
    paths = {
        "/v1/completions": ("POST", routes.completions),
        "/v1/chat/completions": ("POST", routes.chat),
        "/v1/models": ("GET", routes.models),
        "/v1/load_lora_adapter": ("POST", routes.load),
        "/v1/unload_lora_adapter": ("POST", routes.unload),
        "/health": ("GET", routes.health),
        "/metrics": ("GET", routes.metrics),
        "/": ("GET", routes.page),
    }
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, (method, endpoint) in paths.items()]
        + [Route("/v1/models/{name:path}", routes.model, methods=["GET"])],
        exception_handlers={
            Refused: lambda request, refused: refused.response(),  # type: ignore[dict-item]
            HTTPException: _no_route,  # type: ignore[dict-item]
            ClientDisconnect: lambda request, gone: Response(status_code=499),
            Exception: lambda request, failed: JSONResponse(error(500, "the server failed; its log says why"), 500),
        },
    )
    return Guard(app, service.metrics, paths, service.token, service.hosts)


def _no_route(request: Request, wrong: HTTPException) -> Response:
    what = {
        404: f"there is nothing at {request.url.path[:200]}",
        405: f"{request.url.path[:200]} takes no {request.method}",
    }
    return JSONResponse(
        error(wrong.status_code, what.get(wrong.status_code, wrong.detail)), wrong.status_code, wrong.headers
    )


class _Routes:
    """One method for each route."""

    def __init__(self, service: Service):
        self._service = service

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, asking.completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, asking.chat)

    async def _answer(self, request: Request, ask: Asking) -> Response:
        service, start = self._service, time.monotonic()
        body = await read(request, service.body)
        name = body.text("model")
        self._check_open()
        entry = service.shelf.find(name)
        while True:
            asked = await asyncio.to_thread(ask, body.copy(), entry, service.voice, service.limits)
            # Between the tokens of a chat and its submission the name must not have got another adapter.
            if service.shelf.holds(entry):
                break
            entry = service.shelf.find(name)
        calls, tokens = service.metrics.of(name)
        answers = Answers(service.engine, service.voice, asked, tokens.inc)
        calls.inc()
        call = _Call(service, answers, Shape(asked, service.voice), start)
        return call if asked.stream else await call.whole(request)

    def _check_open(self) -> None:
        if self._service.draining:
            raise Refused(
                503,
                "the server ends: it answers what it has begun, and takes no more",
                "draining",
                headers={"Retry-After": "5"},
            )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(entry) for entry in self._service.shelf.entries]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._model(self._service.shelf.find(request.path_params["name"])))

    def _model(self, entry: Entry) -> dict[str, Any]:
        """As OpenAI and vLLM tell it; `chat` is whether it has a chat template."""
        return {
            "id": entry.name,
            "object": "model",
            "created": entry.created,
            "owned_by": "jlora",
            "parent": None if entry.adapter is None else self._service.shelf.base,
            "max_model_len": self._service.engine.length - entry.virtual,
            "chat": entry.chat is not None,
        }

    async def load(self, request: Request) -> Response:
        body = await read(request, self._service.body)
        name, path = body.text("lora_name"), body.text("lora_path")
        body.without({"load_inplace": (False,), "base_model_name": (self._service.shelf.base,)})
        body.done()
        self._check_open()
        await self._service.shelf.load(name, path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        body = await read(request, self._service.body)
        name = body.text("lora_name")
        body.ignored("lora_int_id")
        body.done()
        await self._service.shelf.unload(name)
        self._service.metrics.forget(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def health(self, request: Request) -> Response:
        state = self._service.engine.state()
        status = "failed" if state.error else "draining" if self._service.draining or not state.open else "ok"
        told = {"status": status} | ({"error": state.error} if state.error else {})
        return JSONResponse(told, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        return page()


class _Call(Response):
    """A call that is being answered; as a response it is a stream of events. It is cancelled when the client is gone."""

    def __init__(self, service: Service, answers: Answers, shape: Shape, start: float):
        self._service, self._answers, self._shape, self._start = service, answers, shape, start
        self._first = True

    async def whole(self, request: Request) -> Response:
        """The answer at once.

        Raises:
            Refused: where the engine fails.
            ClientDisconnect: where nobody waits for the answer.
        """

        async def written() -> Response:
            pieces = []
            async for piece in self._answers.pieces():
                self._tick()
                pieces.append(piece)
            count = len(self._answers.asked.prompts) * self._answers.asked.n
            answers = [joined(index, pieces) for index in range(count)]
            return JSONResponse(self._shape.whole(answers, self._answers.usage()))

        try:
            return await self._while_there(request.receive, written())
        except Failed as failed:
            raise Refused(500, str(failed), "engine_failed") from failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect):  # nobody is there who could be told
            await self._while_there(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # proxies pass pieces on as they come
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def tell(text: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text, "more_body": more})

        count = len(self._answers.asked.prompts) * self._answers.asked.n
        await tell(b"".join(self._shape.first(index) for index in range(count)))
        try:
            async for piece in self._answers.pieces():
                self._tick()
                await tell(self._shape.piece(piece))
        except Failed as failed:
            await tell(event(error(500, str(failed), "engine_failed")), False)
            return
        await tell(self._shape.last(self._answers.usage()), False)

    def _tick(self) -> None:
        if self._first:
            self._service.metrics.first.observe(time.monotonic() - self._start)
        self._first = False

    async def _while_there(self, receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of some work, which ends with its requests when the client is gone."""
        tasks = [asyncio.ensure_future(each) for each in (work, _gone(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ClientDisconnect
            return tasks[0].result()
        finally:
            self._answers.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._service.metrics.seconds.observe(time.monotonic() - self._start)


async def _gone(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
