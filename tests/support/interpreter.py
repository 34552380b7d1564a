"""Triton without a card: kernels interpreted, for tests of their numbers, and compiled for cards that are not here.

Whether kernels are interpreted is settled when triton is imported. So such tests run in one child Python of their own,
and the process of pytest imports triton as a user does.
"""

import functools
import importlib.util
import inspect
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

CARDS = (80, 90, 120)
"""Compute capabilities that every kernel must compile for: A100, H100 and H200, RTX 50 and RTX PRO Blackwell."""


def interpreted(test):
    """A test that runs where Triton's kernels are interpreted, on CPU tensors; its arguments must be picklable."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        if _interpreting():
            return test(*args, **kwargs)
        if importlib.util.find_spec("triton") is None:
            pytest.skip("no Triton here")
        return _child().submit(_call, inspect.getfile(test), test.__name__, args, kwargs).result()

    return run


def compile_for(card, kernel, signature, constants, warps=4, stages=3):
    """The kernel in machine code of a card of capability `card` -> triton's CompiledKernel; raises where it fails.

    `signature` has a type for each argument that is no constant, such as "*bf16", "i32" or "fp32"; "i32:16" is a
    multiple of 16, as pointers are.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton here")
    if _interpreting():
        pytest.skip("an interpreted kernel is not compiled")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(types)}
    aligned = {
        places[name]: [["tt.divisibility", 16]] for name, of in types.items() if of[0] == "*" or of[-3:] == ":16"
    }
    source = ASTSource(
        kernel,
        {name: of.removesuffix(":16") for name, of in types.items()},
        {places[name]: value for name, value in constants.items()},
        aligned,
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def _interpreting():
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _child():
    """It lives as long as pytest: torch and triton take seconds to import."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _interpret)


def _interpret():
    os.environ["TRITON_INTERPRET"] = "1"


def _call(file, name, args, kwargs):
    getattr(_module(file), name)(*args, **kwargs)


@functools.cache
def _module(file):
    spec = importlib.util.spec_from_file_location("interpreted_tests", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
