"""The library in C for CPUs, found and loaded; what it computes with, or why not, in words. Imports no torch.

It is an optional extension of kernels/: an installation without a compiler has none, and torch computes instead. It
chooses the instructions by itself; PIXTRAL_CPU_KERNELS names others ("off": none of it). kernels/native.py binds its
functions.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

SETTING = "PIXTRAL_CPU_KERNELS"
OFF = "off"
INSTRUCTIONS = ("portable", "avx2", "avx512", "avx512bf16")
"""In the order of `enum instructions` in native.h: each includes those before it."""
FOLDER = Path(__file__).with_name("kernels")
ABSENT = "The compiled kernels for CPUs do not run here, so decoding is many times slower."
NOT_COMPILED = (
    "They were not compiled when pixtral-cli was installed: install a C compiler (gcc or clang), and then "
    "pixtral-cli again, with pip's --force-reinstall --no-deps --no-cache-dir."
)


class Loaded(NamedTuple):
    library: ctypes.CDLL | None
    why_not: str | None
    instructions: str


def available() -> bool:
    """Whether the library computes here."""
    return loaded().library is not None


def why_not() -> str | None:
    """What stands in the way, in one sentence; None if nothing does."""
    return loaded().why_not


def instructions() -> str:
    """One of INSTRUCTIONS: those that the library computes with; "off" where it does not."""
    return loaded().instructions


def words(threads: int | None = None) -> str:
    """Which kernels multiply on a CPU, in a few words: "avx512bf16 (2 threads)"."""
    if available():
        return instructions() + (f" ({threads} {'thread' if threads == 1 else 'threads'})" if threads else "")
    return f"torch's ({SETTING} is off)" if _wanted() == OFF else "torch's (the compiled ones do not run here)"


def notes() -> list[str]:
    """A sentence on the library where it does not run, with what to do; none where the user switched it off."""
    return [] if available() or _wanted() == OFF else [f"{ABSENT} {why_not()}"]


def _wanted() -> str:
    return os.environ.get(SETTING, "").lower()


@cache
def loaded() -> Loaded:
    wanted = _wanted()
    if wanted == OFF:
        return Loaded(None, f"{SETTING} is off.", OFF)
    if wanted and wanted not in INSTRUCTIONS:
        return Loaded(None, f"{SETTING} is {wanted!r}, which is none of {', '.join((OFF, *INSTRUCTIONS))}.", OFF)
    path = next((path for suffix in EXTENSION_SUFFIXES if (path := FOLDER / f"_native{suffix}").exists()), None)
    if path is None:
        return Loaded(None, NOT_COMPILED, OFF)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Loaded(None, f"{path.name} cannot be loaded: {error}.", OFF)
    best = INSTRUCTIONS[library.pixtral_best_instructions()]
    if wanted and INSTRUCTIONS.index(wanted) > INSTRUCTIONS.index(best):
        return Loaded(None, f"{SETTING} is {wanted}, and this processor has no more than {best}.", OFF)
    library.pixtral_use_instructions(INSTRUCTIONS.index(wanted or best))
    return Loaded(library, None, wanted or best)
