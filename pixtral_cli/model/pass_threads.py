"""How many of torch's threads a piece of work on a CPU uses. Knows no model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pixtral_cli.model.kernels import native

SMALL_PASS = 2**26
"""Multiplications. Below this, threads wait for each other about as long as they save."""
FEW_ROWS = 16
"""A pass of so few rows reads each weight for little work: its threads meet every fraction of a millisecond. Where the
library in C multiplies, it has threads of its own for that, and the little that torch computes between takes one."""
BUSY = 0.7
"""Of the time of work, the part in which its own thread runs. With several threads it is 0.8 to 1 on a quiet machine,
and a half on two cores where another program computes: threads wait for one that does not run. Below this, the
machine is taken to be busy."""
SECONDS_ALONE, TIMES_ALONE = 1.0, 4
"""How long one thread goes on alone after that: seconds, or times what the slow work took, whichever is longer."""
USERS_OWN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch has one thread, unless the user says how many; then as many as before."""
    threads = torch.get_num_threads()
    if threads == 1 or any(name in os.environ for name in USERS_OWN):
        yield
        return
    torch.set_num_threads(1)  # takes a microsecond
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class WatchedThreads:
    """All of torch's threads for work of many short steps; one for little work, and beside busy programs."""

    alone_until: float = 0.0
    """Of `time.monotonic`: then several threads are tried again."""

    @contextmanager
    def chosen(self, multiplications: int) -> Iterator[None]:
        """Within it torch has the threads for so much work; then as many as before."""
        if multiplications < SMALL_PASS or time.monotonic() < self.alone_until:
            with one_thread():
                yield
            return
        wall, own = time.perf_counter(), time.thread_time()
        yield
        wall = time.perf_counter() - wall
        if time.thread_time() - own < BUSY * wall:
            self.alone_until = time.monotonic() + max(SECONDS_ALONE, TIMES_ALONE * wall)


@dataclass
class PassThreads:
    """Chooses pass by pass: one thread for little work, and for few rows where the library multiplies.

    With `exact` the work alone decides, so that equal shapes give equal bits: the last bits of a float32 product
    depend on the number of threads. Who sets OMP_NUM_THREADS gets that number.
    """

    exact: bool = False
    watched: WatchedThreads = field(default_factory=WatchedThreads)

    @contextmanager
    def chosen(self, rows: int, multiplications: int) -> Iterator[None]:
        """Within it torch has the threads for a pass of `rows`, `multiplications` for each; then as many as before."""
        few = rows <= FEW_ROWS
        native.set_threads(torch.get_num_threads())
        if rows * multiplications < SMALL_PASS or (few and native.available()):
            with one_thread():
                yield
        elif few and not self.exact:
            with self.watched.chosen(rows * multiplications):
                yield
        else:
            yield
