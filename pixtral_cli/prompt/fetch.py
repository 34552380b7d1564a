"""An http(s) address in, its bytes out, within limits; knows no pictures beyond the word in its errors."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPSConnection
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import BaseHandler, HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request

from pixtral_cli.prompt.errors import ImageFetchFailed, ImageTooLarge, without_password
from pixtral_cli.prompt.settings import reason_of

USER_AGENT = "Mozilla/5.0 (compatible; pixtral-cli)"
CONNECT_SECONDS = 10.0
TOTAL_SECONDS = 30.0
MAX_BYTES = 32 * 2**20
PIECE = 64 * 1024
LONGEST_TOLD = 500
SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"II*\0", b"MM\0*", b"BM")
"""How JPEG, PNG, WebP, GIF, TIFF and BMP files begin."""
UNLABELLED = ("application/octet-stream", "binary/octet-stream")
"""What storage services call a file whose kind nobody told them."""
URL_CHARACTERS = ":/?#[]@!$&'()*+,;=%-._~"
Dial = Callable[[str, int, float], socket.socket]
"""host, port, seconds -> a connected socket; raises OSError, whose text is the reason."""


@dataclass(frozen=True)
class Guard:
    """For downloads that a stranger asks for: no proxies, no way from https to http, nothing but pictures."""

    dial: Dial
    """Makes every connection, and refuses those that should not be."""
    redirects: int = 3


@dataclass(frozen=True)
class _Limits:
    connect: float
    total: float
    max_bytes: int
    guarded: bool


def fetch(
    url: str,
    *,
    connect: float = CONNECT_SECONDS,
    total: float = TOTAL_SECONDS,
    max_bytes: int = MAX_BYTES,
    guard: Guard | None = None,
) -> bytes:
    """Download `url`.

    Args:
        connect: seconds to wait for a connection, and for each piece of data.
        total: seconds for everything, name look-up and redirections included.
        max_bytes: more than this is refused.
        guard: how connections are made; without one, anywhere, through the proxies of the environment.

    Raises:
        ImageFetchFailed: unreachable, an HTTP status, a page instead of a picture, too slow.
        ImageTooLarge: more than `max_bytes`.
    """
    _check_address(url)
    limits, line = _Limits(connect, total, max_bytes, guard is not None), _line(guard)
    outcome: list[bytes | BaseException] = []
    worker = threading.Thread(target=_into, args=(outcome, url, limits, line), daemon=True)
    worker.start()
    worker.join(total)
    if not outcome:
        if line:
            line.cut()
        raise _too_slow(url, total)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _told(url: str) -> str:
    """`url` in a sentence, which a stranger must not be able to make long."""
    url = without_password(url)
    return url if len(url) <= LONGEST_TOLD else f"{url[:LONGEST_TOLD]}…"


def _check_address(url: str) -> None:
    """Raise ImageFetchFailed for what no connection could be made to, and for a password."""
    try:
        parts = urlsplit(url)
        reason = "it names no server" if not parts.hostname else "its port is 0" if parts.port == 0 else None
    except ValueError as error:
        reason = f"the address is malformed ({reason_of(error)})"
    if "@" in url.partition("://")[2].partition("/")[0]:
        reason = "an address with a user's name and password is not supported"
    if reason:
        raise ImageFetchFailed(_told(url), reason)


def _line(guard: Guard | None) -> Line | None:
    if guard is None:
        return None
    return Line(guard.dial, guard.redirects)


def _into(outcome: list[bytes | BaseException], url: str, limits: _Limits, line: Line | None) -> None:
    try:
        outcome.append(_download(url, limits, line))
    except (ImageFetchFailed, ImageTooLarge) as error:
        outcome.append(error)
    except Exception as error:  # urllib and http.client raise a dozen kinds
        outcome.append(ImageFetchFailed(_told(url), _reason(error, limits)))


def _download(url: str, limits: _Limits, line: Line | None) -> bytes:
    deadline = time.monotonic() + limits.total
    request = Request(quote(url, safe=URL_CHARACTERS), headers={"User-Agent": USER_AGENT, "Accept": "image/*,*/*"})
    data = bytearray()
    with _opener(line).open(request, timeout=limits.connect) as response:
        while piece := response.read1(PIECE):
            if not data:
                _refuse_page(url, response.headers, piece, limits.guarded)
            data += piece
            if len(data) > limits.max_bytes:
                most = f"{limits.max_bytes / 2**20:g} MiB"
                raise ImageTooLarge(_told(url), f"The picture {_told(url)} is larger than {most}.")
            if time.monotonic() > deadline:
                raise _too_slow(url, limits.total)
        _check_whole(url, response.headers.get("Content-Length"), len(data))
    return bytes(data)


def _check_whole(url: str, promised: str | None, received: int) -> None:
    """`read1` says nothing when a connection ends early."""
    if promised and promised.isdecimal() and received < int(promised):
        raise ImageFetchFailed(_told(url), f"the connection ended after {received} of {promised} bytes")


def _too_slow(url: str, total: float) -> ImageFetchFailed:
    return ImageFetchFailed(_told(url), f"it took more than {total:g} seconds")


def _refuse_page(url: str, headers: Any, start: bytes, guarded: bool) -> None:
    """A page, said to be one and not a picture under a wrong name, need not be downloaded."""
    packed = headers.get("Content-Encoding", "identity")
    if packed.lower() != "identity":
        raise ImageFetchFailed(_told(url), f"the server packed it with {packed}, which was not asked for")
    kind = headers.get_content_type()
    may_be_one = not guarded or kind in UNLABELLED or "Content-Type" not in headers
    if not kind.startswith("image/") and not (may_be_one and start.startswith(SIGNATURES)):
        raise ImageFetchFailed(_told(url), f"the server sent {kind}, not a picture")


def _opener(line: Line | None) -> Any:
    """http and https only, redirections too: never a file, never ftp."""
    from urllib import request

    opener = request.OpenerDirector()
    plain = (request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.HTTPRedirectHandler)
    common = (request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor, request.UnknownHandler)
    for handler in (*(line.handlers() if line else (kind() for kind in plain)), *(kind() for kind in common)):
        opener.add_handler(handler)
    return opener


def _reason(error: Exception, limits: _Limits) -> str:
    """A stranger is not told the words of a server that only this machine may be able to reach."""
    from http.client import BadStatusLine
    from urllib.error import HTTPError, URLError

    if isinstance(error, HTTPError):
        answer = "" if limits.guarded else " ".join(str(error.reason).split())  # a redirection loop's has several lines
        return f"the server answered {error.code} {answer}".rstrip(" .:")
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {limits.connect:g} seconds"
    if isinstance(cause, UnicodeError):
        return "the address is malformed"
    if limits.guarded and isinstance(cause, BadStatusLine) and not isinstance(cause, ConnectionError):
        return "what answered does not speak HTTP"
    return getattr(cause, "strerror", None) or reason_of(cause)


class Line:
    """The connections of one download, which can be cut from another thread."""

    def __init__(self, dial: Dial, redirects: int) -> None:
        self.dial, self.redirects = dial, redirects
        self.sockets: list[socket.socket] = []
        self.is_cut = False

    def handlers(self) -> list[BaseHandler]:
        return [_Http(self), _Https(self), _Redirects(self.redirects)]

    def open(self, host: str, port: int, seconds: float) -> socket.socket:
        connection = self.dial(host, port, seconds)
        connection.settimeout(seconds)
        return self.keep(connection)

    def keep(self, connection: Any) -> Any:
        self.sockets.append(connection)
        if self.is_cut:
            self.cut()
        return connection

    def cut(self) -> None:
        """End what is still waiting for data: a server that sends a byte now and then would hold its thread."""
        self.is_cut = True
        for connection in list(self.sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Connection(HTTPConnection):
    def __init__(self, line: Line, host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self.line = line

    def connect(self) -> None:
        self.sock = self.line.open(self.host, self.port, self.timeout)


class _SecureConnection(HTTPSConnection):
    def __init__(self, line: Line, host: str, **options: Any) -> None:
        self.trust = ssl.create_default_context()
        super().__init__(host, context=self.trust, **options)
        self.line = line

    def connect(self) -> None:
        """The certificate must be the name's, whatever the address that was dialled."""
        plain = self.line.open(self.host, self.port, self.timeout)
        name = self.host.rstrip(".")
        self.sock = self.trust.wrap_socket(plain, server_hostname=name, do_handshake_on_connect=False)
        self.line.keep(self.sock).do_handshake()


class _Http(HTTPHandler):
    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def http_open(self, request: Request) -> Any:
        return self.do_open(partial(_Connection, self.line), request)


class _Https(HTTPSHandler):
    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def https_open(self, request: Request) -> Any:
        return self.do_open(partial(_SecureConnection, self.line), request)


class _Redirects(HTTPRedirectHandler):
    max_repeats = 1

    def __init__(self, most: int) -> None:
        self.max_redirections = most

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()  # urllib would read the body of a redirection to its end, however long
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise OSError("it redirects from https to http")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
