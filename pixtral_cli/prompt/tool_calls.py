"""Tokens of an answer in, its text and the tool calls in it out: the forms in which Mistral's models write calls.

- "list" (V3, V7): ``[TOOL_CALLS][{"name": …, "arguments": {…}, "id": …}, …]``
- "named with id" (V11): ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}`` for each call
- "named" (V13 and later): ``[TOOL_CALLS]name[ARGS]{…}`` for each call
- "text": the list alone, for vocabularies without the control token; only a forced call can be told from an answer

Source: mistral-common `tokens/tokenizers/instruct.py`. `ToolCallReader` knows tokens, `_CallParser` only their text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pixtral_cli.prompt.tokenizer import ByteStream, Tokenizer
from pixtral_cli.prompt.tools import ID, NAME, ToolCall, new_id

CallForm = Literal["list", "named with id", "named", "text"]
CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
BLANK = " \t\r\n"
Steps = Generator[None, None, Any]


def call_marks(tokenizer: Tokenizer) -> dict[str, int]:
    """The control tokens that belong to calls and are in the vocabulary: name -> id."""
    return {name: tokenizer.control(name) for name in (CALLS, CALL_ID, ARGS) if name in tokenizer.controls}


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of call number `index`: the first has its id and name, each later one more of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class AnswerDelta(NamedTuple):
    """What a token adds to an answer."""

    text: str
    calls: tuple[ToolCallDelta, ...] = ()


def joined(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """The calls whose pieces these are.

    >>> pieces = ToolCallDelta(0, "abcdefghi", "add"), ToolCallDelta(0, arguments="{"), ToolCallDelta(0, arguments="}")
    >>> joined(pieces)
    (ToolCall(id='abcdefghi', name='add', arguments='{}'),)
    """
    heads: list[ToolCallDelta] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        if delta.name is not None:
            heads.append(delta)
            arguments.append([])
        arguments[delta.index].append(delta.arguments)
    return tuple(
        ToolCall(head.id or "", head.name or "", "".join(pieces)) for head, pieces in zip(heads, arguments, strict=True)
    )


def whole_deltas(calls: Iterable[ToolCall]) -> list[ToolCallDelta]:
    """Each call as one piece."""
    return [ToolCallDelta(index, call.id, call.name, call.arguments) for index, call in enumerate(calls)]


class ToolCallReader:
    """Takes an answer's tokens one by one; what stands before the first call is text, and what is no call as well.

    A call is told as soon as its name is known and its arguments begin, and they are told as they come, as the model
    spells them. From then on it is a call, whatever becomes of its arguments; what is malformed before that is text,
    as the model wrote it. A list may give an id after the arguments: that is too late, and the call has a new one.

    Args:
        at_start: whether the answer begins a text, as for `ByteStream`.
        reads_calls: whether tools were offered. Without, everything is text.
        only_calls: whether the answer is a forced call, which needs no control token to be known.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, at_start: bool = True, reads_calls: bool = False, only_calls: bool = False
    ) -> None:
        self._tokenizer, self._at_start = tokenizer, at_start
        self._marks = {id: name for name, id in call_marks(tokenizer).items()} if reads_calls else {}
        self._stream = ByteStream(tokenizer, at_start=at_start)
        self._parser = _CallParser() if reads_calls or only_calls else None
        if self._parser and only_calls:
            self._parser.begin()

    def push(self, token_id: int) -> AnswerDelta:
        """What this token adds to the answer; it may be nothing."""
        if self._parser is None:
            return AnswerDelta(self._stream.push(token_id))
        mark = self._marks.get(token_id)
        if mark is None:
            self._parser.push(self._stream.push(token_id))
        else:
            self._parser.push(self._stream.finish())
            self._stream = ByteStream(self._tokenizer, at_start=self._at_start)
            self._parser.begin() if mark == CALLS else self._parser.mark(mark)
        return self._parser.take()

    def finish(self, cut: bool = False) -> AnswerDelta:
        """The rest.

        `cut`: the answer was cut off, and not ended by the model. A call whose name is known is then told, with what
        there is of its arguments; one whose name is not whole is dropped. Neither leaves anything in the text.
        """
        if self._parser is None:
            return AnswerDelta(self._stream.finish())
        self._parser.push(self._stream.finish())
        self._parser.end(cut)
        return self._parser.take()


class _ControlToken(ValueError):
    """A control token, where only a name or an id may be before one."""


