"""Tokens of an answer in, its text and the tool calls in it out: the forms in which Mistral's models write calls.

- "list" (V3, V7): ``[TOOL_CALLS][{"name": …, "arguments": {…}, "id": …}, …]``
- "named with id" (V11): ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}`` for each call
- "named" (V13 and later): ``[TOOL_CALLS]name[ARGS]{…}`` for each call
- "text": the list alone, for vocabularies without the control token; only a forced call can be told from an answer

Source: mistral-common `tokens/tokenizers/instruct.py`.
"""

from __future__ import annotations

from typing import Literal

from pixtral_cli.prompt.call_parser import ARGS, CALL_ID, CallParser, Read
from pixtral_cli.prompt.tokenizer import ByteStream, Tokenizer

CallForm = Literal["list", "named with id", "named", "text"]
CALLS = "[TOOL_CALLS]"


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
        self._parser = CallParser()
        if only_calls:
            self._parser.begin()

    def push(self, token_id: int) -> Read:
        """What this token adds to the answer; it may be nothing."""
        mark = self._marks.get(token_id)
        if mark is None:
            self._parser.push(self._stream.push(token_id))
        else:
            self._parser.push(self._stream.finish())
            self._stream = ByteStream(self._tokenizer, at_start=self._at_start)
            self._parser.begin() if mark == CALLS else self._parser.mark(mark)
        return self._parser.take()

    def finish(self, cut: bool = False) -> Read:
        """The rest.

        `cut`: the answer was cut off, and not ended by the model. A call whose name is known is then told, with what
        there is of its arguments; one whose name is not whole is dropped. Neither leaves anything in the text.
        """
        self._parser.push(self._stream.finish())
        self._parser.end(cut)
        return self._parser.take()


def call_marks(tokenizer: Tokenizer) -> dict[str, int]:
    """The control tokens that belong to calls and are in the vocabulary: name -> id."""
    return {name: tokenizer.control(name) for name in (CALLS, CALL_ID, ARGS) if name in tokenizer.controls}
