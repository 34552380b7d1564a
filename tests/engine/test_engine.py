"""The engine's promises: together as alone, in chunks as whole, later as again from the start."""

import hashlib

import pytest
import torch
from support import builders
from support.devices import loaded
from support.engines import run, tokens

from pixtral_cli.engine import scheduler
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import ImageInput, Request, Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixtral")
    builders.pixtral(folder, sliding_window=24)
    return loaded(folder)


def request(seed, length=30, tokens=16, grid=None, **fields):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(14, 320, (length,), generator=random).tolist()
    pictures = ()
    if grid is not None:
        rows, columns = grid
        ids[2:2] = ([10] * columns + [12]) * rows
        pixels = torch.randn(3, rows * 16, columns * 16, generator=random)
        pictures = (ImageInput(hashlib.sha256(pixels.numpy().tobytes()).digest(), rows * columns, lambda: pixels),)
    return Request(tuple(ids), tokens, images=pictures, **fields)


MIXED = [
    request(1),
    request(2, length=3, grid=(4, 5)),
    request(3, length=70, tokens=5),
    request(4, grid=(1, 1), sampling=Sampling(temperature=0.8, top_k=0, seed=7)),
    request(5, length=1, sampling=Sampling(repetition_penalty=1.3)),
]


@pytest.mark.parametrize("batch", [2, 5])
def test_requests_together_get_the_tokens_they_get_alone(model, batch):
    alone = [tokens(run(Engine(model), r)[0]) for r in MIXED]
    assert [tokens(events) for events in run(Engine(model, max_batch_size=batch), *MIXED)] == alone
    assert len({tuple(t) for t in alone}) == len(MIXED)


def test_a_request_may_join_while_others_decode(model):
    first, late = request(1, tokens=20), request(2, grid=(4, 5))
    engine = Engine(model, max_batch_size=2)
    ids = [engine.submit(first)]
    events = [event for _ in range(6) for event in engine.step()]
    ids.append(engine.submit(late))
    while engine.busy:
        events += engine.step()
    for request_id, alone in zip(ids, (first, late), strict=True):
        mine = [event.token_id for event in events if event.request_id == request_id]
        assert mine == tokens(run(Engine(model), alone)[0])


@pytest.mark.parametrize("chunk", [16, 32, 48])
def test_a_prompt_computed_in_chunks_equals_one_computed_whole(model, monkeypatch, chunk):
    long = request(6, length=40, grid=(4, 5), logprobs=3)
    whole = run(Engine(model), long)[0]
    monkeypatch.setattr(scheduler, "SHORT_CHUNK", chunk)
    pieces = run(Engine(model), long)[0]
    assert tokens(pieces) == tokens(whole)
    assert [e.logprob for e in pieces] == pytest.approx([e.logprob for e in whole], abs=1e-4)


def test_others_keep_decoding_while_a_long_prompt_is_computed(model, monkeypatch):
    monkeypatch.setattr(scheduler, "SHORT_CHUNK", 16)
    engine = Engine(model, max_batch_size=2)
    short = engine.submit(request(1, length=4, tokens=20))
    engine.step()
    engine.submit(request(2, length=80))
    for _ in range(4):
        assert [event.request_id for event in engine.step()] == [short]


def test_a_decoded_token_equals_the_one_after_a_fresh_prefill(model):
    first = request(7, grid=(3, 3), tokens=12)
    events = tokens(run(Engine(model), first)[0])
    for done in (1, 5, 11):
        again = Request((*first.token_ids, *events[:done]), 1, images=first.images)
        assert tokens(run(Engine(model), again)[0]) == [events[done]]


def test_cancelling_frees_the_place_for_who_waits(model):
    engine = Engine(model)
    first, second = engine.submit(request(1, tokens=1000)), engine.submit(request(2, tokens=3))
    engine.step()
    engine.cancel(first)
    assert [event.request_id for event in engine.step()] == [second]
    engine.cancel(second)
    engine.cancel(second)
    assert not engine.busy and engine.step() == []


def test_an_end_token_stops_and_a_limit_cuts(model):
    plain = tokens(run(Engine(model), request(1))[0])
    end = plain[4]
    stopped = run(Engine(model), request(1, end_token_ids=frozenset({end})))[0]
    assert tokens(stopped) == plain[: plain.index(end) + 1]
    assert [event.finish_reason for event in stopped][-1] == "stop"
    cut = run(Engine(model), request(1, tokens=3))[0]
    assert [event.finish_reason for event in cut] == [None, None, "length"]


def test_no_more_requests_prefill_at_once_than_asked(model):
    engine = Engine(model, max_batch_size=4, max_ce_batch_size=1)
    for seed in range(4):
        engine.submit(request(seed, length=3))
    assert [len(engine.step()) for _ in range(4)] == [1, 2, 3, 4]


def test_an_interrupted_step_can_be_taken_again(model, monkeypatch):
    """Ctrl-C in the middle of a step: only whole steps count."""
    expected = tokens(run(Engine(model), request(1))[0])
    engine = Engine(model)
    engine.submit(request(1))
    got = [engine.step()[0].token_id]
    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    while engine.busy:
        got += tokens(engine.step())
    assert got == expected


def interrupt(x):
    raise KeyboardInterrupt


def test_log_probabilities_are_those_of_the_unfiltered_distribution(model):
    events = run(Engine(model), request(1, logprobs=320, sampling=Sampling(temperature=5.0, top_k=0, seed=1)))[0]
    for event in events:
        spread = dict(event.alternatives)
        assert sum(torch.tensor(list(spread.values())).exp()) == pytest.approx(1, abs=1e-4)
        assert event.logprob == spread[event.token_id]
        assert list(spread.values()) == sorted(spread.values(), reverse=True)
    assert any(event.token_id != event.alternatives[0][0] for event in events)
