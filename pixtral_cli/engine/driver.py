"""Requests from any thread in, the events of each into its sink: the one thread that steps an engine.

Who submits or cancels never waits for a step. Knows no text and no HTTP.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from weakref import WeakSet

from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Event, Failure, Request
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.errors import RequestError

Sink = Callable[[Event], None]
RAISE_AGAIN = 0.2  # seconds
logger = logging.getLogger(__name__)


class Driver:
    """Steps `engine`, which nobody else may step, for as long as a request runs or waits.

    The thread begins with a request and ends when there is none: an idle driver keeps neither the process nor its
    engine alive, and a fork has nothing to lose. Sinks are called on that thread, so they should only pass events on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: deque[Callable[[], None]] = deque()
        self._sinks: dict[int, Sink] = {}
        self._thread: threading.Thread | None = None
        self._running = False
        self._lock = threading.RLock()  # of `_running`; the collector may close a generator, which cancels, within it
        _drivers.add(self)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self.engine.waiting + len(self._inbox)

    def submit(self, request: Request, sink: Sink) -> int:
        """Queue a request -> its id. Raises RequestError as `Engine.check`."""
        sequence = self.engine.prepare(request)
        with self._lock:
            self._inbox.append(partial(self._begin, sequence, sink))
            if not self._running:
                self._running = True
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """Drop a request before the next step; no event comes after those of the step under way."""
        with self._lock:
            if self._running:
                self._inbox.append(partial(self._drop, request_id))

    def stop(self, timeout: float | None = None) -> bool:
        """End what runs and waits, even in the middle of a step -> whether the thread ended in `timeout` seconds.

        The sinks are told by a RequestError. A request that comes later begins afresh.
        """
        thread, until = self._thread, time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        while thread is not None and thread.is_alive() and time.monotonic() < until:
            with self._lock:
                if self._running:
                    _raise_in(thread, SystemExit)
            thread.join(min(RAISE_AGAIN, until - time.monotonic()))  # what a destructor was doing swallows it
        return thread is None or not thread.is_alive()

    def _run(self) -> None:
        try:
            while self._has_work():
                self._step()
        except SystemExit:  # of `stop`
            self._abandon(RequestError("The engine was stopped before the answer ended."))

    def _has_work(self) -> bool:
        """Take in what came meanwhile. Without anything to do, the next request starts another thread."""
        self._empty_inbox()
        while not self.engine.busy:
            with self._lock:
                if not self._inbox:
                    self._running = False
                    return False
            self._empty_inbox()
        return True

    def _step(self) -> None:
        """A step that fails as a whole is a bug: who is there learns of it, and who comes next is answered."""
        try:
            for event in self.engine.step():
                self._deliver(event)
        except Exception as error:
            self._end_all(error)

    def _empty_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _begin(self, sequence: Sequence, sink: Sink) -> None:
        self._sinks[sequence.id] = sink
        self.engine.scheduler.add(sequence)

    def _drop(self, request_id: int) -> None:
        self._sinks.pop(request_id, None)
        self.engine.cancel(request_id)

    def _deliver(self, event: Event) -> None:
        ended = isinstance(event, Failure) or event.finish_reason is not None
        sink = self._sinks.pop(event.request_id) if ended else self._sinks[event.request_id]
        try:
            sink(event)
        except Exception:
            logger.exception("An event could not be passed on.")
            self._drop(event.request_id)

    def _end_all(self, error: Exception) -> None:
        for request_id in list(self._sinks):
            self.engine.cancel(request_id)
            self._deliver(Failure(request_id, error))

    def _abandon(self, error: Exception) -> None:
        """End everything: whoever calls this is the last of the thread, or has lost it."""
        with self._lock:
            if self._running:
                self._empty_inbox()
                self._end_all(error)
                self._running = False

    def _after_fork(self) -> None:
        """The thread, and whoever held the lock, are the parent's."""
        self._lock = threading.RLock()
        self._abandon(RequestError("The process was forked before the answer ended.", hint="Ask in one of them only."))


def _raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise between two of the thread's next bytecodes: when the tensor operation under way has ended."""
    assert thread.ident is not None, "the thread was never started"
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error))


_drivers: WeakSet[Driver] = WeakSet()


def _stop_all() -> None:
    """Before the interpreter closes: a thread that came back from torch into a closed one would abort the process."""
    for driver in list(_drivers):
        driver.stop()


def _after_fork_in_child() -> None:
    for driver in list(_drivers):
        driver._after_fork()


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
