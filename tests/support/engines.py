"""Engines run to their end, for the tests of what they answer."""

from pixtral_cli.engine import sampler


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
    """The next token for logits [V] of one sequence by itself; raises what keeps it from being chosen."""
    row = sampler.Row(sampling, [*prompt, *answer], len(prompt), random, constraint)
    (choice,) = sampler.sample(logits[None], [row]).read()
    if isinstance(choice, Exception):
        raise choice
    return choice.token_id
