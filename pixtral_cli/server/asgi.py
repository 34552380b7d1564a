"""ASGI's types, a request's headers, and the one way to refuse a request before the app sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from pixtral_cli.server.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LINGER_SECONDS = 2.0


def headers_of(scope: Scope, name: bytes) -> list[bytes]:
    """Every value of a header; `name` in lower case."""
    return [value for key, value in scope["headers"] if key == name]


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
