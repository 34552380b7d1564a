"""A listening socket and a way to load a model in, a served and drained process out. Knows no flags and no terminal.

While the model loads, `/health` says that the process lives and all else is 503. The first SIGTERM or SIGINT drains:
what is new gets 503, what runs is finished within a time, then cut. The second ends the process at once. uvicorn's own
handling of signals is switched off; it would stop listening first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixtral_cli.errors import reason_of
from pixtral_cli.server.errors import ApiError, leaving, unavailable
from pixtral_cli.server.middleware import MAX_BODY_BYTES, guarded, refuse, remember
from pixtral_cli.server.protocol import connections_allowed, guarded_protocol
from pixtral_cli.server.threads import Threads

if TYPE_CHECKING:
    from pixtral_cli.api import Pixtral
    from pixtral_cli.server.media_policy import MediaPolicy
    from pixtral_cli.server.service import Limits, Service

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
KEEP_ALIVE = 5  # seconds
CUT_SECONDS = 3.0
"""How long the last words to clients may take."""
WATCHED = ("/health", "/ready", "/metrics")
"""Asked for every few seconds by machines: told only where something is wrong with the asking."""
LEFT = 499
"""nginx's status for a client that did not wait for an answer."""
LONGEST_PATH = LONGEST_REASON = 200
QUERY = re.compile(r"(https?://[^\s?#]*)[?#]\S*?(?=[:.,]?(\s|$))")
"""Of an address: what follows may be a key."""
EVENT_STREAM = b"text/event-stream"


@dataclass(frozen=True)
class Settings:
    """What the flags say of a server; `names` are the model's in requests, `defaults` options of generation."""

    host: str
    names: tuple[str, ...]
    limits: Limits
    media: MediaPolicy
    keys: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    max_body_bytes: int = MAX_BODY_BYTES


@dataclass(frozen=True)
class Loaded:
    """What there is once the model is loaded. `greeting` is said once requests are answered."""

    app: ASGIApp
    service: Service
    greeting: str


def assemble(model: Pixtral, settings: Settings, greeting: str) -> Loaded:
    """Put the model behind HTTP; from now on its engine runs on a thread of its own."""
    from pixtral_cli.engine.driver import Driver
    from pixtral_cli.server.app import create_app
    from pixtral_cli.server.media_policy import RequestImages
    from pixtral_cli.server.service import Service

    model.processor.open_image = RequestImages(settings.media).opened
    service = Service(model, Driver(model.engine), settings.names, settings.defaults, settings.limits)
    app = guarded(create_app(service), host=settings.host, keys=settings.keys, max_body_bytes=settings.max_body_bytes)
    return Loaded(app, service, greeting)


@dataclass(frozen=True)
class Terminal:
    """Whom the server tells, and how the process is left at once."""

    say: Callable[[str], None]
    tell_error: Callable[[str], None]
    leave: Callable[[int], NoReturn]


def serve(listener: socket.socket, load: Callable[[], Loaded], drain_seconds: float, terminal: Terminal) -> None:
    """Serve until a signal ends it. `load` runs on a thread of its own; what it raises is raised here."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # `RequestTracker` tells what there is to tell
    for name in ("pixtral_cli", "asyncio"):
        logging.getLogger(name).addHandler(_ErrorLines(terminal.tell_error))
    server = _Server(listener, drain_seconds, terminal)
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
    def __init__(self, listener: socket.socket, drain_seconds: float, terminal: Terminal) -> None:
        self.requests = RequestTracker(terminal.say)
        config = uvicorn.Config(
            self.requests,
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
        self.listener, self.drain_seconds, self.terminal = listener, drain_seconds, terminal
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
            self.requests.begin(self.loaded.app, self.loaded.service.metrics.answered)
            self.terminal.say(self.loaded.greeting)
        except BaseException:
            self.should_exit = True
            raise
        finally:
            await serving
        service = self.loaded.service
        if not service.driver.stop(CUT_SECONDS) or service.preparing:
            self.terminal.leave(0)  # a step that takes long, and nobody waits for it any more

    def on_signal(self, number: signal.Signals) -> None:
        """The first drains, if there is something to drain; else, and from the second on, leave at once."""
        if self._draining is not None or self.loaded is None:
            nothing_lost = self._draining is None and number == signal.SIGTERM
            self.terminal.leave(0 if nothing_lost else 128 + number)
        self._draining = asyncio.create_task(self._drain(self.loaded.service))

    async def _drain(self, service: Service) -> None:
        """Finish what runs, cut what takes too long, and let uvicorn end."""
        say, seconds = self.terminal.say, self.drain_seconds
        try:
            self.requests.draining = True
            service.drain()
            if self.requests.running:
                say(f"stopping: up to {seconds:g} s for what runs; a second signal ends it at once")
            if not await self.requests.idle(seconds):
                say("stopping: --drain-timeout has passed, what still runs is cut")
                self.requests.cut()
                await self.requests.idle(CUT_SECONDS)
        finally:
            self.should_exit = True


@dataclass(eq=False)
class TrackedRequest:
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
            await self.send({"type": "http.response.body", "body": error.as_event(), "more_body": False})

    def __str__(self) -> str:
        """The line of the log."""
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


class RequestTracker:
    """The outermost ASGI app: keeps the requests that run, logs each that ended, answers while there is no model.

    `say` gets a line for each request that was answered.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.app: ASGIApp | None = None
        self.draining = False
        self.running: set[TrackedRequest] = set()
        self._answered: Callable[[str, int], None] = lambda route, status: None
        self._say = say
        self._ended = asyncio.Event()
        self._cutting = False

    def begin(self, app: ASGIApp, answered: Callable[[str, int], None]) -> None:
        """From now on `app` answers, and `answered` is told each answer's route and status."""
        self.app, self._answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = TrackedRequest(scope, send)
        watched = scope["path"] in WATCHED
        if not watched:
            self.running.add(request)
        try:
            await self._answer(request, receive)
        except asyncio.CancelledError:
            if not self._cutting:
                raise
            cut_off = unavailable("The server ended before this answer was finished.", "stopping")
            await request.end(cut_off, receive)
        except Exception as error:
            logger.error("A request failed.", exc_info=error)
            await request.end(ApiError(500, "Something unexpected went wrong.", "server_error"), receive)
        finally:
            self.running.discard(request)
            self._ended.set()
        self._answered(getattr(scope.get("route"), "path", "other"), request.status or LEFT)
        if not (watched and request.status in (200, 503)):
            self._say(str(request))

    async def _answer(self, request: TrackedRequest, receive: Receive) -> None:
        scope, path = request.scope, request.scope["path"]
        if self.app is None and path == "/health":
            await JSONResponse({"status": "ok"})(scope, receive, request.send)
        elif self.app is None:
            await refuse(unavailable("The model is still loading.", "loading"), scope, receive, request.send)
        elif self.draining and path not in ("/health", "/metrics"):
            await refuse(leaving(), scope, receive, request.send)
        else:
            await self.app(scope, receive, request.send)

    async def idle(self, seconds: float) -> bool:
        """Wait, so long at most, until nothing runs -> whether that is so."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.running:
                    self._ended.clear()
                    await self._ended.wait()
        return not self.running

    def cut(self) -> None:
        """End what still runs, with an error."""
        self._cutting = True
        for request in self.running:
            if request.task is not None:
                request.task.cancel()
