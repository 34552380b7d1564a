"""An engine in, its rates out: tokens a second of requests that decode together, seconds to a first token.

Knows no device and no model. Time is that of the wall, from one step to another: an engine that launches a step before
it has read the last one is measured as its users see it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Event, Failure, Request

WARM_STEPS, WARM_SECONDS = 8, 2.0
ROUND_SECONDS, MOST_STEPS = 0.4, 40  # of a round; a step that takes longer is a round by itself
SLOW_STEP = 1.0  # seconds; then two rounds have to do


def text(length: int, vocabulary: int) -> tuple[int, ...]:
    """Random tokens: no two prompts begin alike."""
    return tuple(random.choices(range(20, vocabulary), k=length))


def step(engine: Engine) -> list[Event]:
    """One step's events; a request that failed raises what it failed with."""
    events = engine.step()
    for event in events:
        if isinstance(event, Failure):
            raise event.error
    return events


def run(engine: Engine) -> Iterator[Event]:
    """The events of all that runs and waits, to its end."""
    while engine.busy:
        yield from step(engine)


def decode_rates(engine: Engine, requests: Sequence[Request], rounds: int) -> list[float]:
    """Tokens a second of each round, while all of the requests are being answered; none of them may end."""
    ids = [engine.submit(request) for request in requests]
    try:
        begun: set[int] = set()
        while len(begun) < len(ids):
            begun |= {event.request_id for event in step(engine)}
        seconds = _step_seconds(engine)
        steps = max(1, min(MOST_STEPS, int(ROUND_SECONDS / seconds)))
        return [_rate(engine, steps) for _ in range(rounds if seconds < SLOW_STEP else 2)]
    finally:
        for request_id in ids:
            engine.cancel(request_id)
        while engine.busy:
            engine.step()


def _step_seconds(engine: Engine) -> float:
    """Of the last of a few steps, after which all is warm."""
    begun = time.perf_counter()
    for _ in range(WARM_STEPS):
        before = time.perf_counter()
        step(engine)
        if time.perf_counter() - begun > WARM_SECONDS:
            break
    return time.perf_counter() - before


def _rate(engine: Engine, steps: int) -> float:
    begun, tokens = time.perf_counter(), 0
    for _ in range(steps):
        tokens += len(step(engine))
    return tokens / (time.perf_counter() - begun)


def first_tokens(engine: Engine, make: Callable[[], Request], rounds: int) -> list[float]:
    """Seconds until the token of a request for one token is there, in each round; the first is not counted."""
    found = []
    for _ in range(rounds + 1):
        request = make()
        begun = time.perf_counter()
        engine.submit(request)
        events = list(run(engine))
        found.append(time.perf_counter() - begun)
        assert len(events) == 1, "one token was asked for"
    return found[1:]
