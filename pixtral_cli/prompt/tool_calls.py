"""Tokens of an answer in, its text and the tool calls in it out: the forms in which Mistral's models write calls.

- "list" (V3, V7): ``[TOOL_CALLS][{"name": …, "arguments": {…}, "id": …}, …]``
- "named with id" (V11): ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}`` for each call
- "named" (V13 and later): ``[TOOL_CALLS]name[ARGS]{…}`` for each call
- "text": the list alone, for vocabularies without the control token; only a forced call can be told from an answer

Source: mistral-common `tokens/tokenizers/instruct.py`.
"""

from __future__ import annotations

import json
from typing import Literal

from pixtral_cli.prompt.tokenizer import ByteStream, Tokenizer
from pixtral_cli.prompt.tools import ID, NAME, ToolCall, new_id

CallForm = Literal["list", "named with id", "named", "text"]
CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
BLANK = " \t\r\n"
DECODER = json.JSONDecoder()


class ToolCallReader:
    """Takes an answer's tokens one by one; what stands before the first call is text, and what is no call as well.

    Args:
        at_start: whether the answer begins a text, as for `ByteStream`.
        reads_calls: whether tools were offered. Without, everything is text.
        only_calls: whether the answer is a forced call, which needs no control token to be known.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, at_start: bool = True, reads_calls: bool = False, only_calls: bool = False
    ) -> None:
        self._tokenizer, self._at_start = tokenizer, at_start
        self._marks = _marks(tokenizer) if reads_calls else {}
        self._stream = ByteStream(tokenizer, at_start=at_start)
        self._calls: list[list[str]] = [[""]] if only_calls else []  # for each [TOOL_CALLS]: text, mark, text, …

    def push(self, token_id: int) -> str:
        """The text that this token adds to the answer; "" within a call."""
        mark = self._marks.get(token_id)
        if mark is None:
            return self._kept(self._stream.push(token_id))
        text = self._kept(self._stream.finish())
        self._stream = ByteStream(self._tokenizer, at_start=self._at_start)
        if mark == CALLS:
            self._calls.append([""])
        elif self._calls:
            self._calls[-1] += [mark, ""]
        return text

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest of the text, and the calls; a call that is malformed is text as the model wrote it."""
        text, calls = self._kept(self._stream.finish()), []
        for parts in self._calls:
            found, left = read_calls(parts)
            calls += found
            text += left
        return text, tuple(calls)

    def _kept(self, text: str) -> str:
        """The text if it is one; within a call it is kept for later."""
        if not self._calls:
            return text
        self._calls[-1][-1] += text
        return ""


def _marks(tokenizer: Tokenizer) -> dict[int, str]:
    return {tokenizer.control(name): name for name in (CALLS, CALL_ID, ARGS) if name in tokenizer.controls}


def read_calls(parts: list[str]) -> tuple[list[ToolCall], str]:
    """What follows one [TOOL_CALLS], cut at its control tokens -> the calls in it, and the text that is none.

    >>> read_calls(["add", "[ARGS]", '{"a": 1}'])[0][0].arguments
    '{"a": 1}'
    """
    try:
        return _named(parts) if ARGS in parts[1::2] else _list(parts[0])
    except (ValueError, RecursionError):
        return [], "".join(parts[::2])


def _named(parts: list[str]) -> tuple[list[ToolCall], str]:
    fields = dict(zip(["name", *parts[1::2]], parts[::2], strict=True))
    id = fields.get(CALL_ID, "").strip(BLANK)
    arguments, end = _value(fields[ARGS], 0)
    call = _checked(fields["name"].strip(BLANK), arguments, id)
    return [call], fields[ARGS][end:].strip(BLANK)


def _list(text: str) -> tuple[list[ToolCall], str]:
    """The calls of a JSON list, or of one object alone, and what follows it."""
    at = _skip(text, 0)
    if not text.startswith("[", at):
        call, at = _entry(text, at)
        return [call], text[at:].strip(BLANK)
    calls: list[ToolCall] = []
    while text[at : at + 1] in ("[", ","):
        try:
            call, end = _entry(text, _skip(text, at + 1))
        except (ValueError, RecursionError):
            if calls:  # the answer was cut off in a later one
                return calls, text[at + 1 :].strip(BLANK)
            raise
        calls.append(call)
        at = _skip(text, end)
    return calls, text[at:].strip(BLANK).removeprefix("]").strip(BLANK)


def _entry(text: str, at: int) -> tuple[ToolCall, int]:
    """One object of a list; each value keeps the spelling that it has."""
    values: dict[str, str] = {}
    at = _expect(text, at, "{") - 1
    while text[at : at + 1] in ("{", ","):
        key, at = _value(text, _expect(text, at + 1, '"') - 1)
        start = _skip(text, _expect(text, at, ":"))
        _, at = _value(text, start)
        values[json.loads(key)] = text[start:at]
        at = _skip(text, at)
    at = _expect(text, at, "}")
    name, id = (json.loads(values.get(field, '""')) for field in ("name", "id"))
    arguments = values.get("arguments", "{}")
    return _checked(name, arguments, id), at


def _value(text: str, at: int) -> tuple[str, int]:
    """The spelling of the JSON value at `at`, and where it ends."""
    start = _skip(text, at)
    _, end = DECODER.raw_decode(text, start)
    return text[start:end], end


def _checked(name: object, arguments: str, id: object) -> ToolCall:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError("a call has a name")
    if not arguments.startswith("{"):
        raise ValueError("arguments are an object")
    return ToolCall(id if isinstance(id, str) and ID.fullmatch(id) else new_id(), name, arguments)


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in BLANK:
        at += 1
    return at


def _expect(text: str, at: int, mark: str) -> int:
    at = _skip(text, at)
    if not text.startswith(mark, at):
        raise ValueError(f"{mark} is missing")
    return at + 1
