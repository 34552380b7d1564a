"""The built-in model behind HTTP, for as long as the tests last."""

import httpx
import pytest
from support.serving import serving

from pixtral_cli import Pixtral
from pixtral_cli.server.media_policy import MediaPolicy, RequestImages
from pixtral_cli.server.service import Service


@pytest.fixture(scope="session")
def tiny():
    """In float32, where an answer does not depend on what else is asked."""
    model = Pixtral.load("tiny", max_batch_size=16, quantization_encoding="float32")
    model.processor.open_image = RequestImages(MediaPolicy()).opened
    return model


@pytest.fixture(scope="session")
def server(tiny):
    """One for all tests: who leaves something running in it harms the others."""
    with serving(Service(tiny, ("tiny",))) as running:
        yield running


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def own(tiny):
    """Another server of the same model, for tests that stop or limit it; call it with the service's fields."""
    started = []

    def start(**fields):
        running = serving(Service(tiny, ("tiny",), **fields))
        started.append(running)
        return running.__enter__()

    yield start
    for running in started:
        running.__exit__(None, None, None)
