"""What requests share (pages, pictures, steps) changes how much is computed and never what comes out."""

import dataclasses

import pytest
from support import builders
from support.devices import loaded
from support.engines import run, tokens
from support.random_requests import asked, picture, words

from pixtral_cli.engine import scheduler
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Failure, ImageInput, Request, Sampling
from pixtral_cli.errors import BrokenLogits
from pixtral_cli.model.kv_cache import PAGE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixtral")
    builders.pixtral(folder, sliding_window=200)
    return loaded(folder)


def loosely(engine):
    """The engine as for other numbers than float32 on a CPU: everything that is known is shared."""
    engine.scheduler.exact = engine.runner.exact = False
    return engine


CONTEXT = [words(1, 40), picture(2), words(3, 25)]


def test_a_second_question_computes_only_what_is_new(model):
    first, second = asked(*CONTEXT, words(4, 9)), asked(*CONTEXT, words(5, 30))
    alone = tokens(run(loosely(Engine(model)), second)[0])
    engine = loosely(Engine(model))
    run(engine, first)
    events = run(engine, second)[0]
    shared = len(first.token_ids) - 9
    assert tokens(events) == alone
    assert events[0].cached_tokens == shared // PAGE * PAGE


def test_the_next_turn_reuses_the_answer_too(model):
    engine = loosely(Engine(model))
    first = asked(*CONTEXT, tokens=40)
    answer = tokens(run(engine, first)[0])
    second = Request((*first.token_ids, *answer, *words(6, 8)), 12, images=first.images)
    events = run(engine, second)[0]
    assert events[0].cached_tokens >= len(first.token_ids) + 39 - PAGE
    assert tokens(events) == tokens(run(loosely(Engine(model)), second)[0])


def test_the_very_same_prompt_leaves_one_page_to_compute(model):
    engine = loosely(Engine(model))
    request = asked(words(7, 4 * PAGE))
    first, second = (run(engine, request)[0] for _ in range(2))
    assert tokens(first) == tokens(second) and second[0].cached_tokens == 3 * PAGE


def test_another_picture_or_another_salt_shares_nothing_of_it(model):
    engine = loosely(Engine(model))
    run(engine, asked(*CONTEXT))
    other = asked(CONTEXT[0], picture(9), CONTEXT[2])
    events = run(engine, other)[0]
    assert events[0].cached_tokens == 32  # the whole pages of words before it
    assert tokens(events) == tokens(run(loosely(Engine(model)), other)[0])
    assert run(engine, asked(*CONTEXT, cache_salt=b"another's"))[0][0].cached_tokens == 0


def test_a_picture_is_encoded_once_however_often_it_is_shown(model, monkeypatch):
    made, encode = [], model.encode_images
    monkeypatch.setattr(
        type(model), "encode_images", lambda self, images: made.extend([1] * len(images)) or encode(images)
    )
    engine = Engine(model)
    for seed in range(3):
        run(engine, asked(words(seed, 20), picture(2), words(seed, 5)))
    assert len(made) == 1
    run(engine, asked(words(1, 20), picture(2), cache_salt=b"another's"))
    assert len(made) == 2


def test_pictures_features_stay_within_their_limit(model):
    one = 4 * 5 * model.config.text.hidden_size * 4
    engine = Engine(model, image_cache=3 * one)
    for seed in range(6):
        run(engine, asked(words(seed, 20), picture(seed)))
        assert engine.features.nbytes <= 3 * one


def test_prompts_that_begin_alike_and_come_together_are_computed_once(model):
    engine = loosely(Engine(model, max_batch_size=4))
    prompts = [asked(words(1, 6 * PAGE), words(seed, 5), tokens=4) for seed in range(4)]
    alone = [tokens(run(loosely(Engine(model)), prompt)[0]) for prompt in prompts]
    events = run(engine, *prompts)
    assert [tokens(each) for each in events] == alone
    assert [each[0].cached_tokens for each in events] == [0, *[6 * PAGE] * 3]


MANY = [
    asked(words(seed, 20 + 37 * seed), *([picture(seed)] if seed % 2 else []), words(seed, 3), tokens=30 + seed)
    for seed in range(7)
]


@pytest.mark.parametrize("pages", [28, 40])
def test_with_too_little_memory_requests_wait_and_begin_again_and_none_fails(model, pages):
    alone = [tokens(run(Engine(model), request)[0]) for request in MANY]
    engine = Engine(model, max_batch_size=7, kv_tokens=pages * PAGE)
    assert [tokens(events) for events in run(engine, *MANY)] == alone
    assert engine.scheduler.preemptions > 0
    assert engine.table.in_use == 0 and engine.table.available == pages


