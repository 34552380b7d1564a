"""A way to connect in, urllib's handlers for http and https that use nothing else out; knows no pictures.

For downloads on behalf of somebody else: a host's name goes to `dial` and nowhere else, no proxy is asked, and a
redirection connects, so is checked, again.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPSConnection
from typing import Any
from urllib.request import BaseHandler, HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request

Dial = Callable[[str, int, float], socket.socket]
"""host, port, seconds -> a connected socket; raises OSError, whose text is the reason."""


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
