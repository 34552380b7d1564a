"""The engine's promises on every device: a card gives the tokens that the CPU gives each request by itself.

Expected tokens and scores come from the same checkpoint on the CPU, in float32 and alone, which other tests compare
with transformers. All runs on the CPU as well, so that a test is known to be right before it meets a card.
"""

import json
import random
import weakref
from collections import Counter
from contextlib import suppress

import pytest
import torch
from support import builders
from support.devices import CPU, DEVICES, loaded
from support.engines import run, tokens
from support.proposals import Forced, at_random, oracle, wrong
from support.random_requests import asked, picture, words

from pixtral_cli.engine import grammar
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Failure, ImageInput, Request, Sampling
from pixtral_cli.errors import BrokenLogits
from pixtral_cli.model import triton_support
from pixtral_cli.model.kernels import KernelLinear
from pixtral_cli.model.kernels.reference import PackedEmbedding
from pixtral_cli.model.kv_cache import PAGE

VOCABULARY = builders.TEXT["vocab_size"]


@pytest.fixture(scope="module", params=DEVICES, ids=str)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixtral")
    builders.pixtral(folder, sliding_window=24)
    return folder


@pytest.fixture(scope="module")
def model(folder, device):
    return loaded(folder, device)


@pytest.fixture(scope="module")
def alone(folder):
    """The events of a request by itself, on the CPU."""
    oracle, kept = loaded(folder), {}

    def of(request):
        if id(request) not in kept:
            kept[id(request)] = request, run(Engine(oracle), request)[0]
        return kept[id(request)][1]

    return of


def of_words(seed, length=30, tokens=12, **fields):
    return asked(words(seed, length), tokens=tokens, **fields)


LENGTHS = [30, 3, 70, 1, 16, 17, 15, 48, 9, 100, 31, 33, 64, 5, 260, 22, 40, 2, 29, 90]
MANY = [
    asked(words(seed, length), *([picture(seed, 1 + seed % 5, 3)] if seed % 4 == 1 else []), tokens=6 + seed)
    for seed, length in enumerate(LENGTHS)
]

FAMILIES = {
    **builders.TEXT_FAMILIES,
    "wide heads": lambda folder: builders.mistral(folder, num_attention_heads=4, num_key_value_heads=1, head_dim=64),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_tokens_of_the_cpu(device, family, tmp_path):
    FAMILIES[family](tmp_path)
    requests = [of_words(1, 40, tokens=24), of_words(2, 5), of_words(3, 17)]
    expected = [tokens(run(Engine(loaded(tmp_path)), request)[0]) for request in requests]
    found = run(Engine(loaded(tmp_path, device), max_batch_size=3), *requests)
    assert [tokens(events) for events in found] == expected
    assert len({tuple(each) for each in expected}) == 3


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 17])
def test_together_they_get_the_tokens_of_each_alone_on_the_cpu(model, alone, batch):
    """Three more than there are places for, too."""
    requests = MANY[: batch + 3]
    engine = Engine(model, max_batch_size=batch)
    assert [tokens(events) for events in run(engine, *requests)] == [tokens(alone(request)) for request in requests]
    assert engine.table.in_use == 0


def test_each_token_is_told_once_and_none_after_the_end(model):
    engine = Engine(model, max_batch_size=5)
    found = run(engine, *MANY[:9])
    for request, events in zip(MANY, found, strict=False):
        assert [event.finish_reason for event in events] == [None] * (request.max_new_tokens - 1) + ["length"]
    assert engine.counters.generated_tokens == sum(map(len, found))
    assert not engine.busy and engine.step() == []


def test_an_end_token_ends_an_answer_and_nothing_comes_after_it(model, alone):
    requests, expected = [], []
    for request, place in zip(MANY[8:13], (0, 3, 4, 7, 9), strict=True):
        plain = tokens(alone(request))
        end = plain[place]
        requests.append(Request(request.token_ids, 40, request.images, end_token_ids=frozenset({end})))
        expected.append(plain[: plain.index(end) + 1])
    engine = Engine(model, max_batch_size=3)
    found = run(engine, *requests)
    assert [tokens(events) for events in found] == expected
    assert {events[-1].finish_reason for events in found} == {"stop"}
    assert engine.counters.generated_tokens == sum(map(len, expected))


