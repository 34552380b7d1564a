"""The routes of `pixtral serve`, from which FastAPI makes /openapi.json. Knows no tokens and no template."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, FastAPI, Path
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from pixtral_cli import __version__
from pixtral_cli.server import responses, static_files, wire
from pixtral_cli.server.errors import ApiError, refusal_of, remember, unavailable
from pixtral_cli.server.metrics import CONTENT_TYPE as METRICS_TYPE
from pixtral_cli.server.request_body import JsonRoute
from pixtral_cli.server.request_schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    PredictRequest,
    TokenizeRequest,
)
from pixtral_cli.server.response_schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Detokenized,
    Error,
    Model,
    Models,
    Status,
    Tokenized,
    Version,
)
from pixtral_cli.server.service import Service
from pixtral_cli.server.wire import AnswerRequest

REF = "#/components/schemas/{model}"
HELLO = [{"role": "user", "content": "What can you do?"}]
CHAT = {"model": "tiny", "messages": HELLO, "max_tokens": 64}
STREAMED = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
TEXT = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 16}
WHY = {
    400: "The body is not what it should be; the sentence names the field.",
    401: "A key is needed, or this one is not known.",
    404: "The model is not served here.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not declared to be JSON.",
    429: "The queue is full.",
    500: "The server failed.",
    503: "The server is not ready, is stopping, or holds too much.",
}
NO_KEY: dict[str, Any] = {"security": []}
OF_TOKENS = 400, 401, 404, 408, 413, 415, 500
OF_ANSWERS = *OF_TOKENS, 429, 503


def refusals(*statuses: int, events: type | None = None) -> dict[int | str, dict[str, Any]]:
    """What a route answers but its result: these errors, and a stream of `events` where the body asks for one."""
    error = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}  # cheaper than a model for each
    described: dict[int | str, dict[str, Any]] = {
        status: {"description": WHY[status], "content": error} for status in statuses
    }
    if events is not None:
        data = {"type": "string", "description": f"JSON of {events.__name__}; the last event's is [DONE]."}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        described[200] = {"content": {"text/event-stream": {"schema": event}}}
    return described


def examples(*bodies: dict[str, Any]) -> Any:
    return Body(openapi_examples={f"example {number}": {"value": body} for number, body in enumerate(bodies, 1)})


async def _service(request: Request) -> Service:
    return request.app.state.service


Serving = Annotated[Service, Depends(_service)]
router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/chat/completions", response_model=ChatCompletion, responses=refusals(*OF_ANSWERS, events=ChatCompletionChunk)
)
async def chat(request: Request, service: Serving, body: Annotated[ChatRequest, examples(CHAT, STREAMED)]) -> Response:
    """The next message of a conversation, which may hold pictures."""
    return await _answered(request, service, wire.chat(body))


@router.post("/v1/completions", response_model=Completion, responses=refusals(*OF_ANSWERS, events=Completion))
async def completions(
    request: Request, service: Serving, body: Annotated[CompletionRequest, examples(TEXT)]
) -> Response:
    """The continuation of a text."""
    return await _answered(request, service, wire.completion(body))


@router.get("/v1/models", responses=refusals(401))
async def models(service: Serving) -> Models:
    """The names of the model."""
    return {"object": "list", "data": [_model(service, name) for name in service.names]}


@router.get("/v1/models/{name:path}", responses=refusals(401, 404))
async def model(name: Annotated[str, Path(examples=["tiny"])], service: Serving) -> Model:
    """One of them."""
    service.check_name(name)
    return _model(service, name)


@router.post("/predict", response_model=ChatCompletion, responses=refusals(*OF_ANSWERS, events=ChatCompletionChunk))
async def predict(
    request: Request, service: Serving, body: Annotated[PredictRequest, examples({"messages": HELLO})]
) -> Response:
    """A chat completion whose body needs no model, with 512 tokens and temperature 0.7 unless it says otherwise."""
    return await _answered(request, service, wire.predict(body))


@router.post("/tokenize", responses=refusals(*OF_TOKENS))
async def tokenize(
    request: Request,
    service: Serving,
    body: Annotated[TokenizeRequest, examples({"prompt": "How many tokens is this?"}, {"messages": HELLO})],
) -> Tokenized:
    """The tokens of a text or a conversation, and what its pictures cost."""
    wire.check_tokenize(body)
    service.check_name(body.model)
    prompt = await responses.while_there(request.receive, service.prompt(body.prompt, body.messages, body.tools))
    tokens = prompt.token_ids
    answer: Tokenized = {"tokens": tokens, "count": len(tokens), "max_model_len": service.model.max_length}
    if prompt.images:
        answer["images"] = [
            {"width": image.width, "height": image.height, "tokens": image.tokens} for image in prompt.images
        ]
    return answer


@router.post("/detokenize", responses=refusals(*OF_TOKENS))
async def detokenize(
    service: Serving, body: Annotated[DetokenizeRequest, examples({"tokens": [1, 71, 437, 110]})]
) -> Detokenized:
    """The text of tokens."""
    service.check_name(body.model)
    return {"prompt": await service.text_of(body.tokens)}


@router.get("/health", openapi_extra=NO_KEY)
async def health() -> Status:
    """Whether the process lives."""
    return {"status": "ok"}


@router.get("/ready", responses=refusals(503), openapi_extra=NO_KEY)
async def ready(service: Serving) -> Status:
    """Whether requests are worked on."""
    if service.draining:
        raise unavailable("The server is not ready.", "not_ready")
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse, responses=refusals(401))
async def metrics(service: Serving) -> Response:
    """Counters for Prometheus."""
    return PlainTextResponse(service.metrics.exposition(), media_type=METRICS_TYPE)


@router.get("/version", responses=refusals(401))
async def version() -> Version:
    """The version of pixtral."""
    return {"version": __version__}


async def _answered(request: Request, service: Service, answer_request: AnswerRequest) -> Response:
    """The answer as one object or as a stream.

    A stream begins with the first token: what fails before that has an HTTP status of its own.
    """
    service.check_name(answer_request.model)
    state = request.scope.setdefault("state", {})
    salt = state.get("key_salt", b"")
    model = service.model
    kept = "" if model.work.kv_cache_dtype == "auto" else f"-kv-{model.work.kv_cache_dtype}"
    fingerprint = f"pixtral-{__version__}-{model.encoding}{kept}"
    envelope = responses.Envelope(answer_request, answer_request.model or service.names[0], fingerprint)
    token_bytes = service.model.processor.tokenizer.token_bytes
    if answer_request.stream:
        events = service.answer(answer_request, salt)
        first = await responses.while_there(request.receive, anext(events))
        chunks = responses.Chunks(envelope, token_bytes, responses.takes_pieces(request.headers.get("user-agent", "")))
        return responses.EventStream(first, events, chunks, service.metrics, service.work)
    replies = await responses.while_there(request.receive, service.replies(answer_request, salt))
    used = responses.usage([reply.usage for reply in replies], answer_request.n)
    state["tokens"] = used["prompt_tokens"], used["completion_tokens"]

    def written() -> Response:
        return JSONResponse(responses.answer(envelope, replies, token_bytes))

    return await service.work(written) if answer_request.scores_prompts else written()


def _model(service: Service, name: str) -> Model:
    """In the words of Mistral's API, whose client asks for capabilities."""
    source = service.model.source
    chats = source.processor.chat_format is not None
    return {
        "id": name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "pixtral",
        "max_model_len": service.model.max_length,
        "type": "base",
        "capabilities": {
            "completion_chat": chats,
            "completion_fim": False,
            "function_calling": chats,
            "fine_tuning": False,
            "vision": source.config.vision is not None,
        },
    }


