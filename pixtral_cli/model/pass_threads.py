"""How many of torch's threads a forward pass on a CPU uses. Knows no model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

SMALL_PASS = 2**26
"""Multiplications. Below this, threads wait for each other about as long as they save."""
FEW_ROWS = 16
"""A pass of so few rows reads each weight for little work: its threads meet every fraction of a millisecond."""
BUSY = 0.7
"""Of the time of a pass, the part in which its own thread runs. With several threads it is 0.8 to 1 on a quiet machine,
and a half on two cores where another program computes: threads wait for one that does not run. Below this, the
machine is taken to be busy."""
SECONDS_ALONE, TIMES_ALONE = 1.0, 4
"""How long one thread goes on alone after that: seconds, or times what the slow pass took, whichever is longer."""
USERS_OWN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class PassThreads:
    """Chooses pass by pass: one thread for little work, and for few rows while other programs use the cores.

    With `exact` the work alone decides, so that equal shapes give equal bits: the last bits of a float32 product
    depend on the number of threads. Who sets OMP_NUM_THREADS gets that number.
    """

    exact: bool = False
    alone_until: float = 0.0
    """Of `time.monotonic`: then several threads are tried again."""

    @contextmanager
    def chosen(self, rows: int, multiplications: int) -> Iterator[None]:
        """Within it torch has the threads for a pass of `rows`, `multiplications` for each; then as many as before."""
        threads = torch.get_num_threads()
        if threads == 1 or any(name in os.environ for name in USERS_OWN):
            yield
            return
        watched = rows <= FEW_ROWS and not self.exact
        alone = rows * multiplications < SMALL_PASS or (watched and time.monotonic() < self.alone_until)
        wall, own = time.perf_counter(), time.thread_time()
        try:
            if alone:
                torch.set_num_threads(1)  # takes a microsecond
            yield
        finally:
            torch.set_num_threads(threads)
        wall = time.perf_counter() - wall
        if watched and not alone and time.thread_time() - own < BUSY * wall:
            self.alone_until = time.monotonic() + max(SECONDS_ALONE, TIMES_ALONE * wall)
