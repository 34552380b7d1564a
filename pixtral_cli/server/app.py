"""HTTP in, HTTP out: the routes of `pixtral serve`. Knows no tokens and no template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from pixtral_cli import __version__
from pixtral_cli.generate import Reply
from pixtral_cli.server import openapi, page, replies, wire
from pixtral_cli.server.errors import ApiError
from pixtral_cli.server.json_body import parse_json
from pixtral_cli.server.metrics import CONTENT_TYPE as METRICS_TYPE
from pixtral_cli.server.openapi import OPERATIONS
from pixtral_cli.server.problems import refusal_of
from pixtral_cli.server.replies import Envelope
from pixtral_cli.server.service import Events, Metrics, Service
from pixtral_cli.server.stream import Chunks
from pixtral_cli.server.wire import Ask

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
LARGE_BODY = 256 * 1024
Result = TypeVar("Result")


class ClientLeft(Exception):
    """Nobody waits for the answer any longer."""


def create_app(service: Service) -> FastAPI:
    """The app; what guards it is put around it (`guard.guarded`)."""
    app = FastAPI(title="pixtral", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    routes = Routes(service)
    for operation in OPERATIONS:
        methods = ["GET", "HEAD"] if operation.method == "GET" else [operation.method]
        path, endpoint = operation.path.replace("{name}", "{name:path}"), getattr(routes, operation.name)
        app.add_api_route(path, endpoint, methods=methods, response_model=None)
    app.add_route("/openapi.json", routes.openapi)
    app.add_route("/docs", routes.docs)
    app.router.routes.extend(page.routes())
    for kind, handler in HANDLERS:
        app.add_exception_handler(kind, handler)
    return app


class Routes:
    """Each takes a request and gives its response; what is refused is raised as ApiError."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.fingerprint = f"pixtral-{__version__}-{service.model.encoding}"

    async def chat(self, request: Request) -> Response:
        return await self.respond(request, await self._parsed(request, wire.chat))

    async def completions(self, request: Request) -> Response:
        return await self.respond(request, await self._parsed(request, wire.completion))

    async def predict(self, request: Request) -> Response:
        return await self.respond(request, await self._parsed(request, wire.predict))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.service.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.service.check_name(name)
        return JSONResponse(self._model(name))

    async def tokenize(self, request: Request) -> Response:
        given = await self._parsed(request, wire.tokenize)
        self.service.check_name(given.model)
        body = given.model_dump(exclude_none=True, by_alias=True)
        made = self.service.prompt(given.prompt, body.get("messages"), body.get("tools"))
        prompt = await while_there(request.receive, made)
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

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        if not self.service.ready:
            raise ApiError(503, "The server is not ready.", "server_error", code="not_ready")
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.service.metrics.exposition(), media_type=METRICS_TYPE)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi.document(OPERATIONS, "pixtral", __version__))

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(openapi.page(OPERATIONS, "pixtral", __version__), headers=openapi.DOCS_HEADERS)

    async def respond(self, request: Request, ask: Ask) -> Response:
        """The answer as one object or as a stream.

        A stream begins with the first token: what fails before that has an HTTP status of its own.
        """
        service = self.service
        service.check_name(ask.model)
        state = request.scope.setdefault("state", {})
        events = service.answer(ask, state.get("key_salt", b""))
        envelope = Envelope.new(ask.kind, ask.model or service.names[0], self.fingerprint)
        token_bytes = service.model.processor.tokenizer.token_bytes
        if ask.stream:
            first = await while_there(request.receive, anext(events))
            chunks = Chunks(envelope, ask.answers, ask.n, token_bytes, ask.include_usage)
            return EventStream(first, events, chunks, service.metrics)
        whole = await while_there(request.receive, _whole(events, ask.answers))
        answer = replies.answer(envelope, whole, ask.n, token_bytes)
        state["tokens"] = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
        return JSONResponse(answer)

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

    def __init__(self, first: Events, events: AsyncGenerator[Events], chunks: Chunks, metrics: Metrics) -> None:
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self.first, self.events, self.chunks, self.metrics = first, events, chunks, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            with suppress(ClientLeft):
                await while_there(receive, self._send(scope, send))

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _write(send, self.chunks.opening() + self.chunks.of(self.first))
        try:
            async for events in self.events:
                await _write(send, self.chunks.of(events))
        except ApiError as error:
            self.metrics.error("server_error")
            await _write(send, b"data: " + error.as_response().body + b"\n\n")
        else:
            used = self.chunks.usage()
            scope["state"]["tokens"] = used["prompt_tokens"], used["completion_tokens"]
            await _write(send, self.chunks.closing())
        await send({"type": "http.response.body", "body": b""})


class NoResponse(Response):
    """For a client that has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


async def _write(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def while_there(receive: Receive, work: Awaitable[Result]) -> Result:
    """What `work` gives; it is cancelled when the client leaves. `receive` has no body left to give.

    Raises:
        ClientLeft: nobody waits any longer.
    """
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


async def _whole(events: AsyncGenerator[Events], answers: int) -> list[Reply]:
    """The replies in order."""
    async with aclosing(events):
        found = {place: event.reply async for batch in events for place, event in batch if event.reply is not None}
    return [found[place] for place in range(answers)]


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.as_response()


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        allowed = (error.headers or {}).items()
        refusal = ApiError(405, f"{request.method} is not for {path}.", code="wrong_method", headers=allowed)
    else:
        refusal = ApiError(error.status_code, f"There is nothing at {path}.", code="unknown_path")
    return refusal.as_response()


async def _nobody(request: Request, error: Exception) -> Response:
    return NoResponse()


async def _failed(request: Request, error: Exception) -> Response:
    return refusal_of(error).as_response()


HANDLERS = ((ApiError, _refused), (HTTPException, _not_routed), (ClientLeft, _nobody), (Exception, _failed))