async def _failed(request: Request, error: Exception) -> Response:
    refusal = refusal_of(error)
    remember(request.scope, refusal)
    return refusal.as_response()


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        allow = ("Allow", "GET, HEAD" if "GET" in allowed else allowed)  # HEAD is a route of its own, beside GET's
        refusal = ApiError(405, f"{request.method} is not for {path}.", code="wrong_method", headers=[allow])
    else:
        refusal = ApiError(error.status_code, f"There is nothing at {path}.", code="unknown_path")
    return await _failed(request, refusal)


async def _client_left(request: Request, error: Exception) -> Response:
    return responses.NoResponse()


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI's document, with the errors and keys of all that stands before the app, instead of its own errors."""
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title, version=self.version, description=self.description, routes=self.routes
            )
            schemas = document["components"]["schemas"]
            unnamed: list[Any] = [(kind, "serialization", TypeAdapter(kind)) for kind in (ChatCompletionChunk, Error)]
            schemas |= TypeAdapter.json_schemas(unnamed, ref_template=REF)[1]["$defs"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for operation in (each for operations in document["paths"].values() for each in operations.values()):
                operation["summary"] = operation.pop("description")
                operation["responses"].pop("422", None)
            document["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "Api-Key"},
            }
            self.openapi_schema = document | {"security": [{}, {"bearer": []}, {"apiKey": []}]}
        return self.openapi_schema


def create_app(service: Service) -> FastAPI:
    """The app; what guards it is put around it (`middleware.guarded`)."""
    app = _App(
        title="pixtral",
        version=__version__,
        description="A key is needed if the server has one.",
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        exception_handlers={
            ApiError: _failed,
            HTTPException: _not_routed,
            responses.ClientLeft: _client_left,
            Exception: _failed,
        },
    )
    app.state.service, app.state.work = service, service.work
    app.include_router(router)
    for route in router.routes:
        if isinstance(route, JsonRoute) and route.methods == {"GET"}:
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
    app.router.routes.extend(static_files.routes())
    return app
