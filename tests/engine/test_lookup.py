"""What came after the same tokens before, against a search through all of them."""

import random

from hypothesis import given
from hypothesis import strategies as st

from pixtral_cli.engine.lookup import CHAIN, LONGEST, NOTHING, Lookup

IMAGE = 0


def searched(ids, most):
    """Length of the longest match of the end of `ids` further up, and what came after the latest of that length."""
    best, place = 0, 0
    for at in range(len(ids) - 2, 0, -1):
        length = 0
        while length < LONGEST and at - length >= 0 and ids[at - length] == ids[-1 - length] != IMAGE:
            length += 1
        if length >= 2 and length > best:
            best, place = length, at
    if not best:
        return 0, ()
    followed = ids[place + 1 :]
    tokens = [followed[n % len(followed)] for n in range(most)]
    return best, tuple(tokens[: tokens.index(IMAGE)] if IMAGE in tokens else tokens)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=CHAIN), st.integers(1, 9))
def test_the_longest_match_and_the_latest_of_these_is_what_is_proposed(ids, most):
    found = Lookup(IMAGE).match(ids, len(ids), most)
    length, tokens = searched(ids, most)
    assert found == ((tokens, length) if length else NOTHING)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 9))
def test_token_by_token_it_finds_what_it_finds_at_once(ids, most):
    growing = Lookup(IMAGE)
    found = [growing.match(ids, known, most) for known in range(1, len(ids) + 1)]
    assert found == [Lookup(IMAGE).match(ids[:known], known, most) for known in range(1, len(ids) + 1)]


def test_a_text_that_repeats_itself_goes_on_as_long_as_is_asked():
    assert Lookup(IMAGE).match([7, 1, 2, 3, 1, 2, 3], 7, 5) == ((1, 2, 3, 1, 2), 4 - 1)


def test_tokens_of_images_are_neither_matched_nor_proposed():
    ids = [5, IMAGE, IMAGE, 6, 7, 8, IMAGE, IMAGE]
    assert Lookup(IMAGE).match(ids, len(ids), 4) == NOTHING
    assert Lookup(IMAGE).match([*ids, 6, 7], len(ids) + 2, 4) == ((8,), 2)


def test_a_step_does_not_search_the_whole_text():
    """Its cost is the same after a hundred times as many tokens, whatever repeats."""
    random.seed(1)

    def touched(length):
        ids = Counting([random.choice((3, 4)) for _ in range(length)])
        lookup = Lookup(IMAGE)
        lookup.match(ids, length - 1, 7)
        ids.reads = 0
        lookup.match(ids, length, 7)
        return ids.reads

    assert touched(100_000) <= (2 * CHAIN) * LONGEST + 10


class Counting(list):
    reads = 0

    def __getitem__(self, place):
        self.reads += 1
        return super().__getitem__(place)
