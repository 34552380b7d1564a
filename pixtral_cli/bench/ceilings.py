"""A device in, what it can do at most out: bytes read a second, operations of a matrix product a second.

Rates of a machine change while it runs, with its clock and with what else runs there. So they are measured again in
each round of a work, with all of torch's threads. Knows no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from pixtral_cli.model.free_memory import free_bytes

READ = 2**30
"""Bytes that are read, far more than caches hold; less where memory is short."""
SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the matrices that are multiplied."""
KINDS = (torch.bfloat16, torch.float32)
TIMES = 2  # of which the better counts


class Rates(NamedTuple):
    """Bytes read a second, and floating-point operations of a matrix product a second by dtype."""

    read: float
    product: Mapping[str, float]

    def operations(self, dtype: str) -> float:
        """Of products in that dtype; what is kept in bfloat16 may be computed in float32 where that is faster."""
        return max(self.product.values()) if dtype == "bfloat16" else self.product[dtype]


class Ceilings:
    """Measures the rates of a CPU or a GPU; `samples` are those so far.

    Reading is on a CPU a sum of integers, the fastest reader that torch has; on a GPU a copy, whose bytes read and
    written count. The bytes are random: a host may keep the equal pages of its guests once, and so in a cache.
    """

    @torch.inference_mode()
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: list[Rates] = []
        nbytes = min(READ, (free_bytes(device) or READ) // 8)
        self._numbers = torch.empty(nbytes // 8, dtype=torch.int64, device=device).random_()
        self._target = torch.empty_like(self._numbers) if device.type == "cuda" else None
        self._matrix = torch.randn(SIDE[device.type], SIDE[device.type], device=device)

    @torch.inference_mode()
    def sample(self) -> Rates:
        """The rates now."""
        products = {str(kind).removeprefix("torch."): self._product(self._matrix.to(kind)) for kind in KINDS}
        self.samples.append(Rates(self.read(), products))
        return self.samples[-1]

    @torch.inference_mode()
    def read(self) -> float:
        """Bytes a second, now."""
        numbers, target = self._numbers, self._target
        if target is None:
            return numbers.nbytes / self._best(numbers.sum)
        return 2 * numbers.nbytes / self._best(lambda: target.copy_(numbers))

    def _product(self, matrix: torch.Tensor) -> float:
        return 2 * len(matrix) ** 3 / self._best(lambda: torch.nn.functional.linear(matrix, matrix))

    def _best(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest time."""
        found = []
        for _ in range(TIMES):
            wait(self.device)
            begun = time.perf_counter()
            work()
            wait(self.device)
            found.append(time.perf_counter() - begun)
        return min(found)


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
