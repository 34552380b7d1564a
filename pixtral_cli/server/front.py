"""The outermost ASGI app: what runs, what is told of it, and what is answered before the model is there and after.

While the model loads, `/health` says that the process lives and all else is 503. While the server drains, what is new
is 503 and what runs goes on. Knows no route but the few that others watch a server by, and no engine.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from pixtral_cli.prompt.settings import reason_of
from pixtral_cli.server.asgi import App, Message, Receive, Scope, Send, refuse, remember
from pixtral_cli.server.errors import ApiError, unavailable
from pixtral_cli.server.problems import leaving

logger = logging.getLogger(__name__)
WATCHED = ("/health", "/ready", "/metrics")
"""Asked for every few seconds by machines: told only where something is wrong with the asking."""
LEFT = 499
"""nginx's status for a client that did not wait for an answer."""
LONGEST_PATH = 200
LONGEST_REASON = 200
QUERY = re.compile(r"(https?://[^\s?#]*)[?#]\S*?(?=[:.,]?(\s|$))")
"""Of an address: what follows may be a key."""
EVENT_STREAM = b"text/event-stream"


@dataclass(eq=False)
class Exchange:
    """One request and what became of it."""

    scope: Scope
    send_on: Send
    begun: float = field(default_factory=time.perf_counter)
    status: int = 0
    streams_events: bool = False
    ended: bool = False
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.streams_events = any(
                name.lower() == b"content-type" and value.startswith(EVENT_STREAM)
                for name, value in message.get("headers", ())
            )
        self.ended = message["type"] == "http.response.body" and not message.get("more_body")
        await self.send_on(message)

    async def end(self, error: ApiError, receive: Receive) -> None:
        """Say what went wrong in the way that is left: an answer, a stream's last event, or by breaking off."""
        if not self.status:
            await refuse(error, self.scope, receive, self.send)
        elif self.streams_events and not self.ended:
            remember(self.scope, error)
            event = b"data: " + error.as_response().body + b"\n\n"
            await self.send({"type": "http.response.body", "body": event, "more_body": False})

    def __str__(self) -> str:
        path = self.scope["raw_path"][:LONGEST_PATH].decode("ascii", "backslashreplace")
        took = (time.perf_counter() - self.begun) * 1000
        state = self.scope.get("state", {})
        tokens, refused = state.get("tokens"), state.get("refused")
        used = f", {tokens[0]} + {tokens[1]} tokens" if tokens else ""
        why = f": {in_log(refused)}" if refused else ""
        return f"{self.scope['method']} {path} {self.status or LEFT}, {took:.0f} ms{used}{why}"


def in_log(error: ApiError) -> str:
    """Why a request was refused, in a line: no more than a little of what it said, and no query of an address."""
    reason = QUERY.sub(r"\1?…", reason_of(error))
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}…"


class Front:
    """Give it `app` once that is there. `say` gets a line for each request that was answered."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.app: App | None = None
        self.draining = False
        self.answered: Callable[[str, int], None] = lambda route, status: None
        self.running: set[Exchange] = set()
        self._say = say
        self._cutting = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, send)
        watched = scope["path"] in WATCHED
        if not watched:
            self.running.add(exchange)
        try:
            await self._answer(exchange, receive)
        except asyncio.CancelledError:
            if not self._cutting:
                raise
            await exchange.end(_cut_off(), receive)
        except Exception as error:
            logger.error("A request failed.", exc_info=error)
            await exchange.end(ApiError(500, "Something unexpected went wrong.", "server_error"), receive)
        finally:
            self.running.discard(exchange)
        self.answered(getattr(scope.get("route"), "path", "other"), exchange.status or LEFT)
        if not (watched and exchange.status in (200, 503)):
            self._say(str(exchange))

    async def _answer(self, exchange: Exchange, receive: Receive) -> None:
        path = exchange.scope["path"]
        if self.app is None:
            if path == "/health":
                return await JSONResponse({"status": "ok"})(exchange.scope, receive, exchange.send)
            return await refuse(_loading(), exchange.scope, receive, exchange.send)
        if self.draining and path not in ("/health", "/metrics"):
            return await refuse(leaving(), exchange.scope, receive, exchange.send)
        await self.app(exchange.scope, receive, exchange.send)

    async def idle(self, seconds: float) -> bool:
        """Wait, so long at most, until nothing runs -> whether that is so."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self.running

    def cut(self) -> None:
        """End what still runs, with an error."""
        self._cutting = True
        for exchange in self.running:
            if exchange.task is not None:
                exchange.task.cancel()


def _loading() -> ApiError:
    return unavailable("The model is still loading.", "loading")


def _cut_off() -> ApiError:
    return unavailable("The server ended before this answer was finished.", "stopping")
