"""How many of torch's threads a forward pass on a CPU is worth. Knows no model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL_PASS = 2**26
"""Multiplications. Below this, several threads wait for each other about as long as they save when the machine is
quiet, and many times as long when other programs use its cores."""
USERS_OWN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """Within it torch has one thread if the work is small, and else as many as before.

    The choice is made by the work alone, so equal shapes give equal bits. Who sets OMP_NUM_THREADS gets that number.
    """
    threads = torch.get_num_threads()
    if multiplications >= SMALL_PASS or threads == 1 or any(name in os.environ for name in USERS_OWN):
        yield
        return
    torch.set_num_threads(1)  # takes a microsecond
    try:
        yield
    finally:
        torch.set_num_threads(threads)
