"""Work that blocks, on a bounded number of threads, and a bound on what such threads hold together, as of pixels."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from threading import Condition, Thread, current_thread
from typing import Any, TypeVar

Result = TypeVar("Result")


class Abandoned(Exception):
    """Nobody waits any longer for what this thread does."""


def raise_if_abandoned() -> None:
    """Raise Abandoned if nobody waits any longer for what this thread does. Call it before each long step."""
    if getattr(current_thread(), "abandoned", False):
        raise Abandoned


class _Worker(Thread):
    abandoned = False


class Threads:
    """Runs work on at most `count` threads at a time, each of which ends with its work. Callers wait in the event loop.

    A thread that has run torch keeps OpenMP's threads for as long as it lives. With those of the engine they would be
    more than there are cores, and OpenMP then waits in the kernel at every turn: a quarter fewer tokens a second.
    """

    def __init__(self, count: int, name: str) -> None:
        self.busy = 0
        self.name = name
        self._free = asyncio.Semaphore(count)

    async def run(self, build: Callable[[], Result]) -> Result:
        """What `build()` gives.

        A caller that is cancelled does not wait for it, but the thread is taken until it ends: `raise_if_abandoned`
        makes that soon.
        """
        await self._free.acquire()
        loop, future = asyncio.get_running_loop(), Future[Result]()
        future.set_running_or_notify_cancel()  # from now on only the thread can end it
        self.busy += 1
        future.add_done_callback(lambda _: self._tell_freed(loop))
        thread = _Worker(target=_into, args=(future, build), name=self.name, daemon=True)
        thread.start()
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            thread.abandoned = True
            raise

    def _tell_freed(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._freed)

    def _freed(self, *_: Any) -> None:
        self.busy -= 1
        self._free.release()


def _into(future: Future[Result], build: Callable[[], Result]) -> None:
    try:
        result = build()
    except BaseException as error:  # noqa: BLE001  for the caller
        future.set_exception(error)
    else:
        future.set_result(result)


class WeightedSemaphore:
    """Threads hold at most `size` together. First come, first served; an amount above `size` is held alone."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._waiting: deque[object] = deque()
        self._changed = Condition()

    @contextmanager
    def held(self, amount: int, seconds: float) -> Iterator[None]:
        """Wait for `amount`, and hold it. Raises TimeoutError after `seconds`."""
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
