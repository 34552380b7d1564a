"""ASGI middlewares around the app: running requests and their log lines, host names, keys, origins, security headers.

`RequestTracker` is the outermost; `guarded(app, …)` puts the others in order. Each answers what it refuses itself, in
OpenAI's shape, before a byte of the body is read. They know no route but those that others watch a server by.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixtral_cli.errors import reason_of
from pixtral_cli.server.client_limits import BODY_SECONDS, MAX_BODY_BYTES, Bodies
from pixtral_cli.server.errors import ApiError, refuse, remember, stopping, unavailable

logger = logging.getLogger(__name__)
WATCHED = ("/health", "/ready", "/metrics")
"""Asked for every few seconds by machines: told only where something is wrong with the asking."""
LEFT = 499
"""nginx's status for a client that did not wait for an answer."""
LONGEST_LOGGED = 200
QUERY = re.compile(r"(https?://[^\s?#]*)[?#]\S*?(?=[:.,]?(\s|$))")
"""Of an address: what follows may be a key."""
Check = Callable[[Scope, Headers], None]
"""Lets a request pass, or raises ApiError, from its head alone."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")
OPEN_PATHS = ("/", "/health", "/ready")
OPEN_FOLDER = "/page/"
KEY_SCHEMES = ("bearer", "api-key")
BLANKS = " \t"
"""Of HTTP; `str.strip` alone would take Latin-1's as well."""
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
}
"""Given to every answer that does not bring its own."""


def guarded(
    app: ASGIApp,
    *,
    host: str,
    keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    body_seconds: float = BODY_SECONDS,
) -> ASGIApp:
    """`app` behind everything of this file.

    Args:
        host: the address that the server binds; on loopback without a key only local names reach the app.
        keys: any of them opens; without one, nothing is asked for.
        max_body_bytes: more is 413; of all requests together, a multiple of it is 503.
        body_seconds: how long a body may take to arrive; then it is 408.
    """
    checks: list[Check] = [check_origin]
    if keys:
        checks.insert(0, ApiKeys(keys).check)
    elif is_loopback(host):
        checks.insert(0, partial(check_host, host.lower()))
    return SecurityHeaders(CheckedHeads(Bodies(app, max_body_bytes, body_seconds), checks))


def is_loopback(host: str) -> bool:
    """Whether every address of `host` stays on this machine."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


class SecurityHeaders:
    """Adds to every answer what a browser should hold to."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message.get("headers", ())))
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                message = {**message, "headers": headers.raw}
            await send(message)

        await self.app(scope, receive, send_with_headers)


class CheckedHeads:
    """Passes on the requests that every check lets pass, before their bodies are read."""

    def __init__(self, app: ASGIApp, checks: Sequence[Check]) -> None:
        self.app, self.checks = app, checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                for check in self.checks:
                    check(scope, headers)
            except ApiError as error:
                return await refuse(error, scope, receive, send)
        await self.app(scope, receive, send)


def check_host(host: str, scope: Scope, headers: Headers) -> None:
    """Against DNS rebinding: a page of another name that was made to resolve to 127.0.0.1 gets no answer.

    Names of this machine are let pass, and `host`, at which the server listens.
    """
    for value in headers.getlist("host"):
        name = _host_name(value)
        if not (name in (host, "localhost") or name.endswith(".localhost") or _is_loopback_address(name)):
            raise ApiError(
                421,
                "Without an API key this server answers to localhost only, not to the name in the Host header. "
                "Start it with --api-key to reach it by another name.",
                code="unknown_host",
            )


def _host_name(value: str) -> str:
    """``[::1]:8000`` -> ``::1``; "" for what is no host."""
    try:
        return (urlsplit(f"//{value}").hostname or "").rstrip(".") if value.isascii() else ""
    except ValueError:
        return ""


