"""One thread for a small pass and on a busy machine, all of them for a large one, and the user's own number always."""

import time

import pytest
import torch

from pixtral_cli import Pixtral
from pixtral_cli.model import load
from pixtral_cli.model.kernels import native
from pixtral_cli.model.pass_threads import FEW_ROWS, SMALL_PASS, TIMES_ALONE, USERS_OWN, PassThreads, WatchedThreads


@pytest.fixture
def two_threads(monkeypatch):
    for name in USERS_OWN:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def by_torch(monkeypatch):
    """As on a machine where the library in C does not compute."""
    monkeypatch.setattr(native, "available", lambda: False)


@pytest.fixture
def clock(monkeypatch):
    """The clocks of the module, in seconds; a test moves them."""
    clock = {"perf_counter": 0.0, "thread_time": 0.0, "monotonic": 100.0}
    for name in clock:
        monkeypatch.setattr(time, name, lambda name=name: clock[name])
    return clock


def threads_of(passes, rows, multiplications=SMALL_PASS, work=lambda: None):
    with passes.chosen(rows, multiplications):
        work()
        return torch.get_num_threads()


def run(clock, own):
    """What a pass of a second does to the clocks if its thread runs for `own` of it."""

    def work():
        clock["perf_counter"] += 1
        clock["thread_time"] += own

    return work


def test_a_small_pass_has_one_thread_and_a_large_one_has_all(two_threads, by_torch):
    assert [threads_of(PassThreads(), 2, each) for each in (SMALL_PASS // 2 - 1, SMALL_PASS // 2)] == [1, 2]


def test_a_pass_that_others_kept_waiting_is_followed_by_passes_with_one_thread_for_a_while(
    two_threads, by_torch, clock
):
    passes = PassThreads()
    assert threads_of(passes, 1, work=run(clock, 0.95)) == threads_of(passes, 1, work=run(clock, 0.5)) == 2
    assert threads_of(passes, 1, work=run(clock, 0.5)) == 1
    clock["monotonic"] += TIMES_ALONE  # the slow pass took a second
    assert threads_of(passes, 1, work=run(clock, 0.95)) == threads_of(passes, 1) == 2


def test_a_prompt_has_all_threads_on_a_busy_machine_too(two_threads, clock):
    passes = PassThreads()
    threads_of(passes, 1, work=run(clock, 0.1))
    assert threads_of(passes, FEW_ROWS + 1) == 2


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
@pytest.mark.parametrize("exact", [False, True])
def test_where_the_library_multiplies_a_few_rows_its_threads_do_and_one_of_torchs(two_threads, exact):
    passes, seen = PassThreads(exact), []
    assert threads_of(passes, FEW_ROWS, work=lambda: seen.append(native.threads())) == 1 and seen == [2]
    assert threads_of(passes, FEW_ROWS + 1) == 2


def test_where_bits_are_promised_the_clock_decides_nothing(two_threads, by_torch, clock):
    passes = PassThreads(exact=True)
    threads_of(passes, 1, work=run(clock, 0.1))
    assert threads_of(passes, 1) == 2


def test_afterwards_there_are_as_many_as_before_even_if_the_pass_fails(two_threads):
    with pytest.raises(RuntimeError), PassThreads().chosen(1, 1):
        raise RuntimeError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", USERS_OWN)
def test_the_number_that_the_user_sets_wins(two_threads, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert threads_of(PassThreads(), 1, 1) == 2


def test_the_built_in_model_decodes_on_one_thread_and_reads_a_long_prompt_on_all(two_threads):
    model = Pixtral.load("tiny")
    passes = []
    count = lambda module, args: passes.append((len(args[0]), torch.get_num_threads()))  # noqa: E731
    model.engine.model.language_model.register_forward_pre_hook(count)
    model.complete("What shape is it? " * 20, max_new_tokens=3, ignore_eos=True)
    assert passes[0][0] > 32 and [threads for _, threads in passes] == [2, 1, 1]


def test_encoding_has_one_thread_while_other_programs_use_the_cores(two_threads, monkeypatch):
    seen = []
    convert = load._converted
    monkeypatch.setattr(load, "_converted", lambda *args: seen.append(torch.get_num_threads()) or convert(*args))
    monkeypatch.setattr(load, "ENCODING_THREADS", WatchedThreads(alone_until=float("inf")))
    Pixtral.load("tiny", quantization_encoding="q4_0")
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
