"""Several tokens in one step change nothing that anybody is told, whatever is proposed; and only what pays is.

The oracle is the same engine without speculation, compared with transformers by other tests.
"""

import gc
import random
from dataclasses import replace

import pytest
import torch
from support import builders
from support.devices import loaded
from support.engines import run, tokens
from support.proposals import Forced, at_random, oracle, wrong
from support.random_requests import asked, picture, words

from pixtral_cli.engine import speculation
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.lookup import Match
from pixtral_cli.engine.request import Request, Sampling
from pixtral_cli.engine.runner import Computed
from pixtral_cli.engine.speculation import MOST_ROWS, PassTimes, Shares, worth_computing
from pixtral_cli.model.kernels import native
from pixtral_cli.model.kernels.cpu_rows import CpuRowsKernel
from pixtral_cli.model.kv_cache import PAGE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixtral")
    builders.pixtral(folder, sliding_window=24)
    return loaded(folder)


compiled = pytest.mark.skipif(
    not native.available(), reason="a row's bits depend on its neighbours in torch's products"
)


@pytest.fixture(
    scope="module",
    params=["float32", *(pytest.param(name, marks=compiled) for name in ("bfloat16", "q4_0", "q8_0"))],
)
def circling(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    model = builders.mistral(folder, hidden_size=256, intermediate_size=512, num_attention_heads=16, head_dim=16)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(300)  # the last token counts for most, so that answers run in circles
    model.save_pretrained(folder)
    return loaded(folder, encoding=request.param)


REPEATING = words(1, 12) * 4
MIXED = [
    asked(REPEATING, tokens=60),
    asked(words(2, 3), tokens=40, logprobs=3),
    asked(words(3, 70), words(3, 20), tokens=25, logprobs=0),
    asked(REPEATING, tokens=30, sampling=Sampling(temperature=0.8, top_k=0, seed=7)),
    asked(REPEATING, tokens=20, sampling=Sampling(repetition_penalty=1.3)),
    asked(words(6, 30), tokens=0, prompt_logprobs=1),
    asked(words(7, 300), words(7, 9), tokens=1),
    asked(words(8, 5), picture(1), words(8, 5), picture(1), tokens=30),
    asked(REPEATING, words(9, PAGE), tokens=2 * PAGE, sampling=Sampling(logit_bias={20: 3.0, 21: -100.0}), logprobs=2),
]


def plain(model, *requests, **settings):
    return run(Engine(model, speculative=False, **settings), *requests)


def sharp(events):
    """All that is told, log-probabilities to the bit; the scores of prompts as lists."""
    return [
        [
            replace(
                e, request_id=0, prompt_scores=tuple(map(str, (each.tolist() for s in e.prompt_scores for each in s)))
            )
            for e in each
        ]
        for each in events
    ]


@pytest.mark.parametrize("guess", [oracle, wrong, at_random])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 9])
def test_whatever_is_proposed_the_events_are_those_without_to_the_bit(model, guess, batch):
    expected = plain(model, *MIXED, max_batch_size=batch)
    engine = Engine(model, max_batch_size=batch)
    Forced(engine, guess([tokens(events) for events in expected]))
    assert sharp(run(engine, *MIXED)) == sharp(expected)
    assert engine.table.in_use == 0 and not engine.busy
    proposed, accepted = engine.counters.proposed_tokens, engine.counters.accepted_tokens
    assert proposed > 0
    assert accepted == proposed if guess is oracle else accepted < proposed
    assert accepted == 0 if guess is wrong else accepted > 0


def test_what_repeats_is_found_and_told_as_without(circling):
    """With all that is there: the look-up, and what pays. Rows have the bits that they have alone."""
    requests = [Request(tuple(words(seed, 9) * 5), 80, logprobs=2) for seed in range(4)]
    expected = [plain(circling, each)[0] for each in requests]
    for batch in (1, 4):
        engine = Engine(circling, max_batch_size=batch, clock=Ticking())
        found = run(engine, *requests)
        assert [tokens(events) for events in found] == [tokens(events) for events in expected]
        assert engine.counters.accepted_tokens > 20
        assert [sum(map(len, found))] == [engine.counters.generated_tokens]


