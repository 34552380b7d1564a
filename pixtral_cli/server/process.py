"""An address and a way to load a model in, a served and drained process out. Knows no flags and no terminal.

While the model loads, `/health` says that the process lives and all else is 503. The first SIGTERM or SIGINT drains:
what is new gets 503, what runs is finished within a time, then cut. The second ends the process at once. uvicorn's own
handling of signals is switched off; it would stop listening first.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn
from starlette.types import ASGIApp

from pixtral_cli.errors import PixtralError
from pixtral_cli.server.client_limits import MAX_BODY_BYTES, connections_allowed, guarded_protocol
from pixtral_cli.server.middleware import RequestTracker, guarded, is_loopback
from pixtral_cli.server.threads import Threads

if TYPE_CHECKING:
    from pixtral_cli.api import Pixtral
    from pixtral_cli.server.media_policy import MediaPolicy
    from pixtral_cli.server.service import Limits, Service

BACKLOG = 1024
SIGNALS = (signal.SIGTERM, signal.SIGINT)
KEEP_ALIVE = 5  # seconds
CUT_SECONDS = 3.0
"""How long the last words to clients may take."""


def check_binding(host: str, keys: Sequence[str], insecure: bool) -> None:
    """Raise PixtralError for a key that guards nothing, and for an open address that nothing guards."""
    if any(not key.strip() or not key.isascii() or not key.isprintable() for key in keys):
        raise PixtralError(
            "An API key is empty, or has characters that no HTTP header can carry.",
            hint="Give --api-key (or PIXTRAL_API_KEY) printable ASCII; leave it out for none.",
        )
    if not (keys or insecure or is_loopback(host)):
        raise PixtralError(
            f"Everybody who reaches {host} could use this server: there is no API key.",
            hint="Set PIXTRAL_API_KEY or --api-key, bind --host 127.0.0.1, or say --insecure to mean it.",
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; with port 0, on a free one. Raises PixtralError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise PixtralError(
            f"There is no address {host!r} to serve at.",
            hint="Give --host an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them.",
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise PixtralError(*_refusal(error, host, port)) from error
    return listener


def url(host: str, listener: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    port = listener.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _refusal(error: OSError, host: str, port: int) -> tuple[str, str]:
    """The sentence and the next step."""
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is in use.", "Stop what uses it, or give another --port; 0 takes a free one."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"Port {port} needs rights that you do not have.", "Give a --port of 1024 or above."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine.", "Give --host 127.0.0.1, or 0.0.0.0 for all addresses."
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"Cannot serve at {host}, port {port}: {reason}.", "Give another --host or --port."


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
    """Put the model behind HTTP."""
    from pixtral_cli.server.app import create_app
    from pixtral_cli.server.media_policy import RequestImages
    from pixtral_cli.server.service import Service

    model.processor.open_image = RequestImages(settings.media).opened
    service = Service(model, settings.names, settings.defaults, settings.limits)
    app = guarded(create_app(service), host=settings.host, keys=settings.keys, max_body_bytes=settings.max_body_bytes)
    return Loaded(app, service, greeting)


@dataclass(frozen=True)
class Terminal:
    """Where the server's lines go, and how the process ends at once."""

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
