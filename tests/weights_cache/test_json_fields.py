"""What a JSON object from anywhere may hold, and how what is wrong in it is said."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from weights_cache.errors import CheckpointCorrupt, LfsPointer, Unreadable
from weights_cache.json_fields import CheckpointFields, Fields, NotAnObject, load_object, read_json_object

ODD = [None, True, False, 0, -1, 1, 2.5, 2**31, 10**400, float("nan"), float("inf"), "", "x", [], [1], {}, {"a": 1}]
GOOD = {
    "size": lambda value: type(value) is int and 0 < value < 2**31,
    "number": lambda value: type(value) in (int, float) and 0 < value <= sys.float_info.max,
    "flag": lambda value: type(value) is bool,
    "text": lambda value: type(value) is str,
    "object": lambda value: type(value) is dict,
}


@dataclass(frozen=True)
class Told(Fields):
    def wrong(self, key: str, wanted: str) -> Exception:
        return KeyError(f"{key} should be {wanted}")


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_value_of_another_kind_is_the_error_of_the_caller(kind: str, value: object):
    fields = Told({"key": value})
    if GOOD[kind](value):
        assert getattr(fields, kind)("key") == value
    else:
        with pytest.raises(KeyError, match="key should be"):
            getattr(fields, kind)("key")


@pytest.mark.parametrize("values", [{}, {"key": None}], ids=["absent", "null"])
def test_an_absent_key_gives_the_default_or_is_said_to_be_missing(values: dict):
    fields = CheckpointFields(values, Path("config.json"), "text.")
    assert fields.size("key", 3) == 3 and fields.flag("key", False) is False and "key" not in fields
    with pytest.raises(CheckpointCorrupt, match=r"config\.json is damaged: it does not say 'text\.key'"):
        fields.size("key")


def test_an_error_names_file_key_and_value():
    fields = CheckpointFields({"layers": "many" * 100}, Path("config.json"), "text.")
    with pytest.raises(CheckpointCorrupt, match=r"its 'text\.layers' is 'many.{,60}' and not a positive whole number"):
        fields.size("layers")


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (b'{"a": 1, "a": 2}', ValueError, "'a' occurs twice"),
        (b'{"a": {"b": 1, "b": 1}}', ValueError, "'b' occurs twice"),
        (b"[" * 100_000, ValueError, "nested too deeply"),
        (b'{"a": ', ValueError, "line 1"),
        (b"\xff\xfe", ValueError, "utf-8"),
        (b"[]", NotAnObject, "a list"),
        (b'"{}"', NotAnObject, "a string"),
        (b"null", NotAnObject, "null"),
        (b"3", NotAnObject, "a number"),
        (b"true", NotAnObject, "true or false"),
    ],
)
def test_what_is_no_object_is_refused_with_the_reason(text: bytes, kind: type[Exception], said: str):
    with pytest.raises(kind, match=said):
        load_object(text)


def test_a_byte_order_mark_is_passed_over():
    assert load_object(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path):
    with pytest.raises(Unreadable, match="cannot be read"):
        read_json_object(tmp_path / "absent.json")
    pointer = tmp_path / "config.json"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(LfsPointer):
        read_json_object(pointer)
