"""The real app with the built-in model in a real uvicorn, for as long as the tests last."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import uvicorn

from pixtral_cli import Pixtral
from pixtral_cli.engine.worker import Worker
from pixtral_cli.server.app import create_app
from pixtral_cli.server.guard import guarded
from pixtral_cli.server.pictures import GuardedPictures, PicturePolicy
from pixtral_cli.server.protocol import guarded_protocol
from pixtral_cli.server.service import Service


@dataclass
class Serving:
    """`url` is its base address, without /v1."""

    url: str
    service: Service

    @property
    def engine(self):
        return self.service.model.engine

    def wait_until_idle(self, seconds=10.0):
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
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    try:
        yield Serving(f"http://127.0.0.1:{listening.getsockname()[1]}", service)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


@pytest.fixture(scope="session")
def tiny():
    model = Pixtral.load("tiny", max_batch_size=16)
    model.processor.load_picture = GuardedPictures(PicturePolicy()).load
    return model


@pytest.fixture(scope="session")
def server(tiny):
    """One for all tests: who leaves something running in it harms the others."""
    worker = Worker(tiny.engine)
    service = Service(tiny, worker, ("tiny",))
    with serving(service) as running:
        yield running
    service.close()
    worker.stop(10)
