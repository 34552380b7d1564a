"""How a model marks what it thinks, and an answer's tokens in, what it thinks and what it says out.

Models with the control tokens [THINK] and [/THINK] (V13 and later) think between them. The first Magistrals write
<think> and </think> as text, which only their template or the system text tells: then an answer that begins with the
mark is a thought up to the other one. Blanks around a thought in text belong to neither thought nor answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import takewhile

from pixtral_cli.prompt.messages import Conversation
from pixtral_cli.prompt.tokenizer import ByteStream, StopMatcher, Tokenizer
from pixtral_cli.prompt.tool_calls import AnswerDelta, ToolCallReader

CONTROLS = ("[THINK]", "[/THINK]"), ("<think>", "</think>")
TEXTS = "<think>", "</think>"
NOTHING = AnswerDelta("")


@dataclass(frozen=True)
class ThoughtMarks:
    """What stands before a thought and after it, control tokens or texts."""

    begin: str
    end: str
    are_controls: bool

    @classmethod
    def controls(cls, tokenizer: Tokenizer) -> ThoughtMarks | None:
        """Those that are control tokens."""
        for begin, end in CONTROLS:
            known = map(tokenizer.controls.get, (begin, end))
            if all(control is not None and control.special for control in known):
                return cls(begin, end, are_controls=True)
        return None

    @classmethod
    def of(cls, tokenizer: Tokenizer, conversation: Conversation, template: str = "") -> ThoughtMarks | None:
        """Those of a model; None where nothing says that it thinks."""
        if (controls := cls.controls(tokenizer)) is not None:
            return controls
        system = [message for message in conversation.messages if message.role == "system"]
        texts = (template, *(message.text for message in system))
        if any(TEXTS[0] in text for text in texts) or any(message.thoughts for message in system):
            return cls(*TEXTS, are_controls=False)
        return None

    def around(self, text: str, closed: bool) -> str:
        """A thought as a template writes it."""
        return self.begin + text + self.end * closed

    def are_open(self, token_ids: list[int], tokenizer: Tokenizer) -> bool:
        """Whether a prompt ends within a thought."""
        if self.are_controls:
            last = next((id for id in reversed(token_ids) if id in tokenizer.special_ids), None)
            return last == tokenizer.control(self.begin)
        tail = list(takewhile(lambda id: id not in tokenizer.special_ids, reversed(token_ids)))
        text = b"".join(tokenizer.token_bytes(id) for id in reversed(tail)).decode("utf-8", "replace")
        return text.rfind(self.begin) > text.rfind(self.end)


class AnswerReader:
    """Takes an answer's tokens one by one; `tokens` counts those that were thoughts, marks included.

    A call of a tool ends a thought that is open, as the end of the answer does.

    Args:
        calls: reads what is no thought.
        marks: None where the model does not think.
        is_open: whether the answer begins within a thought.
        may_think: whether a thought in text may begin the answer, as in one that goes on with nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        calls: ToolCallReader,
        marks: ThoughtMarks | None,
        *,
        is_open: bool = False,
        may_think: bool = True,
    ) -> None:
        self.tokens = 0
        self._tokenizer, self._calls, self._marks = tokenizer, calls, marks
        self._text = ByteStream(tokenizer)
        self._end = StopMatcher([marks.end] if marks else ())  # of a thought in text
        self._thought = _Trimmed()
        self._begun, self._held = "", list[int]()  # an answer that may yet begin with a thought in text, and its tokens
        self._drops_blanks = False  # those after a thought in text
        self._begin_id = self._end_id = -1
        self._push = self._thinking if is_open else self._said
        if marks and marks.are_controls:
            self._begin_id, self._end_id = tokenizer.control(marks.begin), tokenizer.control(marks.end)
        elif marks and may_think and not is_open:
            self._push = self._undecided

    def push(self, token_id: int) -> AnswerDelta:
        """What this token adds to the answer; it may be nothing."""
        return self._push(token_id)

    def finish(self, cut: bool = False) -> AnswerDelta:
        """The rest; `cut` is for `ToolCallReader.finish`."""
        before = NOTHING
        if self._held:
            before = self._said_after_all()
        elif self._push != self._said:
            before = self._close()
        return before.then(self._calls.finish(cut))

    def _said(self, token_id: int) -> AnswerDelta:
        if token_id == self._begin_id:
            self.tokens += 1
            self._text, self._push = ByteStream(self._tokenizer), self._thinking
            return NOTHING
        delta = self._calls.push(token_id)
        if self._drops_blanks:
            delta = delta._replace(text=delta.text.lstrip())
            self._drops_blanks = not (delta.text or delta.calls)
        return delta

    def _thinking(self, token_id: int) -> AnswerDelta:
        if self._calls.begins_call(token_id):
            return self._close().then(self._said(token_id))
        self.tokens += 1
        if token_id == self._end_id:
            return self._close()
        text = self._text.push(token_id)
        return AnswerDelta("", thought=text) if self._end_id >= 0 else self._thought_in_text(text)

    def _thought_in_text(self, text: str) -> AnswerDelta:
        text, ended = self._end.push(text)
        thought = AnswerDelta("", thought=self._thought.push(text))
        if not ended:
            return thought
        self._push = self._said
        said = self._end.rest.lstrip()
        self._drops_blanks = not said
        return thought._replace(text=said)

    def _close(self) -> AnswerDelta:
        """The rest of a thought: what comes now is said."""
        self._push = self._said
        rest = self._text.finish()
        if self._end_id < 0:
            rest = self._thought.push(self._end.push(rest)[0] + self._end.flush())
        return AnswerDelta("", thought=rest)

    def _undecided(self, token_id: int) -> AnswerDelta:
        """At the beginning of an answer, which may be the mark of a thought in text."""
        assert self._marks is not None
        self._held.append(token_id)
        self._begun += self._text.push(token_id)
        seen, begin = self._begun.lstrip(), self._marks.begin
        if seen.startswith(begin):
            self.tokens, self._held, self._push = len(self._held), [], self._thinking
            return self._thought_in_text(seen.removeprefix(begin))
        if begin.startswith(seen) and token_id not in self._tokenizer.special_ids:
            return NOTHING
        return self._said_after_all()

    def _said_after_all(self) -> AnswerDelta:
        self._push = self._said
        held, self._held = self._held, []
        return reduce(AnswerDelta.then, map(self._calls.push, held))


class _Trimmed:
    """Text as it comes, without the blanks at its beginning and end."""

    def __init__(self) -> None:
        self._blanks, self._begun = "", False

    def push(self, text: str) -> str:
        text = (self._blanks + text) if self._begun else text.lstrip()
        shown = text.rstrip()
        self._blanks, self._begun = text[len(shown) :], self._begun or bool(shown)
        return shown
