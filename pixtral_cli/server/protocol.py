"""uvicorn's HTTP/1.1 protocol with patience that ends: late heads, idle and unread connections, too many of them.

uvicorn itself waits for ever for the rest of a head, and for a client that reads nothing of its answer.
"""

from __future__ import annotations

import asyncio
import resource
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pixtral_cli.server.errors import ApiError, unavailable

HEAD_SECONDS = 10.0
UNREAD_SECONDS = 60.0
"""How long a client may take none of an answer that is waiting for it."""
OTHER_FILES = 256
"""File handles that are left for all else when connections are counted; of very few, half."""


class GuardedProtocol(H11Protocol):
    """For ``uvicorn.Config(http=GuardedProtocol)``; `guarded_protocol` makes one with other limits."""

    head_seconds = HEAD_SECONDS
    unread_seconds = UNREAD_SECONDS
    max_connections = 2**31
    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, in the place of a timer that no longer runs."""
    if timer is not None:
        timer.cancel()
    return None