@compiled
@pytest.mark.parametrize("encoding", ["bfloat16", "q4_0", "q4_k", "q6_k", "q8_0", "nf4"])
def test_with_the_library_log_probabilities_are_those_without_to_the_bit(encoding, tmp_path):
    builders.mistral(tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=16, head_dim=16)
    model = loaded(tmp_path, encoding=encoding)
    requests = [asked(words(seed, 30), tokens=40, logprobs=2) for seed in range(3)]
    expected = [plain(model, each)[0] for each in requests]
    for batch in (1, 3):
        engine = Engine(model, max_batch_size=batch)
        Forced(engine, at_random([tokens(events) for events in expected]))
        assert sharp(run(engine, *requests)) == sharp(expected)


class Ticking:
    """A clock by which all passes take the same time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_it_takes_fewer_steps_and_says_how_many_tokens_were_looked_up(model):
    request = asked(REPEATING, tokens=60)
    expected = plain(model, request)[0]
    engine, steps = Engine(model), 0
    Forced(engine, oracle([tokens(expected)]))
    engine.submit(request)
    events = []
    while engine.busy:
        events += engine.step()
        steps += 1
    assert tokens(events) == tokens(expected) and steps <= 2 + 59 // MOST_ROWS
    assert events[0].proposed_tokens == 0
    assert events[-1].accepted_tokens == events[-1].proposed_tokens == engine.counters.accepted_tokens > 50


@pytest.mark.parametrize("place", range(9, 20))
def test_an_end_token_in_the_middle_of_a_step_drops_the_rest(model, place):
    request = asked(words(5, 30), tokens=40)
    answer = tokens(plain(model, request)[0])
    end = frozenset({answer[place]})
    expected = plain(model, replace(request, end_token_ids=end))[0]
    engine = Engine(model)
    Forced(engine, oracle([answer]))
    found = run(engine, replace(request, end_token_ids=end))[0]
    assert sharp([found]) == sharp([expected]) and found[-1].finish_reason == "stop"
    assert engine.table.in_use == 0 and engine.counters.generated_tokens == len(found)


@pytest.mark.parametrize("length", range(1, 12))
def test_no_more_is_computed_than_may_come(model, length):
    """The last token that may come is never an input: nothing is proposed after it."""
    request = asked(words(5, 4 * PAGE - length), tokens=None)
    expected = plain(model, request, max_length=4 * PAGE)[0]
    engine = Engine(model, max_length=4 * PAGE)
    Forced(engine, lambda sequence, most: [20] * most)
    assert sharp(run(engine, request)) == sharp([expected])
    engine = Engine(model, max_length=4 * PAGE)
    Forced(engine, oracle([tokens(expected)]))
    assert sharp(run(engine, request)) == sharp([expected]) and expected[-1].finish_reason == "length"
    assert engine.table.in_use == 0 and engine.table.available == 4


@pytest.mark.parametrize("guess", [wrong, at_random])
def test_pages_that_others_share_have_only_what_came(model, guess):
    """A second question goes on from the pages of the first, and gets the answer that it gets alone."""
    first = asked(words(5, 30), tokens=6 * PAGE)
    answer = tokens(plain(model, first)[0])
    again = Request((*first.token_ids, *answer, 20, 21), 30, logprobs=1)
    expected = plain(model, again)[0]
    engine = Engine(model)
    engine.scheduler.exact = False
    Forced(engine, guess([answer, tokens(expected)]))
    assert tokens(run(engine, first)[0]) == answer
    found = run(engine, again)[0]
    assert tokens(found) == tokens(expected) and found[0].cached_tokens >= 7 * PAGE
    for told, alone in zip(found, expected, strict=True):
        assert told.logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_with_too_little_memory_less_is_proposed_and_nobody_gives_way_for_it(model):
    requests = [asked(words(seed, 2 * PAGE - 1), tokens=2 * PAGE) for seed in range(3)]
    expected = [plain(model, each)[0] for each in requests]
    engine = Engine(model, max_batch_size=3, max_length=4 * PAGE, kv_tokens=7 * PAGE)
    Forced(engine, at_random([tokens(each) for each in expected]))
    assert [tokens(events) for events in run(engine, *requests)] == [tokens(each) for each in expected]
    assert engine.table.in_use == 0 and engine.table.available == 7
    alone = Engine(model, max_length=4 * PAGE, kv_tokens=4 * PAGE)
    Forced(alone, oracle([tokens(expected[0])]))
    assert tokens(run(alone, requests[0])[0]) == tokens(expected[0]) and alone.scheduler.preemptions == 0


def test_one_that_is_cancelled_leaves_no_page_and_others_go_on(model):
    requests = [asked(words(seed, 20), tokens=50) for seed in range(2)]
    expected = [tokens(plain(model, each)[0]) for each in requests]
    engine = Engine(model, max_batch_size=2)
    Forced(engine, at_random(expected))
    ids = [engine.submit(each) for each in requests]
    events = [event for _ in range(5) for event in engine.step()]
    engine.cancel(ids[0])
    later = []
    while engine.busy:
        later += engine.step()
    assert {event.request_id for event in later} == {ids[1]}
    assert tokens(e for e in [*events, *later] if e.request_id == ids[1]) == expected[1]
    assert engine.table.in_use == 0


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.5, top_k=0, seed=1), Sampling(frequency_penalty=0.3), Sampling(presence_penalty=0.3)],
)
def test_a_choice_that_depends_on_more_than_logits_is_not_proposed_for(model, sampling):
    engine = Engine(model)
    Forced(engine, lambda sequence, most: [20] * most)
    run(engine, asked(REPEATING, tokens=30, sampling=sampling))
    assert engine.counters.proposed_tokens == 0


def test_nothing_is_proposed_where_it_is_off(model):
    engine = Engine(model, speculative=False, clock=Ticking())
    run(engine, asked(REPEATING, tokens=60))
    assert engine.counters.proposed_tokens == 0


@compiled
@pytest.mark.parametrize("encoding", ["bfloat16", "q4_0", "q6_k", "nf4"])
def test_where_a_matrix_is_left_to_torch_only_float32_is_proposed_for(encoding, tmp_path, monkeypatch):
    """Of torch's products a row's bits may depend on how many there are, so the answer on what was proposed."""
    builders.mistral(tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=16, head_dim=16)
    assert Engine(loaded(tmp_path, encoding=encoding)).speculation is not None
    model = loaded(tmp_path, encoding=encoding)
    monkeypatch.setattr(CpuRowsKernel, "takes", lambda weight, dtype, device: False)
    model.lm_head = loaded(tmp_path, encoding=encoding).lm_head
    assert Engine(model).speculation is None
    assert Engine(loaded(tmp_path, encoding=encoding)).speculation is None
    assert Engine(loaded(tmp_path)).speculation is not None


# ---- what pays --------------------------------------------------------------------------------------------------


def times(**seconds):
    found = PassTimes()
    for rows, each in seconds.items():
        for _ in range(2):
            found.measured(int(rows[1:]), each)
    return found


def sure(*counts):
    """Shares by which proposals are right, or wrong, nearly always."""
    found = Shares()
    for right in counts:
        for length in range(2, 24):
            for _ in range(200):
                found.count(length, right)
    return found


LONG = Match(tuple(range(7)), 16)


def test_nothing_is_computed_in_advance_before_a_pass_was_measured():
    assert worth_computing([LONG], [sure(True)], 1, PassTimes()) == [0]


def test_short_matches_are_not_tried_first():
    short = Match(LONG.tokens, 7)
    assert worth_computing([short], [sure(True)], 1, times(n1=1.0)) == [0]
    assert worth_computing([LONG], [sure(True)], 1, times(n1=1.0)) == [7]
    assert worth_computing([short], [sure(True)], 1, times(n1=1.0, n8=1.2)) == [7]


def test_where_rows_cost_little_and_proposals_are_right_all_are_computed():
    assert worth_computing([LONG], [sure(True)], 1, times(n1=1.0, n8=2.0)) == [7]


def test_where_rows_cost_as_much_as_passes_nothing_is():
    assert worth_computing([LONG], [sure(True)], 1, times(n1=1.0, n8=8.0)) == [0]


def test_where_proposals_are_wrong_nothing_is():
    assert worth_computing([LONG], [sure(False)], 1, times(n1=1.0, n8=1.5)) == [0]


def test_rows_up_to_a_step_in_the_price_are_taken_and_no_more():
    assert worth_computing([LONG], [sure(True)], 1, times(n1=1.0, n4=1.1, n5=3.0, n8=3.0)) == [3]


def test_of_two_sequences_the_likelier_tokens_are_computed():
    counts = worth_computing([LONG, LONG], [sure(False), sure(True)], 2, times(n2=1.0, n8=2.0))
    assert counts[0] == 0 and counts[1] == 6


def test_a_full_batch_has_no_room():
    assert worth_computing([LONG] * MOST_ROWS, [sure(True)] * MOST_ROWS, MOST_ROWS, times(n8=1.0)) == [0] * MOST_ROWS


def test_times_between_measured_ones_lie_on_a_line_and_never_fall_with_rows():
    found = times(n1=1.0, n3=2.0, n8=4.5)
    assert [found.of(rows) for rows in (1, 2, 3, 8)] == [1.0, 1.5, 2.0, 4.5]
    falling = times(n2=2.0, n4=1.0)
    assert falling.of(8) >= falling.of(4)


def test_one_slow_pass_is_not_taken_for_the_rule():
    found = times(n1=1.0, n8=1.2)
    found.measured(8, 100.0)
    assert found.of(8) <= 1.2 * 1.25


def test_a_time_that_is_not_measured_again_is_forgotten():
    found = times(n1=1.0, n8=7.0)
    for _ in range(speculation.FORGOTTEN + 2):
        found.measured(1, 1.0)
    assert found.of(8) < 2.0


class Machine:
    """A clock for an engine whose passes of n rows take `seconds(n)`."""

    def __init__(self, engine_of, seconds):
        self.now, self.passes = 0.0, []
        self.engine = engine_of(lambda: self.now)
        compute = self.engine.runner.run

        def run(chunks):
            rows = sum(chunk.rows for chunk in chunks)
            if not any(chunk.sequence.prefilling for chunk in chunks):
                self.now += seconds(rows)
                self.passes.append(rows)
            return compute(chunks)

        self.engine.runner.run = run


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("cost", [0.02, 0.15, 0.4, 1.0], ids=lambda cost: f"{cost} a row")
def test_it_never_costs_much_and_gains_what_there_is_to_gain(model, share, cost):
    """Whatever share of proposals is right and whatever a row costs, time is what it is without, or less; but for the
    first tries, which a match as long as these deserves."""
    request = asked(words(5, 20), tokens=600)
    answer = tokens(plain(model, request)[0])
    chance = random.Random(3)
    machine = Machine(lambda clock: Engine(model, clock=clock), lambda rows: 1 + cost * (rows - 1))

    def guess(sequence, most):
        right = answer[sequence.generated :][:most]
        return Match(tuple(token if chance.random() < share else (token + 1) % 300 for token in right), 16)

    machine.engine.speculation.look_up = guess
    assert tokens(run(machine.engine, request)[0]) == answer
    assert machine.now < 1.02 * 600 + 3 * MOST_ROWS * cost
    best = max(sum(share**n for n in range(rows)) / (1 + cost * (rows - 1)) for rows in range(1, MOST_ROWS + 1))
    if best > 1.3:
        assert 600 / machine.now > 0.8 * best


def test_what_did_not_pay_is_tried_again_after_a_while(model):
    request = asked(words(5, 20), tokens=900)
    answer = tokens(plain(model, request)[0])
    machine = Machine(lambda clock: Engine(model, clock=clock), lambda rows: 1 + 0.1 * (rows - 1))

    def guess(sequence, most):
        right = answer[sequence.generated :][:most]
        return Match(tuple(right if sequence.generated > 300 else [(token + 1) % 300 for token in right]), 16)

    machine.engine.speculation.look_up = guess
    run(machine.engine, request)
    assert machine.passes[-20:].count(MOST_ROWS) > 15


def test_sequences_that_end_leave_nothing_behind(model):
    engine = Engine(model, clock=Ticking())
    run(engine, *[asked(REPEATING, tokens=20) for _ in range(3)])
    gc.collect()
    assert len(engine.speculation._guesses) == 0


def test_numbers_that_are_none_after_a_wrong_proposal_fail_nobody(model):
    """Rows that do not count are not looked at."""
    request = asked(words(5, 20), tokens=20)
    answer = tokens(plain(model, request)[0])
    engine = Engine(model)
    Forced(engine, wrong([answer]))
    compute = engine.runner.run

    def spoilt(chunks):
        logits, scores = compute(chunks)
        if chunks[0].proposed.tokens:
            logits = torch.cat([logits[:1], torch.full_like(logits[1:], torch.nan)])
        return Computed(logits, scores)

    engine.runner.run = spoilt
    assert tokens(run(engine, request)[0]) == answer
