"""A limit on what threads hold at one time, such as pixels in memory; knows nothing of what it is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Room:
    """Threads hold at most `size` together. First come, first served; an amount above `size` is held alone."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def held(self, amount: int, seconds: float) -> Iterator[None]:
        """Wait for `amount` of the room, and hold it. Raises TimeoutError after `seconds`."""
        amount = min(amount, self.size)
        self._take(amount, seconds)
        try:
            yield
        finally:
            with self._changed:
                self.free += amount
                self._changed.notify_all()

    def _take(self, amount: int, seconds: float) -> None:
        place = object()
        with self._changed:
            self._waiting.append(place)
            try:
                if not self._changed.wait_for(lambda: self._waiting[0] is place and self.free >= amount, seconds):
                    raise TimeoutError
                self.free -= amount
            finally:
                self._waiting.remove(place)
                self._changed.notify_all()
