"""HTTP in, HTTP out: the routes of `pixtral serve`. Knows no tokens and no template."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from pixtral_cli import __version__
from pixtral_cli.server import openapi, page, responses, wire
from pixtral_cli.server.delivery import ClientLeft, EventStream, NoResponse, while_there, whole
from pixtral_cli.server.errors import ApiError, refusal_of, unavailable
from pixtral_cli.server.metrics import CONTENT_TYPE as METRICS_TYPE
from pixtral_cli.server.middleware import remember
from pixtral_cli.server.openapi import OPERATIONS
from pixtral_cli.server.request_body import parse_json
from pixtral_cli.server.responses import Chunks, Envelope, takes_pieces
from pixtral_cli.server.service import Service
from pixtral_cli.server.wire import AnswerRequest

LARGE_BODY = 256 * 1024


def create_app(service: Service) -> FastAPI:
    """The app; what guards it is put around it (`middleware.guarded`)."""
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
            raise unavailable("The server is not ready.", "not_ready")
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.service.metrics.exposition(), media_type=METRICS_TYPE)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi.document(OPERATIONS, "pixtral", __version__))

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(openapi.page(OPERATIONS, "pixtral", __version__), headers=openapi.DOCS_HEADERS)

    async def respond(self, request: Request, ask: AnswerRequest) -> Response:
        """The answer as one object or as a stream.

        A stream begins with the first token: what fails before that has an HTTP status of its own.
        """
        service = self.service
        service.check_name(ask.model)
        state = request.scope.setdefault("state", {})
        events = service.answer(ask, state.get("key_salt", b""))
        envelope = Envelope.new(ask.kind, ask.model or service.names[0], self.fingerprint, ask.older_calls)
        token_bytes = service.model.processor.tokenizer.token_bytes
        if ask.stream:
            first = await while_there(request.receive, anext(events))
            in_pieces = takes_pieces(request.headers.get("user-agent", ""))
            usage = ask.include_usage, ask.usage_in_each
            chunks = Chunks(envelope, ask.answers, ask.n, token_bytes, *usage, in_pieces)
            return EventStream(first, events, chunks, service.metrics, service.work)
        told = await while_there(request.receive, whole(events, ask.answers))
        used = responses.usage([reply.usage for reply in told], ask.n)
        state["tokens"] = used["prompt_tokens"], used["completion_tokens"]

        def written() -> Response:
            return JSONResponse(responses.answer(envelope, told, ask.n, token_bytes))

        return await service.work(written) if ask.scores_prompts else written()

    async def _parsed(self, request: Request, parse: Any) -> Any:
        body = b"".join([piece async for piece in request.stream() if piece])  # `request.body()` would keep it
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
            "type": "base",
            "capabilities": self._capabilities(),
        }

    def _capabilities(self) -> dict[str, bool]:
        """In the words of Mistral's API, whose client asks for them."""
        source = self.service.model.source
        chats = source.processor.chat_format is not None
        return {
            "completion_chat": chats,
            "completion_fim": False,
            "function_calling": chats,
            "fine_tuning": False,
            "vision": source.config.vision is not None,
        }


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _told(request, error)


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        allowed = (error.headers or {}).items()
        refusal = ApiError(405, f"{request.method} is not for {path}.", code="wrong_method", headers=allowed)
    else:
        refusal = ApiError(error.status_code, f"There is nothing at {path}.", code="unknown_path")
    return _told(request, refusal)


async def _nobody(request: Request, error: Exception) -> Response:
    return NoResponse()


async def _failed(request: Request, error: Exception) -> Response:
    return _told(request, refusal_of(error))


def _told(request: Request, error: ApiError) -> Response:
    remember(request.scope, error)
    return error.as_response()


HANDLERS = ((ApiError, _refused), (HTTPException, _not_routed), (ClientLeft, _nobody), (Exception, _failed))
