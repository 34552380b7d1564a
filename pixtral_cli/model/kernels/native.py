"""The library in C beside this file: found, loaded and bound by ctypes, which lets other threads run meanwhile.

It is an optional extension: an installation without a compiler has none, and torch computes instead. It chooses the
instructions by itself; PIXTRAL_CPU_KERNELS names others ("off": none of it). Knows no weights.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch

SETTING = "PIXTRAL_CPU_KERNELS"
OFF = "off"
INSTRUCTIONS = ("portable", "avx2", "avx512", "avx512bf16")
"""In the order of `enum instructions` in native.h: each includes those before it."""


class Loaded(NamedTuple):
    library: ctypes.CDLL | None
    why_not: str | None
    instructions: str


def available() -> bool:
    """Whether the library computes here."""
    return _loaded().library is not None


def why_not() -> str | None:
    """What stands in the way, in one sentence; None if nothing does."""
    return _loaded().why_not


def instructions() -> str:
    """One of INSTRUCTIONS: those that the library computes with; "off" where it does not."""
    return _loaded().instructions


def threads() -> int:
    """How many threads the library may use: as many as torch had when it was loaded, which OMP_NUM_THREADS says."""
    return _threads


_threads = torch.get_num_threads()


def function(name: str, *arguments: Any, result: Any = None) -> Callable[..., Any]:
    """The library's function of that name, which takes and gives these types of ctypes."""
    library = _loaded().library
    assert library is not None, why_not()
    found = getattr(library, name)
    found.argtypes, found.restype = arguments, result
    return found


@cache
def _loaded() -> Loaded:
    wanted = os.environ.get(SETTING, "").lower()
    if wanted == OFF:
        return Loaded(None, f"{SETTING} is off.", OFF)
    if wanted and wanted not in INSTRUCTIONS:
        return Loaded(None, f"{SETTING} is {wanted!r}, which is none of {', '.join((OFF, *INSTRUCTIONS))}.", OFF)
    paths = [Path(__file__).with_name("_native" + suffix) for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return Loaded(None, "Its library in C was not compiled: there was no C compiler when it was installed.", OFF)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Loaded(None, f"Its library in C cannot be loaded: {error}.", OFF)
    best = INSTRUCTIONS[library.pixtral_best_instructions()]
    if wanted and INSTRUCTIONS.index(wanted) > INSTRUCTIONS.index(best):
        return Loaded(None, f"{SETTING} is {wanted}, and this processor has no more than {best}.", OFF)
    library.pixtral_use_instructions(INSTRUCTIONS.index(wanted or best))
    return Loaded(library, None, wanted or best)
