"""The library in C with each set of instructions that this machine has, in turn."""

import pytest

from pixtral_cli.model import native_library
from pixtral_cli.model.kernels import native


@pytest.fixture(params=native.INSTRUCTIONS)
def instructions(request, monkeypatch):
    """The name of those in use; `off` may be asked for as well: then there is no library."""
    monkeypatch.setenv(native.SETTING, request.param)
    native_library.loaded.cache_clear()
    if request.param != native.OFF and not native.available():
        pytest.skip(native.why_not())
    yield request.param
    monkeypatch.undo()
    native_library.loaded.cache_clear()
    native.available()  # which chooses the best again
