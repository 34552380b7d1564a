"""Log-probabilities of a prompt's tokens are those of one forward pass over all of it, however they are computed."""

import dataclasses

import pytest
import torch
from support import builders
from support.devices import loaded
from support.engines import run
from support.random_requests import words

from pixtral_cli.engine import runner, scheduler
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Failure, Request
from pixtral_cli.errors import BrokenLogits, RequestError
from pixtral_cli.model.kv_cache import PAGE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mistral")


@pytest.fixture(scope="module")
def oracle(folder):
    return builders.mistral(folder, sliding_window=200)


@pytest.fixture(scope="module")
def model(folder, oracle):
    return loaded(folder)


def asked(seed, length, tokens=4, **fields):
    return Request(tuple(words(seed, length)), tokens, **({"prompt_logprobs": 3} | fields))


def scores(events):
    """Of a request's first event: log-probabilities, and the likeliest ids and theirs; no other event has any."""
    assert not any(event.prompt_scores for event in events[1:])
    return [torch.cat(parts) for parts in zip(*events[0].prompt_scores, strict=True)]


def expected(oracle, request):
    with torch.no_grad():
        logprobs = oracle(torch.tensor([request.token_ids])).logits[0, :-1].float().log_softmax(-1)
    best = logprobs.topk(3)
    return [logprobs.gather(-1, torch.tensor(request.token_ids[1:])[:, None])[:, 0], best.indices, best.values]


