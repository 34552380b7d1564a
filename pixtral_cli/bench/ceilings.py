"""A device in, what it can do at most out: bytes read a second, operations of a matrix product a second.

Each is the best of several rounds with all of torch's threads: a ceiling is what the machine can do when nothing else
is in the way. Knows no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pixtral_cli.model.free_memory import free_bytes

READ = 2**30
"""Bytes that are read, far more than caches hold; less where memory is short."""
SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the matrices that are multiplied."""
ROUNDS = 7


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second, and floating-point operations a second by dtype."""

    read: float
    product: dict[str, float]

    def operations(self, dtype: str) -> float:
        """Of products in that dtype; what is kept in bfloat16 may be computed in float32 where that is faster."""
        return max(self.product.values()) if dtype == "bfloat16" else self.product[dtype]


def measure(device: torch.device) -> Ceilings:
    """The ceilings of a CPU or a GPU."""
    return Ceilings(_read(device), {str(kind).removeprefix("torch."): _product(device, kind) for kind in KINDS})


KINDS = (torch.bfloat16, torch.float32)


@torch.inference_mode()
def _read(device: torch.device) -> float:
    """On a CPU a sum of float32 numbers, which is the fastest reader that torch has; on a GPU a copy, whose bytes
    read and bytes written count."""
    nbytes = min(READ, (free_bytes(device) or READ) // 4)
    numbers = torch.ones(nbytes // 4, device=device)
    if device.type == "cpu":
        return nbytes / _best(numbers.sum, device)
    target = torch.empty_like(numbers)
    return 2 * nbytes / _best(lambda: target.copy_(numbers), device)


@torch.inference_mode()
def _product(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: torch.nn.functional.linear(a, b), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest round."""
    found = []
    for _ in range(ROUNDS):
        wait(device)
        begun = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - begun)
    return min(found)


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
