"""The runner for GPUs, on a CPU: Triton interpreted, no graph captured, all else as it is."""

import os

import torch
from support import builders
from support.devices import loaded
from support.engines import run, tokens
from support.interpreter import interpreted
from support.proposals import Forced, at_random
from support.random_requests import words

from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Request, Sampling
from pixtral_cli.model.kv_cache import PAGE, KVCache


def on_card(model, **settings):
    """An engine as on a card."""
    from pixtral_cli.engine.card_runner import CardRunner

    torch.cuda.graph_pool_handle = lambda: None
    CardRunner._graph = lambda runner, bucket, proposing=False: None  # none can be captured
    engine = Engine(model, **settings)
    kv_cache = KVCache(model.config.text, model.dtype, model.device, engine.table.count + 1)
    kv_cache.scratch_page = engine.table.count
    kv_cache._store.zero_()
    engine.scheduler.exact, engine.scheduler.chunks = False, (3 * PAGE, 2 * PAGE)
    engine.runner = CardRunner(model, kv_cache, engine.features, engine.scheduler.max_batch_size, engine.max_length)
    return engine


def prompt(seed, length, max_new_tokens, **fields):
    return Request(tuple(words(seed, length)), max_new_tokens, **fields)


@interpreted
def test_requests_get_the_tokens_that_the_cpu_gives_them(tmp_path):
    builders.pixtral(tmp_path, sliding_window=24)
    model = loaded(tmp_path)
    requests = [
        prompt(1, 2 * PAGE - 1, 5),
        prompt(2, 4 * PAGE, 3, logprobs=1),
        prompt(3, 1, 4, sampling=Sampling(temperature=0.8, top_k=0, seed=7)),
        prompt(1, 2 * PAGE - 1, 4, sampling=Sampling(repetition_penalty=1.3)),  # it shares the first one's page
        prompt(4, 2 * PAGE - 1, 5),
    ]
    expected = [tokens(run(Engine(model, 5 * PAGE), each)[0]) for each in requests]
    engine = on_card(model, max_length=5 * PAGE, max_batch_size=3, kv_tokens=7 * PAGE)
    assert [tokens(events) for events in run(engine, *requests)] == expected
    assert engine.scheduler.preemptions > 0 and engine.table.in_use == 0
    assert os.environ["TRITON_INTERPRET"] == "1"


@interpreted
def test_whatever_is_proposed_the_tokens_are_those_of_the_cpu(tmp_path):
    """Some go on a step ahead, others wait for what was proposed; pages end in the middle of it."""
    builders.pixtral(tmp_path, sliding_window=24)
    model = loaded(tmp_path)
    requests = [
        prompt(1, PAGE - 5, 16),
        prompt(3, 1, 4, sampling=Sampling(temperature=0.8, top_k=0, seed=7)),
        prompt(4, 9, 5, sampling=Sampling(repetition_penalty=1.3)),
        prompt(5, 2 * PAGE - 1, 6, logprobs=1),
    ]
    expected = [tokens(run(Engine(model, 3 * PAGE, speculative=False), each)[0]) for each in requests]
    engine = on_card(model, max_length=3 * PAGE, max_batch_size=2)
    Forced(engine, at_random(expected))
    assert [tokens(events) for events in run(engine, *requests)] == expected
    assert 0 < engine.counters.accepted_tokens < engine.counters.proposed_tokens and engine.table.in_use == 0


@interpreted
def test_after_proposals_a_plain_step_goes_on_with_the_token_that_came(tmp_path):
    """It takes the card's own copy of it."""
    builders.pixtral(tmp_path)
    model = loaded(tmp_path)
    request = prompt(1, 5, 16)
    expected = tokens(run(Engine(model, speculative=False), request)[0])
    engine = on_card(model, max_length=2 * PAGE)
    propose = at_random([expected])
    Forced(engine, lambda sequence, most: propose(sequence, most) if sequence.generated % 8 < 4 else [])
    ahead = []
    launch = engine._launch

    def launched(chunks):
        ahead.extend(chunk.sequence.unread for chunk in chunks)
        return launch(chunks)

    engine._launch = launched
    assert tokens(run(engine, request)[0]) == expected
    assert 1 in ahead and engine.counters.accepted_tokens > 0
