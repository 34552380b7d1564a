"""Engines run to their end, for the tests of what they answer."""

import time

from pixtral_cli.engine import sampler
from support.processes import PATIENCE


def run(engine, *requests):
    """All events of the requests, each list in the order of its request."""
    events = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            events[event.request_id].append(event)
    return list(events.values())


def tokens(events):
    return [event.token_id for event in events]


def choose(logits, sampling, prompt, answer, random, constraint=None):
    """The next token for logits [V] of one sequence by itself."""
    row = sampler.Row(sampling, [*prompt, *answer], len(prompt), random, constraint)
    return sampler.choose(logits[None], [row])[0]


def wait_until(holds):
    """Return once `holds()`; an engine's own thread may take its time."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)
