"""The functions of the library in C beside this file, bound by ctypes, which lets other threads run meanwhile.

native_library.py finds and loads it. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pixtral_cli.model.native_library import INSTRUCTIONS, OFF, SETTING, available, instructions, loaded, why_not

__all__ = ["INSTRUCTIONS", "OFF", "SETTING", "available", "function", "instructions", "threads", "why_not"]


def threads() -> int:
    """The most threads that the library uses: as many as torch has, or had before a pass that leaves torch one."""
    return _threads


def set_threads(count: int) -> None:
    global _threads  # noqa: PLW0603  # as torch's own number: of the whole process
    _threads = count


_threads = torch.get_num_threads()


def function(name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
    """The library's function of that name, which takes and gives these types of ctypes."""
    library = loaded().library
    assert library is not None, why_not()
    found = getattr(library, name)
    found.argtypes, found.restype = arguments, result
    return found
