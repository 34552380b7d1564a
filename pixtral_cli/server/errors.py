"""What went wrong with a request in, an answer of OpenAI's error shape out; knows no routes and no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from pixtral_cli.errors import PixtralError, PromptTooLong, RequestError, is_out_of_memory
from pixtral_cli.prompt.errors import (
    ImageFetchFailed,
    ImageNotFound,
    ImagesPassedOver,
    InvalidEntry,
    InvalidMessages,
    NoChatTemplate,
    PromptError,
    TemplateFailed,
    TextTooLong,
    TokenizerUnreadable,
)

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "rate_limit_error",
    "server_error",
]
Header = tuple[str, str]
RETRY: tuple[Header, ...] = (("Retry-After", "5"),)
"""In seconds: for what is refused now and may be answered then."""
LINGER_SECONDS = 2.0
HINTS: dict[type[PixtralError], str] = {
    ImagesPassedOver: "Leave the pictures out: this model's template has no place for them.",
    TemplateFailed: "Use /v1/completions to write the prompt yourself.",
    NoChatTemplate: "Use /v1/completions to write the prompt yourself.",
    ImageFetchFailed: "The picture itself can be sent, as a data: URI.",
    ImageNotFound: "The picture itself can be sent, as a data: URI.",
}
"""Over HTTP, instead of those for Python and the command line; the first that fits."""


class ApiError(Exception):
    """A request that is answered with an HTTP status and one sentence.

    The shape is that of https://platform.openai.com/docs/guides/error-codes:
    ``{"error": {"message": …, "type": …, "param": …, "code": …}}``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: ErrorType = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Iterable[Header] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers)

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def as_response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)

    def as_event(self) -> bytes:
        """The event that ends a stream."""
        return b"data: " + bytes(self.as_response().body) + b"\n\n"


def unavailable(message: str, code: str) -> ApiError:
    """The server cannot answer at the moment, whatever is asked."""
    return ApiError(503, message, "server_error", code=code, headers=RETRY)


def stopping() -> ApiError:
    """For requests that come, or still wait, when the server is about to end."""
    return unavailable("The server is stopping.", "stopping")


def queue_full(max_queue: int) -> ApiError:
    sentence = f"The queue is full: {max_queue} requests wait already, and --max-queue allows no more."
    return ApiError(429, sentence, "rate_limit_error", code="queue_full", headers=RETRY)


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    sentence = f"There is no model {name[:200]!r} here; there is {', '.join(known)}."
    return ApiError(404, sentence, param="model", code="model_not_found")


def refusal_of(error: Exception, param: str = "prompt") -> ApiError:
    """400 for what the sender can change, with the sentence and the hint; else 500, which tells nothing of inside.

    `param` is the field that holds the question: clients shorten it when it is too long.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong | TextTooLong):
        return ApiError(400, _joined(error), param=param, code="context_length_exceeded")
    if isinstance(error, RequestError | PromptError) and not isinstance(error, TokenizerUnreadable):
        where = error.where if isinstance(error, InvalidEntry) else None
        return ApiError(400, _joined(error), param=where, code="invalid_value")
    if is_out_of_memory(error):
        sentence = "The server has not enough memory for this request. Send a shorter one, or try again later."
        return ApiError(500, sentence, "server_error", code="out_of_memory")
    if isinstance(error, PixtralError):
        return ApiError(500, str(error), "server_error", code="model_error")
    return ApiError(500, "The server failed to answer this request.", "server_error", code="internal_error")


def _joined(error: PixtralError) -> str:
    hint = next((hint for kind, hint in HINTS.items() if isinstance(error, kind)), error.hint)
    if isinstance(error, InvalidMessages) and hint == InvalidMessages.default_hint:
        hint = None
    return f"{error} {hint}" if hint else str(error)


def remember(scope: Scope, error: ApiError) -> None:
    """Keep why a request is refused, for the line that the log has of it."""
    scope.setdefault("state", {})["refused"] = error


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with `error` and close the connection.

    What the client is still sending is read and forgotten for a moment: a socket closed with data unread makes
    the kernel reset the connection, and the client would see that and never the answer.
    """
    remember(scope, error)
    response = error.as_response()
    headers = [*response.raw_headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body", "body": b""})
