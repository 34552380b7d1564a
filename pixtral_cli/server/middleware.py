"""ASGI middlewares that stand before the app: host names, keys, origins, body sizes, headers for browsers.

`guarded(app, …)` puts them in order. Each answers what it refuses itself, in OpenAI's shape, before a byte of the
body is read if it can. They know no route but the open ones.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixtral_cli.server.errors import ApiError, unavailable
from pixtral_cli.server.listening import is_loopback

Check = Callable[[Scope, Headers], None]
"""Lets a request pass, or raises ApiError, from its head alone."""
LINGER_SECONDS = 2.0
MAX_BODY_BYTES = 64 * 2**20
BODIES_AT_ONCE = 16
"""How many bodies of the greatest size may be in the server together; of smaller ones, many more."""
BODY_SECONDS = 30.0
SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")
OPEN_PATHS = ("/", "/health", "/ready")
OPEN_FOLDER = "/page/"
KEY_SCHEMES = ("bearer", "api-key")
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
        checks.insert(0, LocalNames(host).check)
    return SecurityHeaders(CheckedHeads(Bodies(app, max_body_bytes, body_seconds), checks))


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


class LocalNames:
    """Against DNS rebinding: a page of another name that was made to resolve to 127.0.0.1 gets no answer."""

    def __init__(self, host: str) -> None:
        self.host = host.lower()

    def check(self, scope: Scope, headers: Headers) -> None:
        for value in headers.getlist("host"):
            name = _host_name(value)
            if not (name in (self.host, "localhost") or name.endswith(".localhost") or _is_loopback_address(name)):
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
        self.digests = [_digest(key.strip().encode()) for key in keys]

    def check(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_FOLDER)):
            return
        given = _presented(headers)
        if given is None:
            raise _unauthorised("An API key is needed: send the header Authorization: Bearer <key>.", None)
        if not self.knows(given):
            raise _unauthorised("This API key is not one of this server's.", "invalid_api_key")
        scope.setdefault("state", {})["key_salt"] = _digest(b"prefix cache of " + given)

    def knows(self, given: bytes) -> bool:
        """Compared with every key, in full, whatever the outcome: time tells nothing."""
        digest = _digest(given)
        return any([hmac.compare_digest(digest, known) for known in self.digests])  # noqa: C419


def _presented(headers: Headers) -> bytes | None:
    """The key that a request shows; None without one."""
    shown = (value.strip().partition(" ") for value in headers.getlist("authorization"))
    keys = [key for scheme, _, key in shown if scheme.lower() in KEY_SCHEMES] + headers.getlist("api-key")
    return next((key.strip().encode("latin-1") for key in keys if key.strip()), None)


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


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
    kind = ",".join(headers.getlist("content-type")).partition(";")[0].strip().lower()
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
