"""HTTP in, HTTP out: the routes of `pixtral serve`. Knows no tokens and no template."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from pixtral_cli import __version__
from pixtral_cli.server import page, wire
from pixtral_cli.server.errors import ApiError
from pixtral_cli.server.json_body import parse_json
from pixtral_cli.server.service import Events, Service
from pixtral_cli.server.stream import Chunks
from pixtral_cli.server.wire import Ask, Envelope

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
LARGE_BODY = 256 * 1024
METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"
Result = TypeVar("Result")
access = logging.getLogger("pixtral.access")


class ClientLeft(Exception):
    """Nobody waits for the answer any longer."""


def create_app(service: Service) -> FastAPI:
    """The app; what guards it is put around it (`guard.guarded`)."""
    app = FastAPI(title="pixtral", version=__version__, docs_url=None, redoc_url=None)
    routes = Routes(service)
    for path, method, endpoint in routes.table():
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    app.router.routes.extend(page.routes())
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(Exception, _failed)
    return app


class Routes:
    """Each takes a request and gives its response; what is refused is raised as ApiError."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.fingerprint = f"pixtral-{__version__}-{service.model.encoding}"

    def table(self) -> list[tuple[str, str, Any]]:
        return [
            ("/v1/chat/completions", "POST", self.chat),
            ("/v1/completions", "POST", self.completions),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{name:path}", "GET", self.model),
            ("/predict", "POST", self.predict),
            ("/tokenize", "POST", self.tokenize),
            ("/detokenize", "POST", self.detokenize),
            ("/health", "GET", self.health),
            ("/ready", "GET", self.ready),
            ("/metrics", "GET", self.metrics),
            ("/version", "GET", self.version),
        ]

    async def chat(self, request: Request) -> Response:
        return await self.respond(request, await self._parsed(request, wire.chat))

    async def completions(self, request: Request) -> Response:
        return await self.respond(request, await self._parsed(request, wire.completion))

    async def predict(self, request: Request) -> Response:
        return await self.respond(request, await self._parsed(request, wire.predict))

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.service.names]})

    async def model(self, name: str) -> Response:
        self.service.check_name(name)
        return JSONResponse(self._model(name))

    async def tokenize(self, request: Request) -> Response:
        given = await self._parsed(request, wire.tokenize)
        self.service.check_name(given.model)
        body = given.model_dump(exclude_none=True, by_alias=True)
        made = self.service.prompt(given.prompt, body.get("messages"), body.get("tools"))
        prompt = await until_left(request, made)
        answer: dict[str, Any] = {
            "tokens": prompt.token_ids,
            "count": len(prompt.token_ids),
            "max_model_len": self.service.model.max_length,
        }
        if prompt.images:
            answer["images"] = [
                {"width": image.width, "height": image.height, "tokens": image.tokens} for image in prompt.images
            ]
        return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        given = await self._parsed(request, wire.detokenize)
        self.service.check_name(given.model)
        return JSONResponse({"prompt": await self.service.text_of(given.tokens)})

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        if not self.service.ready:
            raise ApiError(503, "The server is not ready.", "server_error", code="not_ready")
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        return PlainTextResponse(self.service.metrics.exposition(), media_type=METRICS_TYPE)

    async def version(self) -> Response:
        return JSONResponse({"version": __version__})

    async def respond(self, request: Request, ask: Ask) -> Response:
        """The answer as one object or as a stream, which begins with the first token: until then errors have a status."""
        self.service.check_name(ask.model)
        salt = request.scope.get("state", {}).get("key_salt", b"")
        envelope = Envelope.new(ask.kind, ask.model or self.service.names[0], self.fingerprint)
        token_bytes = self.service.model.processor.tokenizer.token_bytes
        events = self.service.answer(ask, salt)
        if not ask.stream:
            replies = await until_left(request, _whole(events, ask.answers))
            return JSONResponse(wire.answer(envelope, replies, ask.n, token_bytes))
        first = await until_left(request, anext(events))
        return EventStream(first, events, Chunks(envelope, ask.answers, ask.n, token_bytes, ask.include_usage))

    async def _parsed(self, request: Request, parse: Any) -> Any:
        body = await request.body()
        if len(body) < LARGE_BODY:
            return parse(parse_json(body))
        return await self.service.work(lambda: parse(parse_json(body)))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.service.started_at,
            "owned_by": "pixtral",
            "max_model_len": self.service.model.max_length,
        }


class EventStream(Response):
    """Sends what comes until it ends or the client leaves; then nothing of it is computed any longer."""

    def __init__(self, first: Events, events: AsyncGenerator[Events], chunks: Chunks) -> None:
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self.first, self.events, self.chunks = first, events, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            with suppress(ClientLeft):
                await while_there(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _write(send, self.chunks.opening() + self.chunks.of(self.first))
        try:
            async for events in self.events:
                await _write(send, self.chunks.of(events))
            await _write(send, self.chunks.closing())
        except ApiError as error:
            await _write(send, b"data: " + error.as_response().body + b"\n\n")
        await send({"type": "http.response.body", "body": b""})


async def _write(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def until_left(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives; it is cancelled when the client leaves. Raises ClientLeft."""
    return await while_there(request.receive, work)


async def while_there(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """As `until_left`; `receive` has no body left to give."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _whole(events: AsyncGenerator[Events], answers: int) -> list[Any]:
    replies: list[Any] = [None] * answers
    async with aclosing(events):
        async for batch in events:
            for place, event in batch:
                if event.reply is not None:
                    replies[place] = event.reply
    return replies


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.as_response()


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        refusal = ApiError(404, f"There is nothing at {request.url.path}.", code="unknown_path")
    elif error.status_code == 405:
        refusal = ApiError(
            405, f"{request.method} is not for {request.url.path}.", code="wrong_method", headers=(error.headers or {}).items()
        )
    else:
        refusal = ApiError(error.status_code, str(error.detail))
    return refusal.as_response()


async def _failed(request: Request, error: Exception) -> Response:
    return ApiError(500, "The server failed to answer this request.", "server_error", code="internal_error").as_response()
