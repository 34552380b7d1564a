"""The sets of instructions that this machine's library computes with, each to be tried in turn."""

import ctypes

import pytest

from pixtral_cli.model.kernels import native

PATHS = native.INSTRUCTIONS[: native.INSTRUCTIONS.index(native.instructions()) + 1] if native.available() else ()
compiled = pytest.mark.skipif(not PATHS, reason=str(native.why_not()))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """The library computes with these instructions while a test runs."""
    use = native.function("pixtral_use_instructions", ctypes.c_int)
    before = native.instructions()
    monkeypatch.setattr(native, "instructions", lambda: request.param)
    use(native.INSTRUCTIONS.index(request.param))
    yield request.param
    use(native.INSTRUCTIONS.index(before))


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: request.param)
    return request.param
