"""A web server on this machine that answers as it is told, and a look-up that knows the names it is told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web(BaseHTTPRequestHandler):
    """Answers by path; `seen` are the paths that were asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.server.server_address[0], self.path, self.headers.get("Host")))
        self.server.agents.append(dict(self.headers))
        answer = self.server.answers.get(self.path, {})
        self.send_response(answer.get("status", 200))
        body = answer.get("body", self.server.body)
        headers = {"Content-Type": "image/png", "Content-Length": str(len(body)), "Connection": "close"}
        for name, value in {**headers, **answer.get("headers", {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        for piece in answer.get("pieces", [body]):
            time.sleep(answer.get("pause", 0))
            self.wfile.write(piece)
        self.close_connection = True

    def log_message(self, *args):
        pass

    def handle(self):
        with suppress(OSError):  # the client had enough
            super().handle()


@contextmanager
def web(body: bytes, address="127.0.0.1", port=0, tls=None, **answers) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer((address, port), Web) as server:
        server.daemon_threads = True
        server.body = body
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.seen, server.agents = [], []
        server.answers = {f"/{path}": answer for path, answer in answers.items()}
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def names(**known):
    """A look-up that knows these names, and what was asked of it."""
    asked = []

    def look_up(host, port, **options):
        asked.append(host)
        address = known.get(host.replace(".", "_"), host)
        return socket.getaddrinfo(next(address) if hasattr(address, "__next__") else address, port, **options)

    look_up.asked = asked
    return look_up
