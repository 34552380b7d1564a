"""The engine's events in, text events out, on the event loop: the answers of one ask. Knows no JSON and no queue."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Sequence, Set
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pixtral_cli.engine.driver import Driver
from pixtral_cli.generation import Failure, Request, TextEvent, TextStream
from pixtral_cli.server.metrics import Metrics
from pixtral_cli.server.problems import leaving

Result = TypeVar("Result")
Events = list[tuple[int, TextEvent]]
"""What came together: the answer's place, and what its next token adds."""


class Arrival(NamedTuple):
    """An event of the engine for the answer `place`, and when it came (of `time.perf_counter`)."""

    answers: Answers
    place: int
    event: Any
    at: float


class Handover:
    """Events from the engine's thread to the event loop: one call into the loop for all that a step gives."""

    def __init__(self) -> None:
        self._arrived: deque[Arrival] = deque()
        self._called = False

    def put(self, answers: Answers, place: int, event: Any) -> None:
        """A sink, on the engine's thread."""
        self._arrived.append(Arrival(answers, place, event, time.perf_counter()))
        if not self._called:
            self._called = True
            answers.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before the deque is emptied: who puts after this calls again
        while self._arrived:
            arrival = self._arrived.popleft()
            arrival.answers.receive(arrival)


class Answers:
    """One ask's answers on their way."""

    def __init__(self, driver: Driver, metrics: Metrics) -> None:
        self.driver, self.metrics = driver, metrics
        self.loop = asyncio.get_running_loop()
        self.running: dict[int, int] = {}
        """Places of the answers that have not ended, and the engine's ids."""
        self._answerings: list[TextStream] = []
        self._begun = time.perf_counter()
        self._latest: dict[int, float] = {}  # when each answer's last token came
        self._arrived: list[Arrival] = []
        self._wake = asyncio.Event()
        self._sent_away = False
        self._making: asyncio.Future[Any] | None = None

    async def unless_sent_away(self, making: Awaitable[Result]) -> Result:
        """What `making` gives, without which nothing can be queued. Raises ApiError if the server ends before."""
        self._making = asyncio.ensure_future(making)
        try:
            return await self._making
        except asyncio.CancelledError:
            if self._sent_away:
                raise leaving() from None
            raise

    def submit(self, jobs: Sequence[tuple[Request, TextStream]], handover: Handover) -> None:
        """Queue them all; their pictures are not kept here."""
        self._making = None
        self._answerings = [answering for _, answering in jobs]
        for place, (request, _) in enumerate(jobs):
            self.running[place] = self.driver.submit(request, partial(handover.put, self, place))

    def send_away_unless(self, begun: Set[int]) -> None:
        """Let them fail, unless the engine has begun one of them."""
        if not self._latest and not self._arrived and begun.isdisjoint(self.running.values()):
            self._sent_away = True
            self._wake.set()
            if self._making is not None:
                self._making.cancel()

    def receive(self, arrival: Arrival) -> None:
        self._arrived.append(arrival)
        self._wake.set()

    async def next(self) -> Events:
        """What has come since, at least one event. Raises ApiError, and what the engine failed with."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._sent_away:
                raise leaving()
            arrived, self._arrived = self._arrived, []
            events = [(arrival.place, self._told(arrival)) for arrival in arrived if arrival.place in self.running]
            if events:
                return events

    def cancel(self) -> None:
        """What still runs ends with the engine's step."""
        for request_id in self.running.values():
            self.driver.cancel(request_id)
        self.running.clear()

    def _told(self, arrival: Arrival) -> TextEvent:
        place, event = arrival.place, arrival.event
        if isinstance(event, Failure):
            raise event.error
        self._measure(place, arrival.at)
        told = self._answerings[place].push(event)
        if told.finish_reason:
            self.driver.cancel(self.running.pop(place))  # a stop string ends it before the engine would
        return told

    def _measure(self, place: int, now: float) -> None:
        before = self._latest.get(place)
        if before is None:
            self.metrics.first_token(now - self._begun)
        else:
            self.metrics.next_token(now - before)
        self._latest[place] = now
