"""A listening socket and a way to load in, a served and drained process out. Knows no model, no flags, no terminal.

The first SIGTERM or SIGINT drains: what is new gets 503, what runs is finished within a time, then cut. The second
ends the process at once. uvicorn's own handling of signals is switched off; it would stop listening first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import uvicorn

from pixtral_cli.server.asgi import App
from pixtral_cli.server.front import Front
from pixtral_cli.server.protocol import connections_allowed, guarded_protocol
from pixtral_cli.server.threads import Threads

SIGNALS = (signal.SIGTERM, signal.SIGINT)
KEEP_ALIVE = 5  # seconds
CUT_SECONDS = 3.0
"""How long the last words to clients may take."""


@dataclass(frozen=True)
class Loaded:
    """What there is once the model is loaded."""

    app: App
    drain: Callable[[], None]
    """Called when the drain begins: requests that wait for their turn are to be refused."""
    stop: Callable[[float], bool]
    """Called at the end, with seconds -> whether all work has ended in them."""
    answered: Callable[[str, int], None]
    """Called with each answer's route and status."""
    greeting: str = ""
    """Said once requests are answered."""


@dataclass(frozen=True)
class Outside:
    """Whom the server tells, and how the process is left at once."""

    say: Callable[[str], None]
    tell_error: Callable[[str], None]
    leave: Callable[[int], NoReturn]


def serve(listener: socket.socket, load: Callable[[], Loaded], drain_seconds: float, outside: Outside) -> None:
    """Serve until a signal ends it. `load` runs on a thread of its own; what it raises is raised here."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # `Front` tells what there is to tell
    for name in ("pixtral_cli", "asyncio"):
        logging.getLogger(name).addHandler(_ErrorLines(outside.tell_error))
    server = _Server(Front(outside.say), listener, drain_seconds, outside)
    for number in _wanted_signals():  # an exception would tear a half-made event loop
        signal.signal(number, lambda number, frame: server.on_signal(signal.Signals(number)))
    asyncio.run(server.run(load))


def _wanted_signals() -> list[signal.Signals]:
    """Those of SIGNALS that the process was not started to ignore, as under nohup."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class _ErrorLines(logging.Handler):
    """A failure as one line; with PIXTRAL_DEBUG, the whole traceback."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        reason = f" {type(error).__name__}: {error}" if error else ""
        self.tell("".join(record.getMessage().splitlines()[:1]) + reason)
        if error and os.environ.get("PIXTRAL_DEBUG"):
            traceback.print_exception(error)


class _Server(uvicorn.Server):
    def __init__(self, front: Front, listener: socket.socket, drain_seconds: float, outside: Outside) -> None:
        config = uvicorn.Config(
            front,
            http=guarded_protocol(connections_allowed()),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=int(CUT_SECONDS),
        )
        super().__init__(config)
        self.front, self.listener, self.drain_seconds, self.outside = front, listener, drain_seconds, outside
        self.loaded: Loaded | None = None
        self._draining: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own handlers stay out: `run` has installed ours."""
        yield

    async def run(self, load: Callable[[], Loaded]) -> None:  # type: ignore[override]
        loop = asyncio.get_running_loop()
        for number in _wanted_signals():
            loop.add_signal_handler(number, self.on_signal, number)
        serving = asyncio.create_task(self.serve(sockets=[self.listener]))
        try:
            self.loaded = await Threads(1, "loading").run(load)
            self.front.answered, self.front.app = self.loaded.answered, self.loaded.app
            self.outside.say(self.loaded.greeting)
        except BaseException:
            self.should_exit = True
            raise
        finally:
            await serving
        if not self.loaded.stop(CUT_SECONDS):
            self.outside.leave(0)  # a step that takes long, and nobody waits for it any more

    def on_signal(self, number: signal.Signals) -> None:
        """The first drains, if there is something to drain; else, and from the second on, leave at once."""
        if self._draining is not None or self.loaded is None:
            nothing_lost = self._draining is None and number == signal.SIGTERM
            self.outside.leave(0 if nothing_lost else 128 + number)
        self._draining = asyncio.create_task(self._drain(self.loaded))

    async def _drain(self, loaded: Loaded) -> None:
        try:
            await self._finish(loaded)
        finally:
            self.should_exit = True

    async def _finish(self, loaded: Loaded) -> None:
        self.front.draining = True
        loaded.drain()
        if self.front.running:
            self.outside.say(f"stopping: up to {self.drain_seconds:g} s for what runs; a second signal ends it at once")
        if not await self.front.idle(self.drain_seconds):
            self.outside.say("stopping: --drain-timeout has passed, what still runs is cut")
            self.front.cut()
            await self.front.idle(CUT_SECONDS)
