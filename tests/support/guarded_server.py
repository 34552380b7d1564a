"""A trivial app behind all that guards the real one, and a raw socket to talk to it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from support.processes import PATIENCE
from support.serving import guarded_on_thread


async def echo(scope, receive, send):
    """Answers with what reached it: path, length of the body, salt of the key."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    salt = scope.get("state", {}).get("key_salt", b"").hex()
    answer = json.dumps({"path": scope["path"], "length": len(body), "salt": salt}).encode()
    head = {"status": 200, "headers": [(b"content-type", b"application/json"), (b"x-app", b"1")]}
    await send({"type": "http.response.start", **head})
    await send({"type": "http.response.body", "body": answer})


@contextmanager
def guarded_port(app=echo, **limits) -> Iterator[int]:
    """The port of a guarded server on 127.0.0.1; `limits` are those of `guarded_on_thread`."""
    with guarded_on_thread(app, **limits) as url:
        yield int(url.rpartition(":")[2])


class Client:
    """One connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def drip(self, data: bytes, pause: float) -> None:
        """One byte at a time until the server has had enough."""
        self.socket.settimeout(pause)
        for place in range(len(data)):
            try:
                self.socket.sendall(data[place : place + 1])
                if self.socket.recv(1, socket.MSG_PEEK) is not None:
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        self.socket.settimeout(20)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one answer; what comes until the connection ends, or its stated length."""
        file = self.socket.makefile("rb")
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        length = headers.get("content-length")
        return status, headers, file.read(int(length)) if length else file.read()


def ask(port: int, method: str = "GET", path: str = "/v1/models", body: bytes = b"", **headers: str):
    """Status, headers and JSON of one request; `headers` with _ for -."""
    lines = {"Host": f"127.0.0.1:{port}", "Connection": "close"}
    if body:
        lines |= {"Content-Length": str(len(body)), "Content-Type": "application/json"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    client = Client(port)
    try:
        client.send(head.encode() + b"\r\n" + body)
        status, answered, data = client.answer()
    finally:
        client.socket.close()
    if answered.get("transfer-encoding") == "chunked":
        data = b"".join(data.split(b"\r\n")[1::2])
    return status, answered, json.loads(data) if data else None