@pytest.mark.parametrize("pages", [28, 40])
def test_what_begins_again_has_the_very_bits_it_has_alone(model, pages, monkeypatch):
    many = [dataclasses.replace(request, logprobs=3) for request in MANY]
    alone = [details(run(Engine(model), request)[0]) for request in many]
    engine = Engine(model, max_batch_size=7, kv_tokens=pages * PAGE)
    assert [details(events) for events in run(engine, *many)] == alone
    assert engine.scheduler.preemptions > 0


def test_a_request_that_fills_the_whole_memory_ends_for_its_length(model):
    engine = Engine(model, kv_tokens=4 * PAGE)
    events = run(engine, asked(words(1, 30), tokens=None))[0]
    assert events[-1].finish_reason == "length" and len(events) == 4 * PAGE - 30


def details(events):
    return [(event.token_id, event.logprob, event.alternatives) for event in events]


def test_in_float32_on_a_cpu_an_answer_has_the_very_bits_it_has_alone(model, monkeypatch):
    monkeypatch.setattr(scheduler, "SHORT_CHUNK", 64)
    requests = [Request(r.token_ids, r.max_new_tokens, r.images, logprobs=5) for r in MANY]
    alone = [details(run(Engine(model), request)[0]) for request in requests]
    engine = Engine(model, max_batch_size=5)
    assert [details(events) for events in run(engine, *requests)] == alone
    events = run(engine, *reversed(requests))  # now much of it is known
    assert [details(each) for each in reversed(events)] == alone
    assert any(each[0].cached_tokens for each in events)


def test_a_request_that_fails_leaves_the_others_as_they_are(model, monkeypatch):
    def broken():
        raise MemoryError

    alone = [tokens(run(Engine(model), request)[0]) for request in MANY[:3]]
    ids, good = picture(50)
    bad = asked(words(50, 5), (ids, ImageInput(b"bad", good.features, broken)))
    engine = Engine(model, max_batch_size=4)
    *others, failed = run(engine, *MANY[:3], bad)
    assert [tokens(events) for events in others] == alone
    assert len(failed) == 1 and isinstance(failed[0], Failure) and isinstance(failed[0].error, MemoryError)
    assert engine.table.in_use == 0 and tokens(run(engine, MANY[0])[0]) == alone[0]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=0, seed=1)])
def test_scores_that_are_no_numbers_fail_the_request_that_has_them_and_no_other(model, score, sampling):
    alone = tokens(run(Engine(model), MANY[0])[0])
    engine = Engine(model, max_batch_size=2)
    compute = engine.runner.run

    def spoilt(pieces):
        logits, scores = compute(pieces)
        logits = logits.clone()
        ready = [piece.sequence.request for piece in pieces if piece.completes]
        logits[[place for place, request in enumerate(ready) if request is bad], 77] = score
        return logits, scores

    bad = asked(words(51, 9), sampling=sampling)
    engine.runner.run = spoilt
    events, (failed,) = run(engine, MANY[0], bad)
    assert isinstance(failed, Failure) and isinstance(failed.error, BrokenLogits)
    assert tokens(events) == alone and engine.table.in_use == 0


@pytest.mark.parametrize("exact", [True, False])
def test_a_short_prompt_need_not_wait_for_the_end_of_a_long_one(model, monkeypatch, exact):
    monkeypatch.setattr(scheduler, "SHORT_CHUNK", 32)
    monkeypatch.setattr(scheduler, "CHUNK", 32)
    engine = Engine(model, max_batch_size=4)
    engine.scheduler.exact = engine.runner.exact = exact
    long = engine.submit(asked(words(1, 900), tokens=1))
    engine.step()
    short = [engine.submit(asked(words(seed, 20), tokens=1)) for seed in (2, 3)]
    ended = []
    while engine.busy:
        ended += [event.request_id for event in engine.step()]
        if len(ended) == 2:
            break
    assert sorted(ended) == short and engine.running == 1
    assert engine.scheduler.running[0].id == long and engine.scheduler.running[0].computed < 200


def test_cancelling_in_the_middle_of_a_prompt_frees_every_page(model, monkeypatch):
    monkeypatch.setattr(scheduler, "SHORT_CHUNK", 16)
    engine = Engine(model, max_batch_size=2)
    submitted = [engine.submit(asked(words(seed, 100))) for seed in (1, 2)]
    engine.step()
    assert engine.table.in_use > 0
    for request_id in submitted:
        engine.cancel(request_id)
    assert not engine.busy and engine.table.in_use == 0


def test_sampling_draws_the_same_for_a_seed_whoever_else_is_there(model):
    drawn = asked(words(8, 30), sampling=Sampling(temperature=1.0, top_k=0, seed=3))
    alone = tokens(run(Engine(model), drawn)[0])
    assert tokens(run(Engine(model, max_batch_size=8), *MANY[:5], drawn)[-1]) == alone
