"""CUDA source in, functions that run it on the CPU out, in the place of `nvrtc.load`; see emulated_card.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from pixtral_cli.model.kernels.nvrtc import Card

HEADER = Path(__file__).with_name("emulated_card.h")
COMPILER = shutil.which("g++")
CARD = Card(sm=90, processors=2, shared_per_processor=233472, shared_per_block=232448)
"""An H100 with two processors."""
WORDS = 6  # arguments that are passed, whether a kernel has them or not


class Function:
    """One kernel; `launches` are the blocks, threads and bytes of shared memory that were asked for."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._library, self._kernel = library, ctypes.cast(getattr(library, name), ctypes.c_void_p)
        self._allowed = 48 * 2**10
        self.launches: list[tuple[int, int, int]] = []

    def __call__(self, blocks: int, threads: int, shared: int, *arguments: torch.Tensor | int) -> None:
        assert blocks > 0 and 0 < threads <= 1024 and threads % 32 == 0
        assert shared <= self._allowed, f"{shared} bytes of shared memory, {self._allowed} allowed"
        words = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in arguments if isinstance(x, torch.Tensor))
        assert all(-(2**31) <= x < 2**31 for x in arguments if isinstance(x, int))
        self.launches.append((blocks, threads, shared))
        values = (ctypes.c_long * WORDS)(*words, *[0] * (WORDS - len(words)))
        self._library.launch(self._kernel, blocks, threads, shared, values)

    def allow(self, shared: int) -> None:
        assert shared <= CARD.shared_per_block
        self._allowed = max(self._allowed, shared)


def load(source: str, options: Sequence[str], names: Sequence[str], device: torch.device) -> dict[str, Function]:
    """As `nvrtc.load`; `device` is the CPU."""
    key = hashlib.sha256("\0".join([source, *options, HEADER.read_text()]).encode()).hexdigest()
    library = Path(os.environ["PIXTRAL_CACHE"]) / f"emulated-{key[:16]}.so"
    if not library.exists():
        flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-DEMULATED", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
        assert COMPILER is not None
        subprocess.run(
            [COMPILER, *flags, *options, "-include", HEADER, "-x", "c++", "-", "-o", library],
            input=source, text=True, check=True,
        )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    return {name: Function(loaded, name) for name in names}