def test_a_request_may_join_while_others_decode(model, alone):
    engine = Engine(model, max_batch_size=4)
    events = {engine.submit(request): [] for request in MANY[12:14]}
    while sum(map(len, events.values())) < 8:
        collect(engine, events)
    events |= {engine.submit(request): [] for request in (MANY[14], MANY[9])}  # one comes in two chunks
    while engine.busy:
        collect(engine, events)
    expected = [MANY[12], MANY[13], MANY[14], MANY[9]]
    assert [tokens(each) for each in events.values()] == [tokens(alone(request)) for request in expected]


def collect(engine, events):
    """One step."""
    for event in engine.step():
        events[event.request_id].append(event)


PREFIX = [words(1, 270), picture(2), words(3, 25)]


def test_a_second_question_computes_only_what_is_new(model, alone):
    first, second = asked(*PREFIX, words(4, 9)), asked(*PREFIX, words(5, 30))
    engine = Engine(model)
    assert tokens(run(engine, first)[0]) == tokens(alone(first))
    events = run(engine, second)[0]
    assert events[0].cached_tokens >= 256 and tokens(events) == tokens(alone(second))


def test_prompts_that_begin_alike_and_come_together_get_their_own_answers(model, alone):
    requests = [asked(*PREFIX, words(seed, 5), tokens=8) for seed in range(4)]
    found = run(Engine(model, max_batch_size=4), *requests)
    assert [tokens(events) for events in found] == [tokens(alone(request)) for request in requests]
    assert all(events[0].cached_tokens >= 256 for events in found[1:])


def test_pictures_of_many_sizes_in_one_step_are_each_their_own(model, alone):
    requests = [
        asked(words(1, 3), picture(1, 1, 1), words(2, 2)),
        asked(picture(2, 8, 3), words(3, 4), picture(3, 2, 7), picture(2, 8, 3)),
        asked(picture(4, 6, 6)),
        asked(words(4, 40), picture(5, 3, 9), words(5, 2)),
    ]
    found = run(Engine(model, max_batch_size=4), *requests)
    assert [tokens(events) for events in found] == [tokens(alone(request)) for request in requests]


@pytest.mark.parametrize("guess", [oracle, wrong, at_random])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_that_are_proposed_change_nothing(model, alone, batch, guess):
    requests = MANY[5:11]
    expected = [tokens(alone(request)) for request in requests]
    engine = Engine(model, max_batch_size=batch)
    Forced(engine, guess(expected))
    assert [tokens(events) for events in run(engine, *requests)] == expected
    assert engine.counters.proposed_tokens > 10 and engine.table.in_use == 0
    assert (engine.counters.accepted_tokens > 0) == (guess is not wrong)


@pytest.mark.parametrize("pages", [20, 24])
def test_with_too_little_memory_requests_begin_again_and_none_fails(model, alone, pages):
    requests = [asked(words(seed, 20 + 37 * seed), words(seed, 3), tokens=30 + seed) for seed in range(7)]
    engine = Engine(model, max_batch_size=7, kv_tokens=pages * PAGE)
    assert [tokens(events) for events in run(engine, *requests)] == [tokens(alone(request)) for request in requests]
    assert engine.scheduler.preemptions > 0
    assert engine.table.in_use == 0 and engine.table.available == pages


def test_a_request_that_fills_the_whole_memory_ends_for_its_length(model):
    engine = Engine(model, kv_tokens=4 * PAGE)
    events = run(engine, of_words(1, 30, tokens=None))[0]
    assert events[-1].finish_reason == "length" and len(events) == 4 * PAGE - 30


ALTERED = [
    Sampling(repetition_penalty=1.3),
    Sampling(frequency_penalty=0.7),
    Sampling(presence_penalty=1.5),
    Sampling(logit_bias={77: 100.0}),
    Sampling(logit_bias=dict.fromkeys(range(0, VOCABULARY, 2), -100.0), repetition_penalty=0.8),
]


def test_penalties_and_bias_choose_as_on_the_cpu(model, alone):
    requests = [of_words(seed, tokens=30, sampling=sampling) for seed, sampling in enumerate((*ALTERED, Sampling()))]
    expected = [tokens(alone(request)) for request in requests]
    assert [tokens(events) for events in run(Engine(model, max_batch_size=6), *requests)] == expected
    assert set(expected[3]) == {77} and all(token % 2 for token in expected[4])


DRAWN = [
    Sampling(temperature=0.8, top_k=0, seed=7),
    Sampling(temperature=1.0, top_k=5, seed=1),
    Sampling(temperature=1.2, top_k=0, top_p=0.7, seed=2),
    Sampling(temperature=1.0, top_k=0, min_p=0.1, seed=3),
    Sampling(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.5, seed=4),
]


