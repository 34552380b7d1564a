"""One thread for a small pass, all of them for a large one, and the user's own number always."""

import pytest
import torch

from pixtral_cli import Pixtral
from pixtral_cli.model.threads import SMALL_PASS, USERS_OWN, threads_for


@pytest.fixture
def two_threads(monkeypatch):
    for name in USERS_OWN:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def within(work):
    with threads_for(work):
        return torch.get_num_threads()


def test_a_small_pass_has_one_thread_and_a_large_one_has_all(two_threads):
    assert (within(SMALL_PASS - 1), within(SMALL_PASS)) == (1, 2)


def test_afterwards_there_are_as_many_as_before_even_if_the_pass_fails(two_threads):
    with pytest.raises(RuntimeError), threads_for(1):
        raise RuntimeError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", USERS_OWN)
def test_the_number_that_the_user_sets_wins(two_threads, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert within(1) == 2


def test_the_built_in_model_decodes_on_one_thread_and_reads_a_long_prompt_on_all(two_threads):
    model = Pixtral.load("tiny")
    passes = []
    count = lambda module, args: passes.append((len(args[0]), torch.get_num_threads()))  # noqa: E731
    model.engine.model.language_model.register_forward_pre_hook(count)
    model.complete("What shape is it? " * 20, max_new_tokens=3, ignore_eos=True)
    assert passes[0][0] > 32 and [threads for _, threads in passes] == [2, 1, 1]
