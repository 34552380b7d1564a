"""One table says what an option may be, to flags, Python and HTTP."""

import math

import pytest

from pixtral_cli.generation_options import OPTION_RANGES, Range


def test_both_ends_are_in_and_what_is_beyond_is_not():
    assert all(value in Range(0, 1) for value in (0, 0.5, 1, 1.0))
    assert not any(value in Range(0, 1) for value in (-0.001, 1.001, -1, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "1", None, [1]])
def test_what_is_no_finite_number_is_in_no_range(value):
    assert not any(value in each for each in OPTION_RANGES.values())


def test_a_whole_range_has_whole_numbers_only():
    assert 5 in Range(-1, whole=True) and 5.0 not in Range(-1, whole=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Range(0, 1), "from 0 to 1"),
        (Range(0), "0 or above"),
        (Range(-1, whole=True), "a whole number, -1 or above"),
        (Range(0.001, 1000), "from 0.001 to 1000"),
    ],
)
def test_a_range_reads_as_a_sentence_does(given, said):
    assert str(given) == said
