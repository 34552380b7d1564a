"""The table of pages, against a plain model of what each page must be."""

import hashlib
from collections import deque
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from pixtral_cli.engine.pages import PageKeys, PageTable
from pixtral_cli.engine.request import ImageInput, Request
from pixtral_cli.model.kv_cache import PAGE

PAGES = 12
IMAGE = 10


@given(st.data())
def test_a_page_is_never_two_things_at_once_and_none_is_lost(data):
    table = PageTable(PAGES)
    held, named = [], {}
    for number in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["take", "name", "share", "release"]))
        if action == "take":
            wanted, available = data.draw(st.integers(1, 5)), table.available
            taken = table.take(wanted, data.draw(st.none() | st.integers(0, PAGES - 1)))
            assert (taken is None) == (wanted > available)
            if taken is not None:
                assert len(set(taken)) == wanted and not set(taken) & {page for pages in held for page in pages}
                held.append(taken)
                named = {key: page for key, page in named.items() if page not in taken}
        elif action == "name" and held:
            page = data.draw(st.sampled_from(held[-1]))
            if page not in named.values():
                key = bytes([number])
                table.name(page, key)
                named[key] = page
        elif action == "share" and named:
            key = data.draw(st.sampled_from(sorted(named)))
            assert table.known([key]) == [named[key]]
            table.share([named[key]])
            held.append([named[key]])
        elif action == "release" and held:
            table.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        in_use = {page for pages in held for page in pages}
        assert table.in_use == len(in_use) and table.available == PAGES - len(in_use)
        assert all(table.known([key]) == [page] for key, page in named.items())


def test_a_sequence_grows_in_one_piece_while_there_is_room():
    table = PageTable(100)
    first, second = table.take(3), table.take(3)
    for _ in range(8):
        first += table.take(1, first[-1])
        second += table.take(1, second[-1])
    for pages in (first, second):
        assert pages == list(range(pages[0], pages[0] + 11))


def test_what_was_unused_for_longest_goes_first_and_the_end_of_a_prompt_before_its_beginning():
    table = PageTable(6)
    old, new = table.take(3), table.take(3)
    for place, page in enumerate(old + new):
        table.name(page, bytes([place]))
    table.release(old)
    table.release(new)
    table.take(2)
    assert [len(table.known([bytes([place])])) for place in range(6)] == [1, 0, 0, 1, 1, 1]


def test_no_more_unused_pages_stay_known_than_asked():
    table = PageTable(10, most_unused=3)
    pages = table.take(6)
    for place, page in enumerate(pages):
        table.name(page, bytes([place]))
    table.release(pages)
    assert [len(table.known([bytes([place])])) for place in range(6)] == [1, 1, 1, 0, 0, 0]
    assert table.available == 10 and len(table.take(10)) == 10


def test_pages_that_are_written_are_not_many_more_than_are_needed_at_once():
    """What was written once takes memory for good, and known pages come to lie between the free ones."""
    random, table, running, written = Random(5), PageTable(10_000, most_unused=500), deque(), set()
    for number in range(3000):
        pages = table.take(random.choice([1, 2, 5, 40]))
        pages += [page for _ in range(3) for page in table.take(1, pages[-1])]
        for place, page in enumerate(pages):
            table.name(page, f"{number} {place}".encode())
        written.update(pages)
        running.append(pages)
        if len(running) > 10:
            table.release(running.popleft())
    assert len(written) < 1.6 * (500 + 11 * 43)


def picture(text, features):
    return ImageInput(hashlib.sha256(text.encode()).digest(), features, lambda: None)


def keys(ids, *pictures, salt=b""):
    made = PageKeys(Request(tuple(ids), images=pictures, cache_salt=salt), IMAGE)
    made.extend(ids, len(ids) // PAGE)
    return made.keys


def test_pages_are_alike_up_to_the_first_difference_in_text_picture_or_salt():
    words, shown = list(range(20, 20 + PAGE)), [IMAGE] * 3 * PAGE
    ids = words + shown + words
    a, b, c = picture("a", PAGE), picture("b", 2 * PAGE), picture("c", 2 * PAGE)
    base = keys(ids, a, b)
    assert len(set(base)) == len(base) == 5
    assert keys(ids[: 2 * PAGE], a) == base[:2]
    other = keys(ids, a, c)
    assert [x == y for x, y in zip(base, other, strict=True)] == [True, True, False, False, False]
    assert not set(base) & set(keys(ids, a, b, salt=b"x"))
    changed = [*ids[:-1], 99]
    assert [x == y for x, y in zip(base, keys(changed, a, b), strict=True)] == [True] * 4 + [False]


def test_two_pictures_within_one_page_both_count():
    ids = [IMAGE] * 8 + [7] + [IMAGE] * 7
    a, b, c = (picture(name, size) for name, size in (("a", 8), ("b", 7), ("c", 7)))
    assert keys(ids, a, b) != keys(ids, a, c) != keys(ids, c, b)
