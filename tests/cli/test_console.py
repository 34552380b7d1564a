"""What the console makes of a command's result."""

import pytest

from pixtral_cli.cli.console import counted, table


@pytest.mark.parametrize(
    ("rows", "align", "lines"),
    [
        ([("a", "long", "x"), ("bcd", "e", "y")], "<", ["a    long  x", "bcd  e     y"]),
        ([("a", 10, 7), ("bcd", 2, 200)], "<>", ["a    10    7", "bcd   2  200"]),
        ([("a", 10, "last"), ("bcd", 200, "")], "<><", ["a     10  last", "bcd  200  "]),
        ([("only",)], "<", ["only"]),
    ],
)
def test_a_column_is_as_wide_as_its_widest_cell(rows, align, lines):
    assert table(rows, align) == lines


def test_numbers_agree_with_their_nouns():
    assert [counted(number, "token") for number in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
    assert [counted(number, "patch", "patches") for number in (1, 3)] == ["1 patch", "3 patches"]
