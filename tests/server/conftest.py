"""The built-in model behind HTTP, for as long as the tests last."""

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
