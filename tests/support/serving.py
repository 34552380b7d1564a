"""A server for a test: any app on a thread, the real app on a thread, or `pixtral serve` as a process."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from pixtral_cli.server.client_limits import guarded_protocol
from pixtral_cli.server.middleware import guarded
from support.processes import PATIENCE, PROGRAM, clean_environment, wait_until

JSON = {"Content-Type": "application/json"}


@contextmanager
def on_thread(app, *, port=0, loop=None, **settings):
    """The address of an ASGI app, served until the block ends; `settings` are uvicorn's."""
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(
        app, lifespan="off", ws="none", log_level="critical", timeout_graceful_shutdown=5, **settings
    )
    server, loop = uvicorn.Server(config), loop or asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
        loop.close()
        listener.close()


@contextmanager
def guarded_on_thread(app, *, max_connections=200, head_seconds=10.0, unread_seconds=60.0, loop=None, **guard):
    """The same behind all that guards it: the protocol's limits, and those of `guarded`."""
    protocol = guarded_protocol(max_connections, head_seconds)
    protocol.unread_seconds = unread_seconds
    with on_thread(guarded(app, **{"host": "127.0.0.1", **guard}), http=protocol, loop=loop) as url:
        yield url


@dataclass
class Serving:
    """`url` is its base address, without /v1."""

    url: str
    service: Any
    loop: asyncio.AbstractEventLoop

    @property
    def engine(self):
        return self.service.model.engine

    def call(self, function):
        """Call it on the server's event loop, where all of the service belongs."""
        self.loop.call_soon_threadsafe(function)

    def wait_until_idle(self):
        """True, once nothing runs, waits or is being prepared."""
        return wait_until(lambda: not self.engine.busy and self.service.accepted == 0 and self.service.idle)


@contextmanager
def serving(service, **guard):
    """The real app of `service`, guarded."""
    from pixtral_cli.server.app import create_app  # which brings torch

    loop = asyncio.new_event_loop()
    with guarded_on_thread(create_app(service), loop=loop, **guard) as url:
        yield Serving(url, service, loop)


def hello(**more):
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0} | more


def error_of(response, status):
    """The error of an httpx response that has this status, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@dataclass
class Served:
    """A running server: its process, where it is, and what it has said so far."""

    process: subprocess.Popen
    errors: Path
    url: str = ""

    def said(self):
        return self.errors.read_text()

    def open(self, path, body=None, headers=(), timeout=60):
        """The response, whatever its status; a body is sent as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, JSON | dict(headers))
        try:
            return urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            return error

    def json(self, path, body=None, headers=()):
        with self.open(path, body, headers) as response:
            return json.load(response)

    def events(self, **more):
        """A stream, opened: its events, without the empty lines, as they come."""
        response = self.open("/v1/chat/completions", hello(stream=True, **more))
        return (line.decode().removeprefix("data: ").strip() for line in response if line.strip())

    def wait_for(self, pattern, seconds=PATIENCE):
        """What matches in what the server says; it must come while the process lives."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search(pattern, self.said())
            if found:
                return found
            assert self.process.poll() is None, self.said()
            time.sleep(0.01)
        raise AssertionError(f"{pattern!r} did not come: {self.said()}")

    def end(self, number=signal.SIGTERM, seconds=PATIENCE):
        """Send the signal -> exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def starting(*flags, command=PROGRAM, env=None):
    """The process, as soon as it runs; killed at the end if it still does. Its standard output must stay empty."""
    arguments = ["serve", "--model-path", "tiny", "--port", "0", *flags]
    with tempfile.NamedTemporaryFile() as errors, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*command, *arguments],
            env=clean_environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
        )
        try:
            yield Served(process, Path(errors.name))
            assert os.fstat(output.fileno()).st_size == 0
        finally:
            process.kill()
            process.wait()


@contextmanager
def served(*flags, **settings):
    """As `starting`, once the model is loaded."""
    with starting(*flags, **settings) as server:
        server.url = server.wait_for(r"address\s+(http://\S+)")[1]
        yield server
