"""Stop strings are found in the same place however the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pixtral_cli.prompt.tokenizer import StopMatcher

texts = st.text("abc", max_size=20)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By trying every end of the text in turn."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher, shown, stopped = StopMatcher(stops), "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
    return shown + ("" if stopped else matcher.flush()), stopped


@given(texts, stop_lists)
def test_a_text_in_one_piece_ends_at_the_stop_that_is_complete_first(text, stops):
    assert run([text], stops) == expected(text, stops)


@given(texts, stop_lists, st.data())
def test_every_chunking_gives_the_same_text(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(pieces, stops) == expected(text, stops)


@given(texts, stop_lists)
def test_only_a_possible_beginning_of_a_stop_is_held_back(text, stops):
    shown, stopped = StopMatcher(stops).push(text)
    held = text[len(shown) :]
    assert stopped or not held or any(stop.startswith(held) for stop in stops)


def test_nothing_is_shown_after_a_stop():
    matcher = StopMatcher(["."])
    assert [matcher.push("a. b"), matcher.push("c"), matcher.flush()] == [("a", True), ("", True), ""]


def test_an_empty_stop_string_stops_nothing():
    assert StopMatcher([""]).push("abc") == ("abc", False)