def test_a_seed_draws_the_same_alone_and_among_others_and_another_seed_another(model):
    requests = [of_words(5, tokens=20, sampling=sampling) for sampling in DRAWN]
    by_itself = [tokens(run(Engine(model), request)[0]) for request in requests]
    assert by_itself == [tokens(run(Engine(model), request)[0]) for request in requests]
    together = run(Engine(model, max_batch_size=9), *MANY[:3], *requests)
    assert [tokens(events) for events in together[3:]] == by_itself
    other = of_words(5, tokens=20, sampling=Sampling(temperature=0.8, top_k=0, seed=8))
    assert tokens(run(Engine(model), other)[0]) != by_itself[0]


@pytest.mark.parametrize("sampling", DRAWN[1:4], ids=["top_k", "top_p", "min_p"])
def test_what_a_filter_cuts_off_is_never_drawn(model, sampling):
    drawn = of_words(6, tokens=60, sampling=sampling, logprobs=VOCABULARY)
    events = run(Engine(model, max_batch_size=2), drawn, MANY[0])[0]
    ranks = []
    for event in events:
        ids = [token for token, _ in event.alternatives]
        spread = (torch.tensor([score for _, score in event.alternatives]) / sampling.temperature).softmax(0)
        before = spread.cumsum(0) - spread
        kept = (before < sampling.top_p + 1e-5) & (spread > sampling.min_p * spread[0] - 1e-5)
        most = min(int(kept.sum()), sampling.top_k or VOCABULARY)
        ranks.append(ids.index(event.token_id))
        assert ranks[-1] < most
    assert len(set(ranks)) > 2


def test_draws_follow_the_distribution(model):
    """512 seeds, one token each: what is drawn is as frequent as the temperature makes it."""
    ids, temperature, count = words(9, PAGE), 1.5, 512
    [scored] = run(Engine(model), Request(tuple(ids), 1, logprobs=VOCABULARY))[0]
    spread = dict(scored.alternatives)
    expected = (torch.tensor([spread[token] for token in range(VOCABULARY)]) / temperature).softmax(0)
    best = expected.topk(8)
    requests = [
        Request(tuple(ids), 1, sampling=Sampling(temperature=temperature, top_k=8, seed=seed)) for seed in range(count)
    ]
    drawn = Counter(events[0].token_id for events in run(Engine(model, max_batch_size=64), *requests))
    assert set(drawn) <= set(best.indices.tolist())
    found = torch.tensor([drawn[token] for token in best.indices.tolist()]) / count
    assert (found - best.values / best.values.sum()).abs().sum() / 2 < 0.12  # of true draws it is 0.04


def test_log_probabilities_are_those_of_the_cpu(model, alone):
    requests = [of_words(seed, length, logprobs=5) for seed, length in enumerate((30, 3, 70))]
    for request, events in zip(requests, run(Engine(model, max_batch_size=3), *requests), strict=True):
        for event, expected in zip(events, alone(request), strict=True):
            assert event.logprob == pytest.approx(expected.logprob, abs=1e-3)
            scores = [score for _, score in event.alternatives]
            assert scores == pytest.approx([score for _, score in expected.alternatives], abs=1e-3)
            assert dict(event.alternatives)[event.token_id] == event.logprob


def test_log_probabilities_of_prompts_are_those_of_the_cpu(model, alone):
    requests = [of_words(seed, length, prompt_logprobs=3) for seed, length in enumerate((2, 17, 300))]
    for request, events in zip(requests, run(Engine(model, max_batch_size=3), *requests, MANY[0]), strict=False):
        found, expected = (scores(each) for each in (events, alone(request)))
        assert len(found[0]) == len(request.token_ids) - 1
        for place in (0, 2):  # the ids between may change places where two score alike
            torch.testing.assert_close(found[place], expected[place], atol=1e-3, rtol=0)


