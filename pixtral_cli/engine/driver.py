"""Requests from any thread in, the events of each step into their sinks: the one thread that steps an engine.

Who submits or cancels never waits for a step. Knows no text and no HTTP.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import TypeVar
from weakref import WeakSet, finalize

from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Event, Failure, Request
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.errors import RequestError

Sink = Callable[[list[Event]], None]
"""Takes what a step gives to the requests that were submitted with it, in one call."""
Result = TypeVar("Result")
RAISE_AGAIN = 0.2  # seconds; an exception that is raised within a destructor is lost
logger = logging.getLogger(__name__)


class Driver:
    """Steps `engine`, which nobody else may step, on a thread that begins with the first request.

    While there is none the thread holds neither driver nor engine, and it ends with them. Sinks are called on that
    thread, so they should only pass events on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: Inbox = SimpleQueue()
        """Changes to make between two steps, and whose engine they change; None for the end."""
        self._sinks: dict[int, Sink] = {}
        self._thread: threading.Thread | None = None
        self._step_lock = threading.Lock()  # held during a step, and while the process forks
        self._lock = threading.Lock()  # of `_thread`; never held during a step
        finalize(self, self._inbox.put, (None, _leave)).atexit = False
        _drivers.add(self)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self.engine.waiting + self._inbox.qsize()

    def submit(self, request: Request, sink: Sink) -> int:
        """Queue a request -> its id. Raises RequestError as `Engine.check`.

        Requests may have one sink in common: it is called once for each step.
        """
        sequence = self.engine.prepare(request)
        with self._lock:
            self._inbox.put((self, partial(self._begin, sequence, sink)))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=_run, args=(self._inbox,), name="engine", daemon=True)
                _threads.add(self._thread)
                self._thread.start()
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """Drop a request before the next step; no event comes after those of the step under way."""
        if self._thread is not None:  # no lock: the garbage collector may call this anywhere, by closing a generator
            self._inbox.put((self, partial(self._drop, request_id)))

    def stop(self, timeout: float | None = None) -> bool:
        """End what runs and waits, even in the middle of a step -> whether the thread ended in `timeout` seconds.

        The sinks are told by a RequestError. A request that comes later starts another thread.
        """
        thread, until = self._thread, time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        if thread is None:
            return True
        self._inbox.put((self, _leave))
        while thread.is_alive() and time.monotonic() < until:
            if self._step_lock.locked():  # a step of a large model takes many seconds
                _end(thread)
            thread.join(min(RAISE_AGAIN, until - time.monotonic()))
        return not thread.is_alive()

    def work(self, change: Callable[[], None]) -> None:
        """Make the change, then step until nothing runs or waits; changes that come meanwhile go before each step."""
        try:
            change()
            while self.engine.busy or not self._inbox.empty():
                if self._inbox.empty():
                    self._step()
                else:
                    _, change = self._inbox.get_nowait()
                    change()
        except SystemExit:
            self._abandon(RequestError("The engine was stopped before the answer ended."))
            raise

    def _step(self) -> None:
        """A step that fails as a whole is a bug: who is there learns of it, and who comes next is answered."""
        try:
            with self._step_lock:
                events = self.engine.step()
        except Exception as error:  # noqa: BLE001  whatever it is, those who wait are told
            events = [Failure(request_id, error) for request_id in self._sinks]
        self._deliver(events)

    def _begin(self, sequence: Sequence, sink: Sink) -> None:
        self._sinks[sequence.id] = sink
        self.engine.scheduler.add(sequence)

    def _drop(self, request_id: int) -> None:
        self._sinks.pop(request_id, None)
        self.engine.cancel(request_id)

    def _deliver(self, events: Iterable[Event]) -> None:
        for sink, share in self._shares(events).items():
            try:
                sink(share)
            except Exception:
                logger.exception("Events could not be passed on.")
                for event in share:
                    self._drop(event.request_id)

    def _shares(self, events: Iterable[Event]) -> dict[Sink, list[Event]]:
        """What each sink gets; there is none for a request that was cancelled while a card computed its token."""
        shares: dict[Sink, list[Event]] = {}
        for event in events:
            if (sink := self._sinks.get(event.request_id)) is not None:
                shares.setdefault(sink, []).append(event)
            if isinstance(event, Failure) or event.finish_reason is not None:
                self._drop(event.request_id)
        return shares

    def _abandon(self, error: Exception) -> None:
        """The thread has ended, and with it all that was under way."""
        with self._lock:
            self._thread = None
            while not self._inbox.empty():
                _, change = self._inbox.get_nowait()
                if change is not _leave:
                    change()
            self._deliver([Failure(request_id, error) for request_id in self._sinks])

    def pause(self) -> None:
        """Before a fork: wait for the step under way. In the child oneDNN would wait for what it was computing."""
        self._step_lock.acquire()

    def resume(self) -> None:
        """In the parent of a fork."""
        self._step_lock.release()

    def forget_thread(self) -> None:
        """In the child of a fork. The thread, and whoever held the locks, are the parent's."""
        self._lock, self._step_lock = threading.Lock(), threading.Lock()
        self._abandon(RequestError("The process was forked before the answer ended."))


Inbox = SimpleQueue[tuple[Driver | None, Callable[[], None]]]


def _run(inbox: Inbox) -> None:
    """The thread of a driver, until the driver is gone or stopped. While it waits it holds no driver."""
    with suppress(SystemExit):  # of `stop`
        while True:
            driver, change = inbox.get()
            if driver is None:
                return
            driver.work(change)
            del driver, change


def _leave() -> None:
    raise SystemExit


def _end(thread: threading.Thread) -> None:
    """Raise SystemExit in the thread, as soon as the tensor operation under way has ended."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


def on_a_thread_that_ends(work: Callable[[], Result]) -> Result:
    """What `work` gives or raises, for work with tensors before a driver's.

    libgomp keeps threads for every thread that has computed and lives. With more of them than cores it waits in the
    kernel, which costs a quarter of decoding.
    """
    outcome: list[Result | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001  raised again below
            outcome.append(error)

    thread = threading.Thread(target=run, name="loading", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:  # Ctrl-C
        while thread.is_alive():
            _end(thread)
            thread.join(RAISE_AGAIN)
        raise
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


_drivers: WeakSet[Driver] = WeakSet()
_threads: WeakSet[threading.Thread] = WeakSet()
"""Of all drivers: one may be freeing the tensors of a model whose driver is gone already."""
_paused: list[Driver] = []


def _stop_all() -> None:
    """Before the interpreter closes: a thread that came back from torch into a closed one would abort the process."""
    for driver in list(_drivers):
        driver.stop()
    for thread in list(_threads):
        thread.join()


def _before_fork() -> None:
    for driver in list(_drivers):
        driver.pause()
        _paused.append(driver)


def _after_fork(do: Callable[[Driver], None]) -> None:
    while _paused:
        do(_paused.pop())


atexit.register(_stop_all)
os.register_at_fork(
    before=_before_fork,
    after_in_parent=partial(_after_fork, Driver.resume),
    after_in_child=partial(_after_fork, Driver.forget_thread),
)