class _CallParser:
    """Reads what follows each [TOOL_CALLS]: a block.

    The reading of a block is one generator, which stops wherever it needs more. ValueError says that it is malformed.
    """

    def __init__(self) -> None:
        self._steps: Steps | None = None  # None outside of a block, where all is text
        self._piece, self._at = "", 0  # what was pushed last, and how far it is read
        self._held: list[str] = []  # with self._piece[self._start:], what is neither told nor yet known to be text
        self._start = 0
        self._head: dict[str, Any] = {}  # what is known of a call that is not told yet, and its arguments
        self._early: list[str] = []
        self._told = False
        self._count = 0
        self._drops_blanks = False
        self._text: list[str] = []
        self._deltas: list[ToolCallDelta] = []

    def take(self) -> AnswerDelta:
        """What was found since the last time."""
        delta = AnswerDelta("".join(self._text), tuple(self._deltas))
        self._text.clear()
        self._deltas.clear()
        return delta

    def begin(self) -> None:
        """Here stands [TOOL_CALLS]."""
        self.end(cut=False)
        self._expect_call()
        self._drops_blanks = False
        self._piece, self._at, self._start = "", 0, 0
        self._steps = self._block()
        next(self._steps)

    def push(self, text: str) -> None:
        if self._steps is None:
            self._say(text)
        elif text:
            self._held.append(self._piece[self._start :])
            self._piece, self._at, self._start = text, 0, 0
            self._run(self._steps.send, None)

    def mark(self, name: str) -> None:
        """Here stands another control token."""
        if self._steps is not None:
            self._run(self._steps.throw, _ControlToken(name))

    def end(self, cut: bool) -> None:
        """Nothing more comes in this block."""
        if self._steps is None:
            return
        if cut and not self._told and "name" in self._head:
            self._tell()
        if cut:
            self._settle()  # in the middle of a call, or of the list
        self._say_held()

    def _run(self, step: Callable[[Any], None], sent: Any) -> None:
        try:
            step(sent)
        except (StopIteration, ValueError, RecursionError):
            self._say_held()

    def _say_held(self) -> None:
        """The block is over: what was held is text."""
        self._steps = None
        self._held.append(self._piece[self._start :])
        self._say("".join(self._held))
        self._held.clear()

    def _say(self, text: str) -> None:
        if self._drops_blanks:
            text = text.lstrip(BLANK)
            self._drops_blanks = not text
        self._text.append(text)

    def _settle(self) -> None:
        """What was read so far will not be text."""
        self._held.clear()
        self._start = self._at

    def _expect_call(self) -> None:
        self._head, self._early, self._told = {}, [], False

    def _know(self, field: str, value: object) -> None:
        """Of a call that may be told; what comes later changes nothing."""
        if self._told:
            return
        if field == "name" and not (isinstance(value, str) and NAME.fullmatch(value)):
            raise ValueError("a call has a name")
        self._head[field] = value
        if self._early and "name" in self._head:
            self._tell()
            self._add("".join(self._early))

    def _tell(self) -> None:
        if "name" not in self._head:
            raise ValueError("a call has a name")
        id = self._head.get("id")
        id = id if isinstance(id, str) and ID.fullmatch(id) else new_id()
        self._deltas.append(ToolCallDelta(self._count, id, self._head["name"]))
        self._count += 1
        self._told = self._drops_blanks = True
        self._settle()

    def _add(self, arguments: str) -> None:
        self._deltas.append(ToolCallDelta(self._count - 1, arguments=arguments))
        self._settle()

    def _block(self) -> Steps:
        first = yield from self._next()
        if first == "[":
            self._at += 1
            yield from self._entry()
            while (yield from self._one_of(",]")) == ",":
                self._settle()
                self._expect_call()
                yield from self._entry()
        elif first == "{":
            yield from self._entry()
        else:
            yield from self._named()
        self._settle()

    def _named(self) -> Steps:
        name, mark = yield from self._until_mark()
        self._know("name", name)
        if mark == CALL_ID:
            id, mark = yield from self._until_mark()
            self._know("id", id)
        if mark != ARGS:
            raise ValueError("a call has arguments")
        yield from self._arguments()

    def _until_mark(self) -> Steps:
        """The name or id that ends at the next control token, and that token."""
        text = ""
        try:
            while True:
                text = (text + self._piece[self._at :]).lstrip(BLANK)
                self._at = len(self._piece)
                if text and not NAME.fullmatch(text.rstrip(BLANK)):
                    raise ValueError("no name and no id")
                yield
        except _ControlToken as mark:
            return text.rstrip(BLANK), mark.args[0]

    def _entry(self) -> Steps:
        """One object of a list."""
        yield from self._one_of("{")
        while True:
            key = yield from self._value()
            if not isinstance(key, str):
                raise ValueError("a key is a string")
            yield from self._one_of(":")
            if key == "arguments":
                yield from self._arguments()
            else:
                self._know(key, (yield from self._value()))
            if (yield from self._one_of(",}")) == "}":
                break
        if not self._told:
            self._tell()
            self._add("{}")
        self._settle()

    def _arguments(self) -> Steps:
        """Told as they come, or, where a list gives them before the name, kept until it is known."""
        if (yield from self._next()) != "{":
            raise ValueError("arguments are an object")
        if self._told or self._early:
            raise ValueError("a call has its arguments once")
        if "name" in self._head:
            self._tell()
        yield from self._spelled(self._add if self._told else self._early.append)

    def _value(self) -> Steps:
        """The JSON value that stands here."""
        spelled: list[str] = []
        if (yield from self._next()) in '"[{':
            yield from self._spelled(spelled.append)
        else:
            while (char := (yield from self._char())) not in ",:]}" + BLANK:
                spelled.append(char)
                self._at += 1
        return json.loads("".join(spelled))

    def _spelled(self, take: Callable[[str], None]) -> Steps:
        """One JSON string, list or object, given to `take` in pieces: up to the quote or bracket that closes it."""
        depth, quoted, escaped, open = 0, False, False, True
        while open:
            yield from self._char()
            begin = self._at
            while open and self._at < len(self._piece):
                char = self._piece[self._at]
                self._at += 1
                if escaped:
                    escaped = False
                elif quoted:
                    escaped, quoted = char == "\\", char != '"'
                else:
                    quoted = char == '"'
                    depth += (char in "[{") - (char in "]}")
                open = quoted or depth > 0
            take(self._piece[begin : self._at])

    def _one_of(self, chars: str) -> Steps:
        """The next character, read, which is one of these."""
        char = yield from self._next()
        if char not in chars:
            raise ValueError(f"one of {chars} is missing")
        self._at += 1
        return char

    def _next(self) -> Steps:
        """The next character that is no blank, which is not read yet."""
        while (char := (yield from self._char())) in BLANK:
            self._at += 1
        return char

    def _char(self) -> Steps:
        """The next character, which is not read yet."""
        while self._at == len(self._piece):
            yield
        return self._piece[self._at]