def scores(events):
    return [torch.cat(parts) for parts in zip(*events[0].prompt_scores, strict=True)]


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9999},
        "is": {"type": "boolean"},
    },
    "required": ["colour", "count", "is"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vocabulary():
    """Token 14 + n is byte n; below are control tokens, of which 2 ends an answer."""
    pytest.importorskip("llguidance")

    def token_bytes(token):
        return bytes([token - 14]) if 14 <= token < 270 else b""

    return grammar.Vocabulary(270, token_bytes, lambda text: [14 + byte for byte in text.encode()], {2}, {0, 1, 3})


def test_a_grammar_binds_its_own_request_and_no_other(model, alone, vocabulary):
    def bound(prompt, **sampling):
        rule = grammar.compile(vocabulary, f"start: {grammar.json_rule(SCHEMA)}", "response_format")
        return of_words(
            prompt, tokens=300, end_token_ids=frozenset({2}), constraint=rule, sampling=Sampling(**sampling)
        )

    def all_of_them():
        return [bound(1), MANY[2], bound(2, temperature=2.0, top_k=0, seed=1), bound(3, repetition_penalty=1.2)]

    found = [tokens(events) for events in run(Engine(model, max_batch_size=4), *all_of_them())]
    for place in (0, 2, 3):
        written = json.loads(b"".join(map(vocabulary.token_bytes, found[place])))
        assert list(written) == ["colour", "count", "is"] and written["colour"] in ("red", "green")
        assert 0 <= written["count"] <= 9999 and isinstance(written["is"], bool)
    for place in (0, 1, 3):
        assert found[place] == tokens(alone(all_of_them()[place]))


def test_cancelling_in_the_middle_leaves_the_others_as_they_are_and_loses_no_page(model, alone):
    engine = Engine(model, max_batch_size=4)
    pages = engine.table.available
    events = {engine.submit(request): [] for request in MANY[11:14]}
    kept, dropped, other = events
    while not events[dropped]:
        collect(engine, events)
    engine.cancel(dropped)
    told = len(events[dropped])
    late = engine.submit(MANY[14])
    collect(engine, events)
    engine.cancel(late)  # in the middle of its prompt
    while engine.busy:
        collect(engine, events)
    assert len(events[dropped]) == told
    assert [tokens(events[each]) for each in (kept, other)] == [tokens(alone(MANY[place])) for place in (11, 13)]
    assert engine.table.in_use == 0 and engine.table.available == pages


@pytest.mark.parametrize("seed", range(3))
def test_whoever_comes_and_goes_each_gets_its_own_tokens(model, alone, seed):
    """Requests come and are cancelled at random, in little memory: what is told is always the beginning of what comes
    alone, and all of it unless it was cancelled."""
    chance, pages = random.Random(seed), 26
    engine = Engine(model, max_batch_size=4, kv_tokens=pages * PAGE)
    left, events, cancelled = chance.sample(MANY, len(MANY)), {}, set()
    asked_for = {}
    while left or engine.busy:
        if left and chance.random() < 0.3:
            request = left.pop()
            request_id = engine.submit(request)
            asked_for[request_id], events[request_id] = request, []
        if events and chance.random() < 0.05:
            cancelled.add(request_id := chance.choice(list(events)))
            engine.cancel(request_id)
        for event in engine.step():
            assert event.request_id not in cancelled
            events[event.request_id].append(event)
    for request_id, request in asked_for.items():
        found, expected = tokens(events[request_id]), tokens(alone(request))
        assert found == (expected[: len(found)] if request_id in cancelled else expected)
    assert engine.table.in_use == 0 and engine.table.available == pages


def unreadable():
    raise ValueError("no picture")


def test_a_picture_that_cannot_be_read_fails_its_own_request(model, alone):
    ids, good = picture(50)
    bad = asked(words(50, 5), (ids, ImageInput(b"bad", good.features, unreadable)))
    assert_fails_alone(model, alone, bad, ValueError)


def test_numbers_that_are_none_fail_their_own_request_and_spoil_no_page(model, alone):
    ids, good = picture(51)
    pixels = torch.full((3, 4 * 16, 5 * 16), torch.nan)
    bad = asked(words(51, 5), (ids, ImageInput(b"nan", good.features, lambda: pixels)), words(51, 40))
    assert_fails_alone(model, alone, bad, BrokenLogits)


@pytest.fixture
def refused(model, monkeypatch):
    """A layer has no memory for more than 200 tokens. Tells for every pass whether what was refused before is gone."""
    mlp = model.language_model.layers[1].mlp
    compute, asked_for, gone = mlp.forward, [], []

    def forward(x):
        gone.append(all(each() is None for each in asked_for))
        if len(x) > 200:
            asked_for.append(weakref.ref(x))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(x)

    monkeypatch.setattr(mlp, "forward", forward)
    return gone


def test_a_prompt_for_which_no_memory_is_left_fails_alone(model, alone, refused):
    assert_fails_alone(model, alone, of_words(52, 400), torch.OutOfMemoryError)
    assert all(refused), "what a failed pass has computed is in the way of those that are tried again"


@pytest.mark.gpu
def test_a_prompt_that_does_not_fit_into_the_memory_of_the_card_fails_alone(folder, alone):
    """Others have got their answers before, and what they need is small: torch keeps blocks for tensors up to 1 MiB
    apart. All that it could give to larger ones is taken."""
    device = torch.device("cuda", 0)
    engine, others = Engine(loaded(folder, device), max_batch_size=4, kv_tokens=300 * PAGE), MANY[:3]
    expected = [tokens(alone(request)) for request in others]
    assert [tokens(events) for events in run(engine, *others)] == expected
    pages = engine.table.available
    allowed, taken = torch.cuda.memory_reserved(device), []
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        with suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(2**20 + 1, dtype=torch.uint8, device=device))
        *found, failed = run(engine, *others, of_words(1, 4000))
    finally:
        taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert isinstance(failed[0], Failure) and isinstance(failed[0].error, torch.OutOfMemoryError)
    assert [tokens(events) for events in found] == expected
    assert engine.table.in_use == 0 and engine.table.available == pages
    assert len(run(engine, of_words(1, 4000))[0]) == 12


