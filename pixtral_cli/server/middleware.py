"""ASGI middlewares that stand before the app: names, keys, origins, body sizes. They know no route but the open ones.

`guarded(app, …)` puts them in order. Each answers what it refuses itself, in OpenAI's shape, before a byte of the
body is read if it can.
"""

from __future__ import annotations

import asyncio
import hmac
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from pixtral_cli.server.errors import ApiError, unavailable
from pixtral_cli.server.listening import is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LINGER_SECONDS = 2.0


MAX_BODY_BYTES = 64 * 2**20
BODIES_AT_ONCE = 16
"""How many bodies of the greatest size may be in the server together; of smaller ones, many more."""
BODY_SECONDS = 30.0


READING = ("GET", "HEAD", "OPTIONS", "TRACE")
OPEN_PATHS = ("/", "/health", "/ready")
OPEN_FOLDER = "/page/"
KEY_SCHEMES = (b"bearer", b"api-key")
SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    b"cache-control": b"no-store",
}
"""Given to every answer that does not bring its own."""


def guarded(
    app: App,
    *,
    host: str,
    keys: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    body_seconds: float = BODY_SECONDS,
) -> App:
    """`app` behind everything of this file.

    Args:
        host: the address that the server binds; on loopback without a key only local names reach the app.
        keys: any of them opens; without one, nothing is asked for.
        max_body_bytes: more is 413; of all requests together, a multiple of it is 503.
        body_seconds: how long a body may take to arrive; then it is 408.
    """
    app = Bodies(app, max_body_bytes, body_seconds)
    app = Origins(app)
    app = ApiKeys(app, keys) if keys else app
    app = LocalNames(app, host) if not keys and is_loopback(host) else app
    return SecurityHeaders(app)


class SecurityHeaders:
    """Adds to every answer what a browser should hold to."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                present = {name.lower() for name, _ in given}
                added = [entry for entry in SECURITY_HEADERS.items() if entry[0] not in present]
                message = {**message, "headers": given + added}
            await send(message)

        await self.app(scope, receive, send_with_headers)


class _Check(ABC):
    """A middleware that lets a request pass or raises ApiError, from its head alone."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.check(scope)
            except ApiError as error:
                return await refuse(error, scope, receive, send)
        await self.app(scope, receive, send)

    @abstractmethod
    def check(self, scope: Scope) -> None: ...


class LocalNames(_Check):
    """Against DNS rebinding: a page of another name that was made to resolve to 127.0.0.1 gets no answer."""

    def __init__(self, app: App, host: str) -> None:
        super().__init__(app)
        self.host = host.lower()

    def check(self, scope: Scope) -> None:
        for value in headers_of(scope, b"host"):
            name = _host_name(value)
            if not (name in (self.host, "localhost") or name.endswith(".localhost") or _is_loopback_address(name)):
                raise ApiError(
                    421,
                    "Without an API key this server answers to localhost only, not to the name in the Host header. "
                    "Start it with --api-key to reach it by another name.",
                    code="unknown_host",
                )


class ApiKeys(_Check):
    """Asks for a key on all but the open paths: `Authorization: Bearer …`, `Authorization: Api-Key …` or `Api-Key: …`.

    Leaves ``scope["state"]["key_salt"]``: bytes that are the same for one key and differ between keys.
    """

    def __init__(self, app: App, keys: Iterable[str]) -> None:
        super().__init__(app)
        self.digests = [_digest(key.strip().encode()) for key in keys]

    def check(self, scope: Scope) -> None:
        if scope["method"] in READING[:2] and _is_open(scope["path"]):
            return
        given = _presented(scope)
        if given is None:
            raise _unauthorised("An API key is needed: send the header Authorization: Bearer <key>.", None)
        if not self.knows(given):
            raise _unauthorised("This API key is not one of this server's.", "invalid_api_key")
        scope.setdefault("state", {})["key_salt"] = _digest(b"prefix cache of " + given)

    def knows(self, given: bytes) -> bool:
        """Compared with every key, in full, whatever the outcome: time tells nothing."""
        digest = _digest(given)
        return any([hmac.compare_digest(digest, known) for known in self.digests])  # noqa: C419


class Origins(_Check):
    """No other site's page may make a browser use the server: what changes or computes takes JSON, from here.

    A browser asks before it sends JSON across origins, and is never told yes; the headers are checked as well.
    """

    def check(self, scope: Scope) -> None:
        if scope["method"] in READING:
            return
        if _is_foreign(scope):
            raise ApiError(
                403, "Requests from another site's pages are refused.", "permission_error", code="cross_origin"
            )
        kind = b",".join(headers_of(scope, b"content-type")).partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "The body should be JSON, with the header Content-Type: application/json.")


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _presented(scope: Scope) -> bytes | None:
    """The key that a request shows; None without one."""
    for value in headers_of(scope, b"authorization"):
        scheme, _, key = value.strip().partition(b" ")
        if scheme.lower() in KEY_SCHEMES and key.strip():
            return key.strip()
    return next((value.strip() for value in headers_of(scope, b"api-key") if value.strip()), None)


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


def _unauthorised(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, "authentication_error", code=code, headers=[("WWW-Authenticate", "Bearer")])


def _is_foreign(scope: Scope) -> bool:
    """Whether a browser says that another site's page sent this; programs say nothing.

    Sec-Fetch-Site is the browser's own word, but it is sent to https and localhost only; then Origin is compared.
    """
    sites = headers_of(scope, b"sec-fetch-site")
    if sites:
        return any(site not in (b"same-origin", b"none") for site in sites)
    hosts = headers_of(scope, b"host")
    return any(origin.partition(b"://")[2] not in hosts for origin in headers_of(scope, b"origin"))


def _host_name(value: bytes) -> str:
    """``[::1]:8000`` -> ``::1``; "" for what is no host."""
    try:
        return (urlsplit(b"//" + value).hostname or b"").decode("ascii").rstrip(".")
    except ValueError:
        return ""


def _is_loopback_address(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


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


def headers_of(scope: Scope, name: bytes) -> list[bytes]:
    """Every value of a header; `name` in lower case."""
    return [value for key, value in scope["headers"] if key == name]


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