def assert_as_of(oracle, events, request):
    for got, wanted in zip(scores(events), expected(oracle, request), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def loosely(engine):
    """The engine as for other numbers than float32 on a CPU."""
    engine.scheduler.exact = engine.runner.exact = False
    return engine


MANY = [asked(seed, length) for seed, length in enumerate([2, 16, 17, 65, 256, 257, 300, 513])]


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("batch", [1, 5])
def test_they_are_those_of_transformers(model, oracle, exactly, batch):
    engine = Engine(model, max_batch_size=batch)
    engine = engine if exactly else loosely(engine)
    for request, events in zip(MANY, run(engine, *MANY), strict=True):
        assert_as_of(oracle, events, request)
        assert len(events) == 4


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("chunk", [16, 64, 96])
def test_chunks_of_any_size_give_the_same(model, oracle, monkeypatch, chunk, exactly):
    monkeypatch.setattr(scheduler, "SHORT_CHUNK", chunk)
    monkeypatch.setattr(scheduler, "CHUNK", chunk)
    monkeypatch.setattr(runner, "SCORED", 24)
    engine = Engine(model, max_batch_size=3)
    engine = engine if exactly else loosely(engine)
    for request, events in zip(MANY[3:6], run(engine, *MANY[3:6]), strict=True):
        assert_as_of(oracle, events, request)


def test_in_float32_on_a_cpu_they_have_the_very_bits_that_they_have_alone(model):
    together = run(Engine(model, max_batch_size=8), *MANY)
    for request, events in zip(MANY, together, strict=True):
        (alone,) = run(Engine(model), request)
        assert all(torch.equal(*pair) for pair in zip(scores(alone), scores(events), strict=True))


@pytest.mark.parametrize("exactly", [True, False])
def test_what_is_known_of_a_prompt_hides_none_of_them_and_is_left_for_others(model, oracle, exactly):
    engine = Engine(model, max_batch_size=2)
    engine = engine if exactly else loosely(engine)
    first, again = run(engine, MANY[-1])[0], run(engine, MANY[-1], MANY[-1])
    for events in (first, *again):
        assert_as_of(oracle, events, MANY[-1])
        assert events[0].cached_tokens == 0
    plain = dataclasses.replace(MANY[-1], prompt_logprobs=None)
    assert run(engine, plain)[0][0].cached_tokens == 512


@pytest.mark.parametrize("exactly", [True, False])
def test_a_request_that_has_to_begin_again_tells_each_token_once(model, oracle, monkeypatch, exactly):
    monkeypatch.setattr(scheduler, "SHORT_CHUNK", 32)
    requests = [asked(seed, 40 + 30 * seed, tokens=40) for seed in range(6)]
    engine = Engine(model, max_batch_size=6, kv_tokens=20 * PAGE)
    engine = engine if exactly else loosely(engine)
    for request, events in zip(requests, run(engine, *requests), strict=True):
        assert_as_of(oracle, events, request)
        assert len(events) == 40
    assert engine.scheduler.preemptions > 0 and engine.table.in_use == 0


def test_one_that_loses_its_pages_in_the_middle_of_its_prompt_goes_on_where_it_was(model, oracle, monkeypatch):
    monkeypatch.setattr(scheduler, "SHORT_CHUNK", 32)
    engine = Engine(model)
    request_id, events = engine.submit(MANY[-1]), []
    engine.step()
    engine.step()
    (sequence,) = engine.scheduler.running
    assert sequence.computed == 64
    engine.scheduler._preempt(sequence)
    engine.step()
    assert sequence.computed == 96, "its own pages are still known"
    while engine.busy:
        events += [event for event in engine.step() if event.request_id == request_id]
    assert_as_of(oracle, events, MANY[-1])


def test_an_interrupted_step_can_be_taken_again(model, oracle, monkeypatch):
    def interrupt(logits, token_ids, alternatives):
        raise KeyboardInterrupt

    engine, events = Engine(model), []
    engine.submit(MANY[-1])
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(runner.sampler, "score", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    while engine.busy:
        events += engine.step()
    assert_as_of(oracle, events, MANY[-1])


def test_never_more_logits_are_made_than_a_few_rows_and_none_for_who_did_not_ask(model, monkeypatch):
    rows, logits = [], type(model).logits
    monkeypatch.setattr(type(model), "logits", lambda self, hidden: rows.append(len(hidden)) or logits(self, hidden))
    run(Engine(model), dataclasses.replace(MANY[-1], prompt_logprobs=None, max_new_tokens=1))
    assert rows == [0, 0, 1]
    rows.clear()
    run(loosely(Engine(model)), MANY[-1])
    assert max(rows) == runner.SCORED and sum(rows) >= len(MANY[-1].token_ids)


def test_a_request_for_no_new_tokens_ends_with_its_prompt(model, oracle):
    engine = Engine(model, max_length=300)
    only_prompt = dataclasses.replace(MANY[6], max_new_tokens=0)
    (event,) = run(engine, only_prompt)[0]
    assert event.token_id is None and event.finish_reason == "length"
    assert_as_of(oracle, [event], only_prompt)
    assert engine.table.in_use == 0
    assert (engine.counters.prompt_tokens, engine.counters.generated_tokens) == (300, 0)
    with pytest.raises(RequestError, match="has 300 tokens"):
        engine.check(MANY[6])
    with pytest.raises(RequestError, match="has 513 tokens"):
        engine.check(dataclasses.replace(MANY[7], max_new_tokens=0))
    (silent,) = run(engine, dataclasses.replace(only_prompt, prompt_logprobs=None))[0]
    assert silent.token_id is None and not silent.prompt_scores


def test_cancelling_in_the_middle_of_a_prompt_frees_every_page(model, monkeypatch):
    engine = Engine(model, max_batch_size=2)
    submitted = [engine.submit(request) for request in MANY[-2:]]
    engine.step()
    assert engine.table.in_use > 0
    for request_id in submitted:
        engine.cancel(request_id)
    assert not engine.busy and engine.table.in_use == 0


def test_a_score_that_is_no_number_fails_the_request_that_has_it_and_no_other(model, oracle, monkeypatch):
    score = runner.sampler.score

    def spoilt(logits, token_ids, alternatives):
        return score(torch.full_like(logits, torch.nan) if alternatives == 2 else logits, token_ids, alternatives)

    monkeypatch.setattr(runner.sampler, "score", spoilt)
    engine = Engine(model, max_batch_size=2)
    events, (failed,) = run(engine, MANY[-1], asked(50, 300, prompt_logprobs=2))
    assert_as_of(oracle, events, MANY[-1])
    assert isinstance(failed, Failure) and isinstance(failed.error, BrokenLogits) and engine.table.in_use == 0