def assert_fails_alone(model, alone, bad, error):
    """Among three others, which get their answers; the engine goes on, in the same pages."""
    engine = Engine(model, max_batch_size=4, kv_tokens=64 * PAGE)
    pages, others = engine.table.available, [MANY[0], MANY[1], MANY[3]]
    expected = [tokens(alone(request)) for request in others]
    *found, failed = run(engine, *others, bad)
    assert [tokens(events) for events in found] == expected
    assert len(failed) == 1 and isinstance(failed[0], Failure) and isinstance(failed[0].error, error)
    assert engine.table.in_use == 0 and engine.table.available == pages
    assert [tokens(events) for events in run(engine, *others)] == expected


def test_without_triton_the_tokens_are_the_same(folder, device, alone, monkeypatch):
    monkeypatch.setattr(triton_support, "available", lambda device: False)
    requests = MANY[:5]
    found = run(Engine(loaded(folder, device), max_batch_size=3), *requests)
    assert [tokens(events) for events in found] == [tokens(alone(request)) for request in requests]


def test_keys_and_values_in_8_bits_change_scores_little(model):
    request = of_words(1, 60, tokens=8, prompt_logprobs=VOCABULARY)
    plain, narrow = (
        run(Engine(model, max_batch_size=2, kv_cache_dtype=kind), request, MANY[2])[0] for kind in ("auto", "fp8")
    )
    difference = (logprobs(narrow) - logprobs(plain)).norm() / logprobs(plain).norm()
    assert 1e-4 < difference < 0.1
    assert len(tokens(narrow)) == 8


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows of 256 and 512 weights, which every encoding takes."""
    folder = tmp_path_factory.mktemp("wide")
    builders.mistral(folder, hidden_size=256, intermediate_size=512, num_attention_heads=16, head_dim=16)
    return folder


@pytest.mark.parametrize("encoding", ["bfloat16", "q4_0", "q4_k", "q6_k", "q8_0", "fp8", "nf4"])
def test_scores_of_packed_weights_are_those_of_the_weights_decoded(wide, device, encoding):
    """Few rows and many take different kernels. What is left is bfloat16's rounding of activations."""
    models = loaded(wide, device, encoding), decoded(wide, encoding)
    for length in (2, 40):
        request = of_words(1, length, tokens=0, prompt_logprobs=VOCABULARY)
        found, expected = (logprobs(run(Engine(model), request)[0]) for model in models)
        assert (found - expected).norm() / expected.norm() < 3e-2, length


def decoded(folder, encoding):
    """The model in float32 on the CPU, with the very weights that the encoding keeps."""
    whole, packed = loaded(folder), loaded(folder, CPU, encoding)
    for name, layer in packed.named_modules():
        if isinstance(layer, (KernelLinear, PackedEmbedding)):
            weight = layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight.decoded()
            whole.get_submodule(name).weight.data.copy_(weight)
    kept = dict(packed.named_parameters())
    for name, parameter in whole.named_parameters():
        if name in kept:
            parameter.data.copy_(kept[name])
    return whole


def logprobs(events):
    """Of all tokens at every place [N, V], less their mean: logits, but for what the softmax takes away."""
    _, ids, found = scores(events)
    by_token = torch.empty_like(found).scatter(1, ids, found)
    return by_token - by_token.mean(1, keepdim=True)
