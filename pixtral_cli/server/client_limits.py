"""What one client may take: connections, time for a head, for a body and for reading an answer, bytes of bodies.

`GuardedProtocol` is uvicorn's HTTP/1.1 protocol with patience that ends: uvicorn itself waits for ever for the rest of
a head, and for a client that reads nothing of its answer. `Bodies` is an ASGI middleware.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from http import HTTPStatus

import h11
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pixtral_cli.server.errors import ApiError, refuse, unavailable

HEAD_SECONDS = 10.0
BODY_SECONDS = 30.0
MAX_BODY_BYTES = 64 * 2**20
BODIES_AT_ONCE = 16
"""How many bodies of the greatest size may be in the server together; of smaller ones, many more."""
UNREAD_SECONDS = 60.0
"""How long a client may take none of an answer that is waiting for it."""
OTHER_FILES = 256
"""File handles that are left for all else when connections are counted; of very few, half."""


class QuickConnection(h11.Connection):
    """h11's, quicker at what it writes most: the next chunk of an answer in chunks, which changes no state."""

    _is_chunked = False  # the answer under way

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        if type(event) is h11.Data and self._is_chunked and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        output = super().send(event)
        if type(event) is h11.Response:
            self._is_chunked = output is not None and b"\r\ntransfer-encoding: chunked\r\n" in output.lower()
        return output


class GuardedProtocol(H11Protocol):
    """For ``uvicorn.Config(http=GuardedProtocol)``; `guarded_protocol` makes one with other limits."""

    head_seconds = HEAD_SECONDS
    unread_seconds = UNREAD_SECONDS
    max_connections = 2**31
    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = QuickConnection(h11.SERVER)
        if len(self.connections) > self.max_connections:
            return self._end(unavailable("The server has too many open connections.", "overloaded"))
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _cancelled(self._head_timer)
        self._unread_timer = _cancelled(self._unread_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.trailing_data[0]:  # the next head has begun to arrive
            self._watch_head()

    def send_400_response(self, msg: str) -> None:
        self._end(ApiError(400, "The request is not HTTP/1.1.", code="invalid_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = _cancelled(self._unread_timer)
        self._unread_timer = self.loop.call_later(self.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._unread_timer = _cancelled(self._unread_timer)
        super().resume_writing()

    def _watch_head(self) -> None:
        """The time for a head starts with the connection or its first byte, and goes on until the last."""
        if self.conn.their_state is not h11.IDLE:
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_seconds, self._head_late)

    def _head_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            late = f"The request's head did not arrive within {self.head_seconds:g} seconds."
            self._end(ApiError(408, late, code="head_timeout"))

    def _end(self, error: ApiError) -> None:
        """Answer, if the connection's state still allows it, and close."""
        response = error.as_response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            phrase = HTTPStatus(error.status).phrase.encode()
            head = h11.Response(status_code=error.status, headers=headers, reason=phrase)
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, in the place of a timer that no longer runs."""
    if timer is not None:
        timer.cancel()
    return None


def guarded_protocol(max_connections: int, head_seconds: float = HEAD_SECONDS) -> type[GuardedProtocol]:
    """A protocol for ``uvicorn.Config(http=…)``: one more connection than `max_connections` is answered with 503."""
    limits = {"max_connections": max_connections, "head_seconds": head_seconds}
    return type("GuardedProtocol", (GuardedProtocol,), limits)


def connections_allowed(wanted: int = 4096) -> int:
    """As many of `wanted` connections as this process may have files for; its own limit is raised where it can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted + OTHER_FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + OTHER_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    room = wanted if soft == resource.RLIM_INFINITY else soft - min(OTHER_FILES, soft // 2)
    return max(1, min(wanted, room))


class Bodies:
    """Reads a request's whole body before the app sees it, within a size and a time.

    What was read counts until its answer has ended, so that many large bodies cannot fill the memory together.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES, seconds: float = BODY_SECONDS) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds
        self.free_bytes = BODIES_AT_ONCE * max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        held = _HeldBytes(self)
        try:
            replayed = await self._read(scope, receive, held)
        except ApiError as error:
            await refuse(error, scope, receive, send)
        else:
            if replayed is not None:
                await self.app(scope, replayed, send)
        finally:
            self.free_bytes += held.size

    async def _read(self, scope: Scope, receive: Receive, held: _HeldBytes) -> Receive | None:
        """A `receive` that gives the whole body, of which nothing is kept here; None if the client left."""
        stated = Headers(scope=scope).getlist("content-length")  # none for a body in chunks; numbers, says the protocol
        held.check(max(map(int, stated), default=0))
        chunks, more = [], True
        try:
            async with asyncio.timeout(self.seconds):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    held.take(len(message.get("body", b"")))
                    chunks.append(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError:
            late = f"The body did not arrive within {self.seconds:g} seconds."
            raise ApiError(408, late, code="body_timeout") from None
        return _replay(b"".join(chunks), receive)


@dataclass
class _HeldBytes:
    """What one request's body takes of the memory for bodies."""

    owner: Bodies
    size: int = 0

    def check(self, more: int) -> None:
        """Raise ApiError if `more` bytes do not fit."""
        if self.size + more > self.owner.max_bytes:
            limit = f"{self.owner.max_bytes / 2**20:g}"
            raise ApiError(413, f"The body is larger than --max-body-mib {limit}.", code="body_too_large")
        if more > self.owner.free_bytes:
            raise unavailable("The server holds too many large requests at the moment.", "overloaded")

    def take(self, more: int) -> None:
        self.check(more)
        self.size += more
        self.owner.free_bytes -= more


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body, then what the client does next."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    del body

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
