"""An http(s) address in, its bytes out, within limits; knows no images beyond the word in its errors.

Without a `dial`, connections go anywhere, through the proxies of the environment. With one, as for downloads that a
stranger asks for, a host's name goes to `dial` and nowhere else, no proxy is asked, a redirection connects (so is
checked) again, there is no way from https to http, and nothing but an image is taken.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import BadStatusLine, HTTPConnection, HTTPSConnection
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import (
    AbstractHTTPHandler,
    BaseHandler,
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from pixtral_cli.errors import reason_of
from pixtral_cli.prompt.errors import PASSWORD, ImageFetchFailed, ImageTooLarge

USER_AGENT = "Mozilla/5.0 (compatible; pixtral-cli)"
CHUNK_BYTES = 64 * 1024
LONGEST_TOLD = 500
SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"II*\0", b"MM\0*", b"BM")
"""How JPEG, PNG, WebP, GIF, TIFF and BMP files begin."""
UNLABELLED = ("application/octet-stream", "binary/octet-stream")
"""What storage services call a file whose kind nobody told them."""
URL_CHARACTERS = ":/?#[]@!$&'()*+,;=%-._~"
Dial = Callable[[str, int, float], socket.socket]
"""host, port, seconds -> a connected socket; raises OSError, whose text is the reason."""


@dataclass(frozen=True)
class FetchLimits:
    """What is too slow or too large."""

    connect_seconds: float = 10.0
    """For a connection, and for each piece of data."""
    total_seconds: float = 30.0
    """For everything, name look-up and redirections included."""
    max_bytes: int = 32 * 2**20


LIMITS = FetchLimits()


def fetch(url: str, limits: FetchLimits = LIMITS, dial: Dial | None = None) -> bytes:
    """Download `url`.

    Args:
        dial: makes every connection, and refuses those that should not be; see above.

    Raises:
        ImageFetchFailed: unreachable, an HTTP status, a page instead of an image, too slow.
        ImageTooLarge: more than `limits.max_bytes`.
    """
    download = _Download(url, limits, dial)
    download.check_address()
    threading.Thread(target=download.run, daemon=True).start()
    try:
        return download.result.result(limits.total_seconds)
    except TimeoutError:
        download.cut()
        raise download.too_slow() from None


class _Download:
    """One download, on a thread of its own; `cut` may be called from another."""

    def __init__(self, url: str, limits: FetchLimits, dial: Dial | None) -> None:
        self.url, self.limits, self.dial = url, limits, dial
        self.result: Future[bytes] = Future()
        self._sockets: list[socket.socket] = []
        self._is_cut = False
        shown = PASSWORD.sub(r"\1", url)
        self.name = shown if len(shown) <= LONGEST_TOLD else f"{shown[:LONGEST_TOLD]}…"
        """Of the address in a sentence, which a stranger must not be able to make long."""

    def failed(self, reason: str) -> ImageFetchFailed:
        return ImageFetchFailed(self.name, reason)

    def too_slow(self) -> ImageFetchFailed:
        return self.failed(f"it took more than {self.limits.total_seconds:g} seconds")

    def check_address(self) -> None:
        """Raise ImageFetchFailed for what no connection could be made to, and for a password."""
        try:
            parts = urlsplit(self.url)
            reason = "it names no server" if not parts.hostname else "its port is 0" if parts.port == 0 else None
        except ValueError as error:
            reason = f"the address is malformed ({reason_of(error)})"
        if "@" in self.url.partition("://")[2].partition("/")[0]:
            reason = "an address with a user's name and password is not supported"
        if reason:
            raise self.failed(reason)

    def run(self) -> None:
        """Leave the bytes, or what went wrong, in `result`."""
        try:
            self.result.set_result(self._read())
        except (ImageFetchFailed, ImageTooLarge) as error:
            self.result.set_exception(error)
        except Exception as error:  # noqa: BLE001  urllib and http.client raise a dozen kinds
            self.result.set_exception(self.failed(self._reason(error)))

    def _read(self) -> bytes:
        limits, data = self.limits, bytearray()
        deadline = time.monotonic() + limits.total_seconds
        headers = {"User-Agent": USER_AGENT, "Accept": "image/*,*/*"}
        request = Request(quote(self.url, safe=URL_CHARACTERS), headers=headers)
        with self._opener().open(request, timeout=limits.connect_seconds) as response:
            while chunk := response.read1(CHUNK_BYTES):
                if not data:
                    self._refuse_page(response.headers, chunk)
                data += chunk
                if len(data) > limits.max_bytes:
                    most = f"{limits.max_bytes / 2**20:g} MiB"
                    raise ImageTooLarge(self.name, f"The picture {self.name} is larger than {most}.")
                if time.monotonic() > deadline:
                    raise self.too_slow()
            promised = response.headers.get("Content-Length", "")
            if promised.isdecimal() and len(data) < int(promised):  # of which `read1` says nothing
                raise self.failed(f"the connection ended after {len(data)} of {promised} bytes")
        return bytes(data)

    def _opener(self) -> OpenerDirector:
        """http and https only, redirections too: never a file, never ftp."""
        handlers: list[BaseHandler] = [HTTPDefaultErrorHandler(), HTTPErrorProcessor(), UnknownHandler()]
        if self.dial:
            handlers += [_DialledHandler(self), _SafeRedirects()]
        else:
            handlers += [ProxyHandler(), HTTPHandler(), HTTPSHandler(), HTTPRedirectHandler()]
        opener = OpenerDirector()
        for handler in handlers:
            opener.add_handler(handler)
        return opener

    def _refuse_page(self, headers: Any, start: bytes) -> None:
        """A page, said to be one and not an image under a wrong name, need not be downloaded."""
        packed = headers.get("Content-Encoding", "identity")
        if packed.lower() != "identity":
            raise self.failed(f"the server packed it with {packed}, which was not asked for")
        kind = headers.get_content_type()
        may_be_one = not self.dial or kind in UNLABELLED or "Content-Type" not in headers
        if not kind.startswith("image/") and not (may_be_one and start.startswith(SIGNATURES)):
            raise self.failed(f"the server sent {kind}, not a picture")

    def _reason(self, error: Exception) -> str:
        """A stranger is not told the words of a server that only this machine may be able to reach."""
        if isinstance(error, HTTPError):
            answer = "" if self.dial else " ".join(str(error.reason).split())  # a redirection loop's has several lines
            return f"the server answered {error.code} {answer}".rstrip(" .:")
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, TimeoutError):
            return f"no answer within {self.limits.connect_seconds:g} seconds"
        if isinstance(cause, UnicodeError):
            return "the address is malformed"
        if self.dial and isinstance(cause, BadStatusLine) and not isinstance(cause, ConnectionError):
            return "what answered does not speak HTTP"
        return getattr(cause, "strerror", None) or reason_of(cause if isinstance(cause, Exception) else OSError(cause))

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection that `dial` has made."""
        assert self.dial
        connection = self.dial(host, port, self.limits.connect_seconds)
        connection.settimeout(self.limits.connect_seconds)
        return self.keep(connection)

    def keep(self, connection: Any) -> Any:
        """Remember a socket, to be cut."""
        self._sockets.append(connection)
        if self._is_cut:
            self.cut()
        return connection

    def cut(self) -> None:
        """End what is still waiting for data: a server that sends a byte now and then would hold its thread."""
        self._is_cut = True
        for connection in list(self._sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Connection(HTTPConnection):
    def __init__(self, download: _Download, host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self.download = download

    def connect(self) -> None:
        self.sock = self.download.connect(self.host, self.port)


class _SecureConnection(HTTPSConnection):
    def __init__(self, download: _Download, host: str, **options: Any) -> None:
        self.trust = ssl.create_default_context()
        super().__init__(host, context=self.trust, **options)
        self.download = download

    def connect(self) -> None:
        """The certificate must be the name's, whatever the address that was dialled."""
        plain = self.download.connect(self.host, self.port)
        name = self.host.rstrip(".")
        self.sock = self.trust.wrap_socket(plain, server_hostname=name, do_handshake_on_connect=False)
        self.download.keep(self.sock).do_handshake()


class _DialledHandler(AbstractHTTPHandler):
    """http and https over connections that the download makes."""

    http_request = https_request = AbstractHTTPHandler.do_request_

    def __init__(self, download: _Download) -> None:
        super().__init__()
        self.download = download

    def http_open(self, request: Request) -> Any:
        return self.do_open(partial(_Connection, self.download), request)

    def https_open(self, request: Request) -> Any:
        return self.do_open(partial(_SecureConnection, self.download), request)


class _SafeRedirects(HTTPRedirectHandler):
    max_redirections = 3
    max_repeats = 1

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()  # urllib would read the body of a redirection to its end, however long
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise OSError("it redirects from https to http")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
