"""OpenAI-style dictionaries in, a checked Conversation out; knows no template, reads no picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pixtral_cli.prompt.errors import InvalidMessages
from pixtral_cli.prompt.image import Detail
from pixtral_cli.prompt.tools import NAME, NAME_RULE, ToolCall, fitting_id

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
JOIN = "\n\n"
"""Stands between texts that are put together, as in mistral-common's `normalize.py`."""


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Picture:
    source: Any
    """A path, an http(s) or file address, a data: URI, "-" (standard input), bytes, or a PIL.Image."""
    detail: Detail = "auto"


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
    def has_pictures(self) -> bool:
        return any(isinstance(chunk, Picture) for chunk in self.chunks)


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]

    @property
    def pictures(self) -> list[Picture]:
        """Every picture, in the order of the messages."""
        return [chunk for message in self.messages for chunk in message.chunks if isinstance(chunk, Picture)]

    @property
    def has_tool_turns(self) -> bool:
        """Whether tools were called in it."""
        return any(message.tool_calls or message.role == "tool" for message in self.messages)

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


def user_first(turns: list[Message]) -> list[Message]:
    """The turns, after an empty one of the user's if they begin with another's."""
    return turns if turns and turns[0].role == "user" else [Message("user", (Text(""),)), *turns]


def parse(messages: Sequence[dict[str, Any]]) -> Conversation:
    """Check OpenAI-style messages.

    Roles are system (or developer), user, assistant and tool. `content` is a string or a list of strings and of
    ``{"type": "text", "text": …}``, ``{"type": "image_url", "image_url": {"url": …} | …}``,
    ``{"type": "image", "image": PIL.Image | …}`` and ``{"type": "image", "url": …}``; a `detail` of "low" beside the
    address has the picture scaled to at most 512 pixels a side. An assistant's can be null or
    absent beside `tool_calls`, ``[{"id": …, "type": "function", "function": {"name": …, "arguments": JSON text or
    object}}]``; a tool's message says by `tool_call_id` which of them it answers.

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
    _check_results(messages)


def _check_results(messages: Sequence[Message]) -> None:
    called: set[str] = set()
    for index, message in enumerate(messages):
        called.update(call.id for call in message.tool_calls)
        if message.role == "tool" and message.answers not in called:
            raise InvalidMessages(f"messages[{index}].tool_call_id", "no message before it makes a call of that id")


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise InvalidMessages(where, f"should be an object with role and content, not {_kind(entry)}")
    role = entry.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidMessages(where, f"the role should be system, user, assistant or tool, not {role!r}")
    calls = _calls(entry.get("tool_calls"), role, where)
    content = entry.get("content")
    chunks = _content("" if content is None and calls else content, where)
    message = Message(ROLES[role], *chunks, calls, *(_answered(entry, where) if role == "tool" else ()))
    if message.has_pictures and message.role != "user":
        raise InvalidMessages(where, f"only user messages can hold pictures, not {message.role} messages")
    return message


def _calls(calls: Any, role: str, where: str) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    if role != "assistant":
        raise InvalidMessages(where, f"only the assistant makes tool calls, not the {role}")
    if not isinstance(calls, list | tuple):
        raise InvalidMessages(f"{where}.tool_calls", f"should be a list, not {_kind(calls)}")
    return tuple(_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls))


def _call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise InvalidMessages(where, 'should be an object with id, the type "function", and function')
    name, arguments = function.get("name"), function.get("arguments", "")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidMessages(f"{where}.function.name", f"should be {NAME_RULE}")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise InvalidMessages(f"{where}.function.arguments", "should be JSON text or an object")
    return ToolCall(_id(call, "id", where), name, arguments)


def _answered(entry: dict[str, Any], where: str) -> tuple[str, str]:
    name = entry.get("name") or ""
    if not isinstance(name, str):
        raise InvalidMessages(f"{where}.name", f"should be a string, not {_kind(name)}")
    return _id(entry, "tool_call_id", where), name


def _id(entry: dict[str, Any], key: str, where: str) -> str:
    id = entry.get(key)
    if not isinstance(id, str) or not id:
        raise InvalidMessages(where, f"{key} should be a text that is not empty")
    return fitting_id(id)


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
        return _picture(part, where, "image_url")
    if kind == "image":
        key = next((key for key in ("image", "url", "path") if part.get(key) is not None), "image")
        return _picture(part, where, key)
    raise InvalidMessages(where, f"the type should be text, image_url or image, not {kind!r}")


def _text(text: Any, where: str) -> Text:
    if not isinstance(text, str):
        raise InvalidMessages(where, f"text should be a string, not {_kind(text)}")
    return Text(text)


def _picture(part: dict[str, Any], where: str, key: str) -> Picture:
    """`detail` stands beside the address, wherever that is."""
    source, detail = part.get(key), part.get("detail")
    if isinstance(source, dict):
        source, detail = source.get("url"), source.get("detail")
    is_image = hasattr(source, "convert") and hasattr(source, "size")
    if not (isinstance(source, (str, bytes)) or hasattr(source, "__fspath__") or is_image) or source in ("", b""):
        raise InvalidMessages(where, f"{key} should be a path, an address, bytes or a picture, not {_kind(source)}")
    if detail not in (None, *get_args(Detail)):
        raise InvalidMessages(where, f"detail should be auto, low or high, not {str(detail)[:40]!r}")
    return Picture(source, detail or "auto")


def _join(first: Message, second: Message) -> Message:
    chunks = list(first.chunks)
    rest = list(second.chunks)
    if chunks and rest and isinstance(chunks[-1], Text) and isinstance(rest[0], Text):
        chunks[-1] = Text(JOIN.join(text for text in (chunks[-1].text, rest.pop(0).text) if text))
    calls = first.tool_calls + second.tool_calls
    return replace(
        first, chunks=(*chunks, *rest), is_string=first.is_string and second.is_string, tool_calls=calls
    )


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, str) and not value:
        return "an empty string"
    return names.get(type(value), {list: "a list", dict: "an object"}.get(type(value), type(value).__name__))
