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
    """A part of call number `index`: the first has its id and name, each later one more of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class AnswerDelta(NamedTuple):
    """What a token adds to an answer."""

    text: str
    calls: tuple[ToolCallDelta, ...] = ()
    thought: str = ""

    def then(self, other: AnswerDelta) -> AnswerDelta:
        """Both as one."""
        return AnswerDelta(self.text + other.text, self.calls + other.calls, self.thought + other.thought)


def joined(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """The calls that these deltas make up.

    >>> deltas = ToolCallDelta(0, "abcdefghi", "add"), ToolCallDelta(0, arguments="{"), ToolCallDelta(0, arguments="}")
    >>> joined(deltas)
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
        ToolCall(head.id or "", head.name or "", "".join(parts)) for head, parts in zip(heads, arguments, strict=True)
    )


def whole_deltas(calls: Iterable[ToolCall]) -> list[ToolCallDelta]:
    """Each call as one delta."""
    return [ToolCallDelta(index, call.id, call.name, call.arguments) for index, call in enumerate(calls)]


class ToolCallReader:
    """Takes an answer's tokens one by one; what stands before the first call is text, and what is no call as well.

    A call starts as soon as its name is known and its arguments begin, which are given as they come, as the model
    spells them. From then on it is a call, whatever becomes of its arguments; what is malformed before that is text,
    as the model wrote it. A list may have an id after the arguments: that is too late, and the call has a new one.

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

    def begins_call(self, token_id: int) -> bool:
        """Whether the token is the mark before a call."""
        return self._marks.get(token_id) == CALLS

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
            if mark == CALLS:
                self._parser.begin()
            else:
                self._parser.control(mark)
        return self._parser.take()

    def finish(self, cut: bool = False) -> AnswerDelta:
        """The rest.

        `cut`: the answer was cut off, and not ended by the model. A call whose name is known is then given, with what
        there is of its arguments; one whose name is not whole is dropped. Neither leaves anything in the text.
        """
        if self._parser is None:
            return AnswerDelta(self._stream.finish())
        self._parser.push(self._stream.finish())
        self._parser.end(cut)
        return self._parser.take()


class _ControlToken(ValueError):
    """A control token, which only a name or an id may stand before."""


class _CallParser:
    """Reads what follows each [TOOL_CALLS], a block, in chunks of text that are cut anywhere.

    The reading of a block is one generator, which yields wherever it needs more text. In it ValueError says that the
    block is malformed: what is not yet part of a call then becomes text.
    """

    def __init__(self) -> None:
        self._steps: Steps | None = None  # the reading of a block; None outside of one, where all is text
        self._chunk, self._position = "", 0  # what was pushed last, and how far it is read
        self._uncommitted: list[str] = []  # earlier chunks that may become text,
        self._committed = 0  # as may the last one from here on
        self._known: dict[str, Any] = {}  # name and id of the call that is read, as far as they have come
        self._early_arguments: list[str] = []  # those that came before the name
        self._started = False  # whether its first delta is out
        self._count = 0  # of calls that have started
        self._drops_blanks = False  # those after a call
        self._text: list[str] = []
        self._deltas: list[ToolCallDelta] = []

    def take(self) -> AnswerDelta:
        """What was found since the last call of this."""
        delta = AnswerDelta("".join(self._text), tuple(self._deltas))
        self._text.clear()
        self._deltas.clear()
        return delta

    def begin(self) -> None:
        """Here stands [TOOL_CALLS]."""
        self.end(cut=False)
        self._next_call()
        self._drops_blanks = False
        self._chunk, self._position, self._committed = "", 0, 0
        self._steps = self._block()
        next(self._steps)

    def push(self, text: str) -> None:
        if self._steps is None:
            self._add_text(text)
        elif text:
            self._uncommitted.append(self._chunk[self._committed :])
            self._chunk, self._position, self._committed = text, 0, 0
            self._run(self._steps.send, None)

    def control(self, name: str) -> None:
        """Here stands another control token of calls."""
        if self._steps is not None:
            self._run(self._steps.throw, _ControlToken(name))

    def end(self, cut: bool) -> None:
        """Nothing more comes in this block."""
        if self._steps is None:
            return
        if cut and not self._started and "name" in self._known:
            self._start_call()
        if cut:
            self._commit()  # in the middle of a call, or of the list
        self._give_back()

    def _run(self, step: Callable[[Any], None], sent: Any) -> None:
        try:
            step(sent)
        except (StopIteration, ValueError, RecursionError):
            self._give_back()

    def _give_back(self) -> None:
        """The block is over: what is not committed is text."""
        self._steps = None
        self._uncommitted.append(self._chunk[self._committed :])
        self._add_text("".join(self._uncommitted))
        self._uncommitted.clear()

    def _add_text(self, text: str) -> None:
        if self._drops_blanks:
            text = text.lstrip(BLANK)
            self._drops_blanks = not text
        self._text.append(text)

    def _commit(self) -> None:
        """What was read so far is part of a call and will not be text."""
        self._uncommitted.clear()
        self._committed = self._position

    def _next_call(self) -> None:
        self._known, self._early_arguments, self._started = {}, [], False

    def _set(self, field: str, value: object) -> None:
        """A field of the call; once it is started, what comes later changes nothing."""
        if self._started:
            return
        if field == "name" and not (isinstance(value, str) and NAME.fullmatch(value)):
            raise ValueError("a call has a name")
        self._known[field] = value
        if self._early_arguments and "name" in self._known:
            self._start_call()
            self._add_arguments("".join(self._early_arguments))

    def _start_call(self) -> None:
        if "name" not in self._known:
            raise ValueError("a call has a name")
        id = self._known.get("id")
        id = id if isinstance(id, str) and ID.fullmatch(id) else new_id()
        self._deltas.append(ToolCallDelta(self._count, id, self._known["name"]))
        self._count += 1
        self._started = self._drops_blanks = True
        self._commit()

    def _add_arguments(self, arguments: str) -> None:
        self._deltas.append(ToolCallDelta(self._count - 1, arguments=arguments))
        self._commit()

    def _block(self) -> Steps:
        first = yield from self._peek_visible()
        if first == "[":
            self._position += 1
            yield from self._listed_call()
            while (yield from self._expect(",]")) == ",":
                self._commit()
                self._next_call()
                yield from self._listed_call()
        elif first == "{":
            yield from self._listed_call()
        else:
            yield from self._named_call()
        self._commit()

    def _named_call(self) -> Steps:
        name, mark = yield from self._until_control()
        self._set("name", name)
        if mark == CALL_ID:
            id, mark = yield from self._until_control()
            self._set("id", id)
        if mark != ARGS:
            raise ValueError("a call has arguments")
        yield from self._arguments()

    def _until_control(self) -> Steps:
        """The name or id that ends at the next control token, and that token."""
        text = ""
        try:
            while True:
                text = (text + self._chunk[self._position :]).lstrip(BLANK)
                self._position = len(self._chunk)
                if text and not NAME.fullmatch(text.rstrip(BLANK)):
                    raise ValueError("no name and no id")
                yield
        except _ControlToken as mark:
            return text.rstrip(BLANK), mark.args[0]

    def _listed_call(self) -> Steps:
        """One object of a list, or alone."""
        yield from self._expect("{")
        while True:
            key = yield from self._value()
            if not isinstance(key, str):
                raise ValueError("a key is a string")
            yield from self._expect(":")
            if key == "arguments":
                yield from self._arguments()
            else:
                self._set(key, (yield from self._value()))
            if (yield from self._expect(",}")) == "}":
                break
        if not self._started:
            self._start_call()
            self._add_arguments("{}")
        self._commit()

    def _arguments(self) -> Steps:
        """Given as they come, or, where a list has them before the name, kept until it is known."""
        if (yield from self._peek_visible()) != "{":
            raise ValueError("arguments are an object")
        if self._started or self._early_arguments:
            raise ValueError("a call has its arguments once")
        if "name" in self._known:
            self._start_call()
        yield from self._json_text(self._add_arguments if self._started else self._early_arguments.append)

    def _value(self) -> Steps:
        """The JSON value that stands here."""
        spelled: list[str] = []
        if (yield from self._peek_visible()) in '"[{':
            yield from self._json_text(spelled.append)
        else:
            while (char := (yield from self._peek())) not in ",:]}" + BLANK:
                spelled.append(char)
                self._position += 1
        return json.loads("".join(spelled))

    def _json_text(self, take: Callable[[str], None]) -> Steps:
        """Give one JSON string, list or object to `take` as it comes, up to the quote or bracket that closes it."""
        depth, quoted, escaped, open = 0, False, False, True
        while open:
            yield from self._peek()
            begin = self._position
            while open and self._position < len(self._chunk):
                char = self._chunk[self._position]
                self._position += 1
                if escaped:
                    escaped = False
                elif quoted:
                    escaped, quoted = char == "\\", char != '"'
                else:
                    quoted = char == '"'
                    depth += (char in "[{") - (char in "]}")
                open = quoted or depth > 0
            take(self._chunk[begin : self._position])

    def _expect(self, chars: str) -> Steps:
        """Read the next character that is no blank, which must be one of these."""
        char = yield from self._peek_visible()
        if char not in chars:
            raise ValueError(f"one of {chars} is missing")
        self._position += 1
        return char

    def _peek_visible(self) -> Steps:
        """The next character that is no blank. It is not read yet."""
        while (char := (yield from self._peek())) in BLANK:
            self._position += 1
        return char

    def _peek(self) -> Steps:
        """The next character. It is not read yet."""
        while self._position == len(self._chunk):
            yield
        return self._chunk[self._position]
