"""Checked turns of a conversation, and the ways to arrange them that templates ask for; knows no JSON and no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pixtral_cli.prompt.image import Detail
from pixtral_cli.prompt.tools import ToolCall

JOIN = "\n\n"
"""Stands between texts that are put together, as in mistral-common's `normalize.py`."""
OTHER = {"user": "assistant", "assistant": "user"}


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Picture:
    source: Any
    """A path, an http(s) or file address, a data: URI, "-" (standard input), bytes, or a PIL.Image."""
    detail: Detail = "auto"
    where: str = field(default="", compare=False)
    """The entry of the messages that names it, e.g. ``messages[2].content[1]``."""


Chunk = Text | Picture


@dataclass(frozen=True)
class Message:
    role: str
    chunks: tuple[Chunk, ...]
    is_string: bool = True
    """Whether `content` was a string and not a list: some templates tell the two apart."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant asked for; the ids are nine letters or digits, whatever the client's were."""
    answers: str = ""
    """The id of the call whose result a tool's message is."""
    name: str = ""
    """The name that a tool's message gives, if it does."""

    @property
    def text(self) -> str:
        """Its texts, joined by a blank line."""
        return JOIN.join(chunk.text for chunk in self.chunks if isinstance(chunk, Text))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(chunk for chunk in self.chunks if isinstance(chunk, Picture))

    @property
    def has_pictures(self) -> bool:
        return bool(self.pictures)


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]

    @property
    def pictures(self) -> list[Picture]:
        """Every picture, in the order of the messages."""
        return [picture for message in self.messages for picture in message.pictures]

    @property
    def has_tool_turns(self) -> bool:
        """Whether tools were called in it."""
        return any(message.tool_calls or message.role == "tool" for message in self.messages)

    @property
    def is_continued(self) -> bool:
        """Whether the answer goes on where the last message, which is the assistant's, ends."""
        return self.messages[-1].role == "assistant"

    def with_sources(self, sources: Sequence[Any]) -> Conversation:
        """The same with other sources of its pictures, in their order."""
        left = iter(sources)

        def changed(chunk: Chunk) -> Chunk:
            return replace(chunk, source=next(left)) if isinstance(chunk, Picture) else chunk

        return Conversation(
            tuple(replace(message, chunks=tuple(map(changed, message.chunks))) for message in self.messages)
        )

    def merged(self, *, apart: Sequence[str] = ()) -> Conversation:
        """Consecutive messages of one role become one, their texts joined by a blank line; not the roles `apart`.

        Nor the results of tools, each of which answers a call of its own.
        """
        result: list[Message] = []
        for message in self.messages:
            if result and result[-1].role == message.role and message.role not in ("tool", *apart):
                result[-1] = _join(result[-1], message)
            else:
                result.append(message)
        return Conversation(tuple(result))

    def system_first(self) -> Conversation:
        """Every system text in one leading message, then turns that begin with the user's."""
        system = [message for message in self.messages if message.role == "system"]
        turns = [message for message in self.messages if message.role != "system"]
        return Conversation((*system, *user_first(turns))).merged()

    def system_in_user(self) -> Conversation:
        """The leading system text stands in the last user turn, as in Mistral's V3: for templates without that role."""
        system, turns = self.messages[:1], list(self.messages[1:])
        last = max((index for index, message in enumerate(turns) if message.role == "user"), default=None)
        if last is None or system[0].role != "system":
            return self
        turns[last] = replace(_join(replace(system[0], role="user"), turns[last]), is_string=turns[last].is_string)
        return Conversation(tuple(turns))

    def alternating(self, filler: str) -> Conversation:
        """With a turn of the text `filler` between neighbouring turns of one role; calls and results are passed over.

        Such neighbours come after a call that was denied, and where the user speaks after a result.
        """
        result: list[Message] = []
        role = "user"
        for message in self.messages:
            if message.role in OTHER and not message.tool_calls:
                if message.role != role:
                    result.append(Message(role, (Text(filler),)))
                role = OTHER[message.role]
            result.append(message)
        return Conversation(tuple(result))

    def pictures_after_results(self) -> Conversation:
        """The pictures that tools gave stand in a turn of the user's, after the results that are neighbours."""
        result: list[Message] = []
        given: tuple[Picture, ...] = ()
        for message in self.messages:
            if message.role != "tool" and given:
                result.append(Message("user", given, is_string=False))
                given = ()
            if message.role == "tool" and message.has_pictures:
                given += message.pictures
                message = replace(message, chunks=tuple(c for c in message.chunks if isinstance(c, Text)))
            result.append(message)
        return Conversation((*result, *([Message("user", given, is_string=False)] if given else [])))


def user_first(turns: list[Message]) -> list[Message]:
    """The turns, after an empty one of the user's if they begin with another's."""
    return turns if turns and turns[0].role == "user" else [Message("user", (Text(""),)), *turns]


def _join(first: Message, second: Message) -> Message:
    chunks, rest = first.chunks, second.chunks
    if chunks and rest and isinstance(last := chunks[-1], Text) and isinstance(then := rest[0], Text):
        joined = Text(JOIN.join(text for text in (last.text, then.text) if text))
        chunks, rest = (*chunks[:-1], joined), rest[1:]
    calls = first.tool_calls + second.tool_calls
    return replace(first, chunks=(*chunks, *rest), is_string=first.is_string and second.is_string, tool_calls=calls)
