"""What blocks in, what it gives out, on a bounded number of threads; knows nothing of what they do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")


class Threads:
    """So many at most. Who waits for one waits in the event loop: when they leave, nothing of theirs is kept."""

    def __init__(self, count: int, name: str) -> None:
        self.busy = 0
        self._free = asyncio.Semaphore(count)
        self._pool = ThreadPoolExecutor(count, name)

    async def run(self, build: Callable[[], Result]) -> Result:
        """`build()`; who is cancelled meanwhile does not wait for it, and its thread is taken until it ends."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        future = self._pool.submit(build)
        self.busy += 1
        future.add_done_callback(lambda _: self._tell_freed(loop))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Take nothing more; what is being done is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _tell_freed(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._freed)

    def _freed(self, *_: Any) -> None:
        self.busy -= 1
        self._free.release()
