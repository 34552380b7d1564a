"""Engines run to their end, for the tests of what they answer."""


def run(engine, *requests):
    """All events of the requests, each list in the order of its request."""
    events = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            events[event.request_id].append(event)
    return list(events.values())


def tokens(events):
    return [event.token_id for event in events]
