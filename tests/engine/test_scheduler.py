"""The scheduler by itself, without a model: who computes how much in each step, and who gives way."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixtral_cli.engine.pages import PageTable
from pixtral_cli.engine.request import Request
from pixtral_cli.engine.scheduler import CHUNK, SHORT_CHUNK, Scheduler
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.model.kv_cache import PAGE


def sequence(number, length, tokens=8):
    ids = tuple(1000 * number + place for place in range(length))  # no two prompts begin alike
    return Sequence(number, Request(ids), tokens, image_token_id=None)


@dataclass
class Run:
    """A scheduler, and a model that chooses token 7 whenever it can choose."""

    scheduler: Scheduler

    def step(self):
        """(id, tokens) of each chunk of one step, which is computed."""
        chunks = self.scheduler.schedule()
        shares = [(chunk.sequence.id, chunk.tokens) for chunk in chunks]
        completed = [chunk.sequence for chunk in chunks if chunk.completes]
        for chunk in chunks:
            self.scheduler.computed(chunk)
        for each in completed:
            each.token_ids.append(7)
            if each.finish_reason:
                self.scheduler.remove(each.id)
        return shares


def started(*sequences, pages=10_000, batch=8, prefill=8, exact=False):
    run = Run(Scheduler(PageTable(pages), batch, prefill, exact))
    for each in sequences:
        run.scheduler.add(each)
    return run


def test_a_prompt_alone_is_computed_in_the_largest_chunks_and_then_token_by_token():
    run = started(sequence(0, 2 * CHUNK + 10, tokens=3))
    assert [run.step() for _ in range(6)] == [[(0, CHUNK)], [(0, CHUNK)], [(0, 10)], [(0, 1)], [(0, 1)], []]


def test_who_decodes_gets_a_token_in_every_step_and_long_prompts_get_short_chunks_meanwhile():
    run = started(sequence(0, 4, tokens=50))
    run.step()
    run.scheduler.add(sequence(1, 3 * SHORT_CHUNK))
    assert [run.step() for _ in range(3)] == [[(0, 1), (1, SHORT_CHUNK)]] * 3
    assert run.step() == [(0, 1), (1, 1)]


def test_prompts_share_a_step_and_who_waited_longest_comes_first():
    run = started(sequence(0, CHUNK + 500), sequence(1, 100), sequence(2, 100))
    assert run.step() == [(0, CHUNK)]
    assert run.step() == [(1, 100), (2, 100), (0, 500)]


def test_no_more_prompts_are_computed_in_one_step_than_asked():
    run = started(*(sequence(number, 10) for number in range(4)), prefill=1)
    assert [len(run.step()) for _ in range(4)] == [1, 2, 3, 4]


def test_more_than_the_batch_wait_and_enter_in_the_order_in_which_they_came():
    run = started(*(sequence(number, 10, tokens=2) for number in range(5)), batch=2)
    steps = [[request_id for request_id, _ in run.step()] for _ in range(6)]
    assert steps == [[0, 1], [0, 1], [2, 3], [2, 3], [4], [4]]


def test_without_a_free_page_the_one_that_came_last_gives_way_and_comes_back():
    run = started(sequence(0, 2 * PAGE, tokens=3 * PAGE), sequence(1, 2 * PAGE, tokens=PAGE), pages=5)
    assert run.step() == [(0, 2 * PAGE), (1, 2 * PAGE)]
    assert run.step() == [(0, 1)], "the fifth page is for who came first"
    assert [each.id for each in run.scheduler.waiting] == [1] and run.scheduler.preemptions == 1
    ended = [run.step() for _ in range(8 * PAGE)]
    assert not run.scheduler.running and not run.scheduler.waiting
    assert ended[-1] == [] and run.scheduler.table.in_use == 0


def test_exactly_a_prompt_is_cut_at_the_same_places_whoever_else_is_there():
    def cuts(*others):
        run, mine = started(sequence(0, 3 * SHORT_CHUNK + 5), *others, exact=True), []
        for _ in range(40):
            mine += [tokens for request_id, tokens in run.step() if request_id == 0]
        return mine[:4]

    alone = [SHORT_CHUNK] * 3 + [5]
    assert cuts() == cuts(sequence(1, 700)) == cuts(sequence(1, 4, 40), sequence(2, 900)) == alone


def test_a_beginning_that_another_computes_is_waited_for_and_then_shared():
    ids = tuple(range(20, 20 + 4 * PAGE + 3))
    first, second = (Sequence(number, Request(ids), 4, None) for number in (0, 1))
    run = started(first, second)
    assert run.step() == [(0, len(ids))]
    assert run.step() == [(0, 1), (1, 3)] and second.cached_tokens == 4 * PAGE


NUMBERS = st.tuples(st.integers(1, 9 * PAGE), st.integers(1, 3 * PAGE), st.integers(0, 60))


@pytest.mark.parametrize("exact", [True, False])
@settings(deadline=None, max_examples=60)
@given(asked=st.lists(NUMBERS, min_size=1, max_size=8), batch=st.integers(1, 5))
def test_whatever_comes_every_request_ends_and_no_page_is_lost(exact, asked, batch):
    run = started(pages=12, batch=batch, exact=exact)
    everyone = [(sequence(number, length, tokens), step) for number, (length, tokens, step) in enumerate(asked)]
    for step in range(3000):
        for each, comes in everyone:
            if comes == step:
                run.scheduler.add(each)
        shares = run.step()
        assert all(tokens > 0 for _, tokens in shares) and len({each for each, _ in shares}) == len(shares)
        if step > 60 and not shares:
            break
    assert all(each.finish_reason == "length" for each, _ in everyone)
    assert run.scheduler.table.in_use == 0 and run.scheduler.table.available == 12
