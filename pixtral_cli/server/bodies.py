"""Request bodies within a size and a time; knows no routes and nothing of what is in them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pixtral_cli.server.asgi import App, Message, Receive, Scope, Send, headers_of, refuse
from pixtral_cli.server.errors import ApiError, unavailable

MAX_BODY_BYTES = 64 * 2**20
BODIES_AT_ONCE = 16
"""How many bodies of the greatest size may be in the server together; of smaller ones, many more."""
BODY_SECONDS = 30.0


class Bodies:
    """Reads a request's whole body before the app sees it, within a size and a time.

    What was read counts until its answer has ended, so that many large bodies cannot fill the memory together.
    """

    def __init__(self, app: App, max_bytes: int = MAX_BODY_BYTES, seconds: float = BODY_SECONDS) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds
        self.room = BODIES_AT_ONCE * max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        share = _Share(self)
        try:
            replayed = await self._read(scope, receive, share)
        except ApiError as error:
            await refuse(error, scope, receive, send)
        else:
            if replayed is not None:
                await self.app(scope, replayed, send)
        finally:
            self.room += share.size

    async def _read(self, scope: Scope, receive: Receive, share: _Share) -> Receive | None:
        """A `receive` that gives the whole body, of which nothing is kept here; None if the client left."""
        share.check(_stated_length(scope))
        pieces = []
        try:
            async with asyncio.timeout(self.seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    share.take(len(message.get("body", b"")))
                    pieces.append(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError:
            late = f"The body did not arrive within {self.seconds:g} seconds."
            raise ApiError(408, late, code="body_timeout") from None
        return _replay(b"".join(pieces), receive)


@dataclass
class _Share:
    """What one request takes of the room for bodies."""

    owner: Bodies
    size: int = 0

    def check(self, more: int) -> None:
        """Raise ApiError if `more` bytes do not fit."""
        if self.size + more > self.owner.max_bytes:
            limit = f"{self.owner.max_bytes / 2**20:g}"
            raise ApiError(413, f"The body is larger than --max-body-mib {limit}.", code="body_too_large")
        if more > self.owner.room:
            raise unavailable("The server holds too many large requests at the moment.", "overloaded")

    def take(self, more: int) -> None:
        self.check(more)
        self.size += more
        self.owner.room -= more


def _stated_length(scope: Scope) -> int:
    """0 for a body sent in chunks. The protocol has checked that it is a number."""
    return max((int(value) for value in headers_of(scope, b"content-length")), default=0)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body, then what the client does next."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    del body

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
