"""What went wrong with an HTTP request in, an answer of OpenAI's error shape out; knows no routes and no engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from starlette.responses import JSONResponse

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
        """The JSON of the answer; in a stream, that of the event which ends it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def as_response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def unavailable(message: str, code: str) -> ApiError:
    """The server cannot answer at the moment, whatever is asked."""
    return ApiError(503, message, "server_error", code=code, headers=RETRY)
