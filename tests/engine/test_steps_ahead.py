"""Steps that are launched before the last one is read, as on a GPU: nothing that anybody sees changes.

A runner for the CPU stands in for the GPU's: tokens that the engine has not read are known to it alone.
"""

from dataclasses import replace

import pytest
from support import builders
from support.devices import loaded
from support.engines import run, tokens
from support.random_requests import words

from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Failure, ImageInput, Request, Sampling
from pixtral_cli.engine.runner import Runner
from pixtral_cli.engine.sequence import UNREAD
from pixtral_cli.model.kv_cache import PAGE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixtral")
    builders.pixtral(folder, sliding_window=24)
    return loaded(folder)


class RunsAhead(Runner):
    """Knows the last token of each seat, as a card does."""

    steps_ahead = 1

    def keep(self, sequences, token_ids=None):
        self.last = getattr(self, "last", {})
        known = [sequence.token_ids[-1] for sequence in sequences] if token_ids is None else token_ids.tolist()
        self.last.update(zip((sequence.seat for sequence in sequences), known, strict=True))

    def run(self, chunks):
        unread = [chunk.sequence for chunk in chunks if chunk.sequence.unread]
        for sequence in unread:
            assert sequence.unread == 1 and sequence.token_ids[-1] == UNREAD
            sequence.token_ids[-1] = self.last[sequence.seat]
        try:
            return super().run(chunks)
        finally:
            for sequence in unread:
                sequence.token_ids[-1] = UNREAD


def ahead(model, **settings):
    engine = Engine(model, **settings)
    plain = engine.runner
    engine.runner = RunsAhead(model, plain.kv_cache, engine.features, plain.exact)
    return engine


def request(seed, length=30, max_new_tokens=16, **fields):
    return Request(tuple(words(seed, length)), max_new_tokens, **fields)


MIXED = [
    request(1),
    request(2, length=3, logprobs=2),
    request(3, length=70, max_new_tokens=5),
    request(4, sampling=Sampling(temperature=0.8, top_k=0, seed=7)),
    request(5, length=1, sampling=Sampling(repetition_penalty=1.3)),
    request(6, max_new_tokens=0, prompt_logprobs=1),
    request(7, max_new_tokens=1),
    request(8, length=PAGE, max_new_tokens=2 * PAGE, sampling=Sampling(logit_bias={20: 3.0})),
]


def told(events):
    return [replace(event, request_id=0, prompt_scores=()) for event in events]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_events_are_those_of_an_engine_that_reads_every_step(model, batch):
    expected = [told(events) for events in run(Engine(model, max_batch_size=batch), *MIXED)]
    engine = ahead(model, max_batch_size=batch)
    assert [told(events) for events in run(engine, *MIXED)] == expected
    assert engine.table.in_use == 0 and not engine.busy


def test_a_step_is_launched_before_the_last_is_read(model):
    engine = ahead(model)
    engine.submit(request(1, max_new_tokens=3))
    assert [len(engine.step()) for _ in range(4)] == [0, 1, 1, 1]
    assert not engine.busy


def test_what_was_computed_after_the_end_is_never_told(model):
    plain = tokens(run(Engine(model), request(1))[0])
    end = plain[4]
    engine = ahead(model, max_batch_size=2)
    first, second = run(engine, request(1, end_token_ids=frozenset({end})), request(3))
    assert tokens(first) == plain[: plain.index(end) + 1] and first[-1].finish_reason == "stop"
    assert tokens(second) == tokens(run(Engine(model), request(3))[0])
    assert engine.table.in_use == 0 and engine.counters.generated_tokens == len(first) + len(second)


def test_a_sequence_that_gives_way_takes_its_unread_token_along(model):
    requests = [request(number, length=2 * PAGE - 1, max_new_tokens=2 * PAGE) for number in range(3)]
    expected = [tokens(run(Engine(model), each)[0]) for each in requests]
    engine = ahead(model, max_batch_size=3, max_length=4 * PAGE, kv_tokens=7 * PAGE)
    assert [tokens(events) for events in run(engine, *requests)] == expected
    assert engine.scheduler.preemptions > 0 and engine.table.in_use == 0


def test_pages_of_an_answer_are_known_to_who_asks_again_as_without(model):
    cached = []
    for engine in (Engine(model), ahead(model)):
        engine.scheduler.exact = False
        first = request(1, length=PAGE - 4, max_new_tokens=2 * PAGE + 4)
        answer = tokens(run(engine, first)[0])
        again = Request((*first.token_ids, *answer, 20), 1)
        cached.append(run(engine, again)[0][0].cached_tokens)
    assert cached[0] == cached[1] == 2 * PAGE


def test_one_that_is_cancelled_is_heard_of_no_more_and_others_go_on(model):
    engine = ahead(model, max_batch_size=2)
    ids = [engine.submit(request(1)), engine.submit(request(3))]
    events = [event for _ in range(3) for event in engine.step()]
    engine.cancel(ids[0])
    later = []
    while engine.busy:
        later += engine.step()
    assert {event.request_id for event in later} == {ids[1]}
    assert tokens(e for e in [*events, *later] if e.request_id == ids[1]) == tokens(run(Engine(model), request(3))[0])


def test_one_that_fails_is_told_after_its_tokens_and_others_go_on(model):
    def broken():
        raise OSError("no picture")

    failing = replace(request(2, length=4), token_ids=(20, 10, 12, 20), images=(ImageInput(b"x", 1, broken),))
    engine = ahead(model, max_batch_size=2)
    good, bad = run(engine, request(1), failing)
    assert tokens(good) == tokens(run(Engine(model), request(1))[0])
    assert len(bad) == 1 and isinstance(bad[0], Failure) and engine.table.in_use == 0
