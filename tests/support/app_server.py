"""The real app in a real uvicorn, on a thread of the test."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from pixtral_cli.server.app import create_app
from pixtral_cli.server.middleware import guarded
from pixtral_cli.server.protocol import guarded_protocol
from pixtral_cli.server.service import Service
from support.processes import PATIENCE


@dataclass
class Serving:
    """`url` is its base address, without /v1."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop

    @property
    def engine(self):
        return self.service.model.engine

    def call(self, function):
        """Call it on the server's event loop, where all of the service belongs."""
        self.loop.call_soon_threadsafe(function)

    def wait_until_idle(self, seconds=PATIENCE):
        """Whether nothing runs, waits or is being prepared within that time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.engine.busy and self.service.accepted == 0 and self.service.idle:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def serving(service, **guard):
    """A server of `service` on a free port of 127.0.0.1."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = guarded(create_app(service), host="127.0.0.1", **guard)
    config = uvicorn.Config(app, http=guarded_protocol(200), ws="none", lifespan="on", log_level="critical")
    server = uvicorn.Server(config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([listening])), daemon=True)
    thread.start()
    try:
        yield Serving(f"http://127.0.0.1:{listening.getsockname()[1]}", service, loop)
    finally:
        server.should_exit = True
        thread.join(20)
        loop.close()
        listening.close()
