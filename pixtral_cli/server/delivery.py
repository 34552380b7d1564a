"""Events in, an HTTP response out, for as long as the client is there; knows no routes and no fields."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pixtral_cli.generation import Reply
from pixtral_cli.server.errors import ApiError, remember
from pixtral_cli.server.metrics import Metrics
from pixtral_cli.server.responses import Chunks
from pixtral_cli.server.service import Events

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
Result = TypeVar("Result")
Work = Callable[[Callable[[], bytes]], Awaitable[bytes]]


class ClientLeft(Exception):
    """Nobody waits for the answer any longer."""


class EventStream(Response):
    """Sends what comes until it ends or the client leaves; then nothing of it is computed any longer.

    `work` runs a function on a thread.
    """

    def __init__(
        self, first: Events, events: AsyncGenerator[Events], chunks: Chunks, metrics: Metrics, work: Work
    ) -> None:
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self.first, self.events, self.chunks, self.metrics, self.work = first, events, chunks, metrics, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            with suppress(ClientLeft):
                await while_there(receive, self._send(scope, send))

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await _write(send, self.chunks.opening(self.first) + await self._written(self.first))
            async for events in self.events:
                await _write(send, await self._written(events))
        except ApiError as error:
            self.metrics.failed(error.status)
            remember(scope, error)
            await _write(send, error.as_event())
        else:
            used = self.chunks.usage()
            scope["state"]["tokens"] = used["prompt_tokens"], used["completion_tokens"]
            await _write(send, self.chunks.closing())
        await send({"type": "http.response.body", "body": b""})

    async def _written(self, events: Events) -> bytes:
        """An echo has every token of a prompt, and may take seconds: too long for the event loop."""
        if any(event.echo is not None for _, event in events):
            return await self.work(partial(self.chunks.of, events))
        return self.chunks.of(events)


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


async def whole(events: AsyncGenerator[Events], answers: int) -> list[Reply]:
    """The replies in order."""
    async with aclosing(events):
        found = {place: event.reply async for batch in events for place, event in batch if event.reply is not None}
    return [found[place] for place in range(answers)]
