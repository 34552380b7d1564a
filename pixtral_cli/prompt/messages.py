"""OpenAI-style dictionaries in, a checked Conversation out; knows no template, reads no picture."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pixtral_cli.prompt.errors import InvalidMessages

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
JOIN = "\n\n"
"""Stands between texts that are put together, as in mistral-common's `normalize.py`."""


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Picture:
    source: Any
    """A path, an http(s) or file address, a data: URI, "-" (standard input), bytes, or a PIL.Image."""


Chunk = Text | Picture


@dataclass(frozen=True)
class Message:
    role: str
    chunks: tuple[Chunk, ...]
    is_string: bool = True
    """Whether `content` was a string and not a list: some templates tell the two apart."""

    @property
    def text(self) -> str:
        """Its texts, joined by a blank line."""
        return JOIN.join(chunk.text for chunk in self.chunks if isinstance(chunk, Text))

    @property
    def has_pictures(self) -> bool:
        return any(isinstance(chunk, Picture) for chunk in self.chunks)


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]

    @property
    def pictures(self) -> list[Picture]:
        """Every picture, in the order of the messages."""
        return [chunk for message in self.messages for chunk in message.chunks if isinstance(chunk, Picture)]

    def merged(self, *, apart: Container[str] = ()) -> Conversation:
        """Consecutive messages of one role become one, their texts joined by a blank line; not the roles `apart`."""
        result: list[Message] = []
        for message in self.messages:
            if result and result[-1].role == message.role and message.role not in apart:
                result[-1] = _join(result[-1], message)
            else:
                result.append(message)
        return Conversation(tuple(result))

    def system_first(self) -> Conversation:
        """Every system text in one leading message, then turns that begin with the user's."""
        system = [message for message in self.messages if message.role == "system"]
        turns = [message for message in self.messages if message.role != "system"]
        return Conversation((*system, *user_first(turns))).merged()


def user_first(turns: list[Message]) -> list[Message]:
    """The turns, after an empty one of the user's if they begin with another's."""
    return turns if turns and turns[0].role == "user" else [Message("user", (Text(""),)), *turns]


def parse(messages: Sequence[dict[str, Any]]) -> Conversation:
    """Check OpenAI-style messages.

    Roles are system (or developer), user and assistant. `content` is a string or a list of strings and of
    ``{"type": "text", "text": …}``, ``{"type": "image_url", "image_url": {"url": …} | …}``,
    ``{"type": "image", "image": PIL.Image | …}`` and ``{"type": "image", "url": …}``.

    Raises:
        InvalidMessages: names the entry that is wrong, e.g. ``messages[2].content[1]``.
    """
    if isinstance(messages, (str, bytes, dict)) or not isinstance(messages, Iterable):
        raise InvalidMessages("messages", f"should be a list of messages, not {_kind(messages)}")
    parsed = tuple(_message(entry, f"messages[{index}]") for index, entry in enumerate(messages))
    _check_turns(parsed)
    return Conversation(parsed)


def _check_turns(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidMessages("messages", "the list is empty", "Give at least one user message.")
    if all(message.role != "user" for message in messages):
        raise InvalidMessages("messages", "no message has the role user")
    if messages[-1].role == "assistant":
        where = f"messages[{len(messages) - 1}]"
        raise InvalidMessages(where, "the last message is the assistant's, so there is nothing left to answer")


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise InvalidMessages(where, f"should be an object with role and content, not {_kind(entry)}")
    role = entry.get("role")
    if role == "tool" or entry.get("tool_calls"):
        raise InvalidMessages(where, "tool calls and their results are not supported yet")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidMessages(where, f"the role should be system, user or assistant, not {role!r}")
    message = Message(ROLES[role], *_content(entry.get("content"), where))
    if message.has_pictures and message.role != "user":
        raise InvalidMessages(where, f"only user messages can hold pictures, not {message.role} messages")
    return message


def _content(content: Any, where: str) -> tuple[tuple[Chunk, ...], bool]:
    if isinstance(content, str):
        return (Text(content),), True
    if not isinstance(content, (list, tuple)):
        raise InvalidMessages(where, f"content should be a string or a list, not {_kind(content)}")
    return tuple(_chunk(part, f"{where}.content[{index}]") for index, part in enumerate(content)), False


def _chunk(part: Any, where: str) -> Chunk:
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, dict):
        raise InvalidMessages(where, f"should be an object with a type, not {_kind(part)}")
    kind = part.get("type")
    if kind == "text":
        return _text(part.get("text"), where)
    if kind == "image_url":
        return _picture(part.get("image_url"), where, "image_url")
    if kind == "image":
        key = next((key for key in ("image", "url", "path") if part.get(key) is not None), "image")
        return _picture(part.get(key), where, key)
    raise InvalidMessages(where, f"the type should be text, image_url or image, not {kind!r}")


def _text(text: Any, where: str) -> Text:
    if not isinstance(text, str):
        raise InvalidMessages(where, f"text should be a string, not {_kind(text)}")
    return Text(text)


def _picture(source: Any, where: str, key: str) -> Picture:
    if isinstance(source, dict):
        source = source.get("url")
    is_image = hasattr(source, "convert") and hasattr(source, "size")
    if not (isinstance(source, (str, bytes)) or hasattr(source, "__fspath__") or is_image) or source in ("", b""):
        raise InvalidMessages(where, f"{key} should be a path, an address, bytes or a picture, not {_kind(source)}")
    return Picture(source)


def _join(first: Message, second: Message) -> Message:
    chunks = list(first.chunks)
    rest = list(second.chunks)
    if chunks and rest and isinstance(chunks[-1], Text) and isinstance(rest[0], Text):
        chunks[-1] = Text(JOIN.join(text for text in (chunks[-1].text, rest.pop(0).text) if text))
    return replace(first, chunks=(*chunks, *rest), is_string=first.is_string and second.is_string)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, str) and not value:
        return "an empty string"
    return names.get(type(value), {list: "a list", dict: "an object"}.get(type(value), type(value).__name__))
