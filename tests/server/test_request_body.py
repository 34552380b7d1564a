"""Bodies are read as JSON in the strict sense, and what could hurt is refused."""

import json

import pytest

from pixtral_cli.server.errors import ApiError
from pixtral_cli.server.request_body import parse_json


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": [1, -2.5, "\\ud83d\\ude00", null, true], "b": {}}',
        '{"é": "日本"}'.encode(),
        b' {"a": 9223372036854775807}',
    ],
)
def test_json_is_what_python_reads(body):
    assert parse_json(body) == json.loads(body)


def test_json_may_be_nested_64_deep_and_no_deeper():
    assert parse_json(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}")
    with pytest.raises(ApiError, match="64 levels"):
        parse_json(b'{"a":' + b"[" * 64 + b"]" * 64 + b"}")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": "\n"}', "not JSON"),
        (b"[1]", "a JSON object"),
        (b"null", "a JSON object"),
        (b'{"temperature": NaN}', "not finite"),
        (b'{"temperature": -Infinity}', "not finite"),
        (b'{"temperature": 1e999}', "not finite"),
        (b'{"seed": 9223372036854775808}', "64 bits"),
        (b'{"seed": ' + b"9" * 100_000 + b"}", "64 bits"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": [{"b": 1, "\\u0062": 2}]}', "twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "64 levels"),
        (b'{"a": ' + b"[" * 500_000, "64 levels"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "64 levels"),
        (b'{"a": [' + b"[]," * 3_000_000 + b"1]}", "too many values"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else value,
)
def test_json_that_could_hurt_is_400_with_a_sentence(body, said):
    with pytest.raises(ApiError, match=said) as caught:
        parse_json(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_body_of_100_000_messages_is_parsed():
    messages = [{"role": "user", "content": "hi"}] * 100_000
    assert parse_json(json.dumps({"messages": messages}).encode())["messages"] == messages