def _is_loopback_address(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


class ApiKeys:
    """Asks for a key on all but the open paths: `Authorization: Bearer …`, `Authorization: Api-Key …` or `Api-Key: …`.

    Leaves ``scope["state"]["key_salt"]``: bytes that are the same for one key and differ between keys.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.digests = [sha256(key.strip().encode()).digest() for key in keys]

    def check(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER)):
            return
        given = _presented(headers)
        if given is None:
            raise _unauthorised("An API key is needed: send the header Authorization: Bearer <key>.", None)
        if not self.knows(given):
            raise _unauthorised("This API key is not one of this server's.", "invalid_api_key")
        scope.setdefault("state", {})["key_salt"] = sha256(b"prefix cache of " + given).digest()

    def knows(self, given: bytes) -> bool:
        """Compared with every key, in full, whatever the outcome: time tells nothing."""
        digest = sha256(given).digest()
        return any([hmac.compare_digest(digest, known) for known in self.digests])  # noqa: C419


def _presented(headers: Headers) -> bytes | None:
    """The key that a request shows; None without one."""
    shown = (value.strip(BLANKS).partition(" ") for value in headers.getlist("authorization"))
    keys = [key for scheme, _, key in shown if scheme.lower() in KEY_SCHEMES] + headers.getlist("api-key")
    return next((key.strip(BLANKS).encode("latin-1") for key in keys if key.strip(BLANKS)), None)


def _unauthorised(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, "authentication_error", code=code, headers=[("WWW-Authenticate", "Bearer")])


def check_origin(scope: Scope, headers: Headers) -> None:
    """No other site's page may make a browser use the server: what changes or computes takes JSON, from here.

    A browser asks before it sends JSON across origins, and is never told yes; the headers are checked as well.
    """
    if scope["method"] in SAFE_METHODS:
        return
    if _is_foreign(headers):
        raise ApiError(403, "Requests from another site's pages are refused.", "permission_error", code="cross_origin")
    kind = ",".join(headers.getlist("content-type")).partition(";")[0].strip(BLANKS).lower()
    if kind != "application/json":
        raise ApiError(415, "The body should be JSON, with the header Content-Type: application/json.")


def _is_foreign(headers: Headers) -> bool:
    """Whether a browser says that another site's page sent this; programs say nothing.

    Sec-Fetch-Site is the browser's own word, but it is sent to https and localhost only; then Origin is compared.
    """
    sites = headers.getlist("sec-fetch-site")
    if sites:
        return any(site not in ("same-origin", "none") for site in sites)
    hosts = headers.getlist("host")
    return any(origin.partition("://")[2] not in hosts for origin in headers.getlist("origin"))


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
            kind = Headers(raw=message.get("headers", [])).get("content-type", "")
            self.streams_events = kind.startswith("text/event-stream")
        self.ended = message["type"] == "http.response.body" and not message.get("more_body")
        await self.send_on(message)

    async def end(self, error: ApiError, receive: Receive) -> None:
        """Say what went wrong in the way that is left: an answer, a stream's last event, or by breaking off."""
        if not self.status:
            await refuse(error, self.scope, receive, self.send)
        elif self.streams_events and not self.ended:
            remember(self.scope, error)
            await self.send({"type": "http.response.body", "body": error.as_event(), "more_body": False})

    def log_line(self) -> str:
        path = self.scope["raw_path"][:LONGEST_LOGGED].decode("ascii", "backslashreplace")
        took = (time.perf_counter() - self.begun) * 1000
        state = self.scope.get("state", {})
        tokens, refused = state.get("tokens"), state.get("refused")
        used = f", {tokens[0]} + {tokens[1]} tokens" if tokens else ""
        why = f": {_short_reason(refused)}" if refused else ""
        return f"{self.scope['method']} {path} {self.status or LEFT}, {took:.0f} ms{used}{why}"


def _short_reason(error: ApiError) -> str:
    """Why a request was refused, in a line: no more than a little of what it said, and no query of an address."""
    reason = QUERY.sub(r"\1?…", reason_of(error))
    return reason if len(reason) <= LONGEST_LOGGED else f"{reason[:LONGEST_LOGGED]}…"


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
            self._say(request.log_line())

    async def _answer(self, request: TrackedRequest, receive: Receive) -> None:
        scope, path = request.scope, request.scope["path"]
        if self.app is None and path == "/health":
            await JSONResponse({"status": "ok"})(scope, receive, request.send)
        elif self.app is None:
            await refuse(unavailable("The model is still loading.", "loading"), scope, receive, request.send)
        elif self.draining and path not in ("/health", "/metrics"):
            await refuse(stopping(), scope, receive, request.send)
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
