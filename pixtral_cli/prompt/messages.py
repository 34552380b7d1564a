"""OpenAI-style messages in, a checked Conversation out, and the ways to arrange one that templates ask for.

Knows no template and no tokens, and reads no image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, get_args

from pixtral_cli.prompt.errors import InvalidMessages
from pixtral_cli.prompt.image import Detail
from pixtral_cli.prompt.media import ADDRESS, is_image
from pixtral_cli.prompt.tools import NAME, NAME_RULE, ToolCall, as_json, fitting_id

JOIN = "\n\n"
"""Stands between texts that are put together, as in mistral-common's `normalize.py`."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
PARTS = {
    "text": ("text", "content"),
    "refusal": ("refusal",),
    "image": ("image", "url", "path", "base64"),
    "image_url": ("image_url",),
    "thinking": ("thinking",),
}
"""The type of a part -> the keys under which its text or picture may stand, as OpenAI, transformers and Mistral have
them."""
KINDS: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
GIVE_RESULTS = "Give the result of each call in a message of the role tool, or leave the calls out."
OTHER = {"user": "assistant", "assistant": "user"}


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    source: Any
    """A path, an http(s) or file address, a data: URI, "-" (standard input), bytes, or a PIL.Image."""
    detail: Detail = "auto"
    where: str = field(default="", compare=False)
    """The entry of the messages that names it, e.g. ``messages[2].content[1]``."""


@dataclass(frozen=True)
class ThinkPart:
    """What was thought before an answer, or how to think, in a system message."""

    text: str
    closed: bool = True
    """False for a thought that is to go on."""


Part = TextPart | ImagePart | ThinkPart


@dataclass(frozen=True)
class Message:
    role: str
    parts: tuple[Part, ...]
    is_string: bool = True
    """Whether `content` was a string and not a list: some templates tell the two apart."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant asked for; the ids are nine letters or digits, whatever the client's were."""
    call_id: str = ""
    """The id of the call whose result a tool's message is."""
    name: str = ""
    """The name that a tool's message gives, if it does."""

    @property
    def text(self) -> str:
        """Its texts, joined by a blank line."""
        return JOIN.join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ImagePart))

    @property
    def thoughts(self) -> tuple[ThinkPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ThinkPart))


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]

    @property
    def images(self) -> list[ImagePart]:
        """Every image, in the order of the messages."""
        return [image for message in self.messages for image in message.images]

    @property
    def is_continued(self) -> bool:
        """Whether the answer goes on where the last message, which is the assistant's, ends."""
        return self.messages[-1].role == "assistant"

    def with_sources(self, sources: Sequence[Any]) -> Conversation:
        """The same with other sources of its images, in their order."""
        left = iter(sources)

        def changed(part: Part) -> Part:
            return replace(part, source=next(left)) if isinstance(part, ImagePart) else part

        return Conversation(
            tuple(replace(message, parts=tuple(map(changed, message.parts))) for message in self.messages)
        )

    def merged(self, *, apart: Sequence[str] = ()) -> Conversation:
        """Consecutive messages of one role become one, their texts joined by a blank line; not the roles `apart`.

        Nor the results of tools, each of which answers a call of its own.
        """
        groups: list[list[Message]] = []
        for message in self.messages:
            if groups and groups[-1][0].role == message.role and message.role not in ("tool", *apart):
                groups[-1].append(message)
            else:
                groups.append([message])
        return Conversation(tuple(_joined(group) for group in groups))

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
        turns[last] = replace(_joined((replace(system[0], role="user"), turns[last])), is_string=turns[last].is_string)
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
                    result.append(Message(role, (TextPart(filler),)))
                role = OTHER[message.role]
            result.append(message)
        return Conversation(tuple(result))

    def images_after_results(self) -> Conversation:
        """The pictures that tools gave stand in a turn of the user's, after the results that are neighbours."""
        result: list[Message] = []
        for are_results, group in groupby(self.messages, key=lambda message: message.role == "tool"):
            messages = list(group)
            images = tuple(image for message in messages for image in message.images) if are_results else ()
            if images:
                texts = [tuple(part for part in message.parts if isinstance(part, TextPart)) for message in messages]
                messages = [replace(message, parts=parts) for message, parts in zip(messages, texts, strict=True)]
                messages.append(Message("user", images, is_string=False))
            result += messages
        return Conversation(tuple(result))


def user_first(turns: list[Message]) -> list[Message]:
    """The turns, after an empty one of the user's if they begin with another's."""
    return turns if turns and turns[0].role == "user" else [Message("user", (TextPart(""),)), *turns]


def _joined(messages: Sequence[Message]) -> Message:
    """One message of them all: of texts that meet, one. In time proportional to their length, however many they are."""
    joined: list[list[Part]] = []  # what becomes one part
    for message in messages:
        for place, part in enumerate(message.parts):
            if place == 0 and joined and isinstance(part, TextPart) and isinstance(joined[-1][0], TextPart):
                joined[-1].append(part)
            else:
                joined.append([part])
    return replace(
        messages[0],
        parts=tuple(group[0] if len(group) == 1 else _one_text(group) for group in joined),
        is_string=all(message.is_string for message in messages),
        tool_calls=tuple(call for message in messages for call in message.tool_calls),
    )


def _one_text(parts: Iterable[Part]) -> TextPart:
    return TextPart(JOIN.join(part.text for part in parts if isinstance(part, TextPart) and part.text))


def parse(messages: Sequence[dict[str, Any]] | Conversation) -> Conversation:
    """Check OpenAI-style messages; a Conversation is returned as it is.

    Roles are system (or developer), user, assistant and tool. `content` is a string or a list of strings and of parts:
    ``{"type": "text", "text": …}`` (or "content", as in transformers' examples), ``{"type": "refusal", "refusal": …}``,
    ``{"type": "image_url", "image_url": {"url": …} | …}`` and ``{"type": "image", KEY: …}`` with the key image, url,
    path or base64. The user's messages and those of tools can hold pictures; a `detail` of "low" beside the address
    has one scaled to at most 512 pixels a side. Other keys, such as a message's `name` or a part's `cache_control`,
    change nothing.

    An assistant's content can be null or absent beside `tool_calls`, ``[{"id": …, "type": "function", "function":
    {"name": …, "arguments": JSON text or object}}]``, and beside a `refusal`, which then is its text. A tool's message
    says by `tool_call_id` which call it answers. The older `function_call` of an assistant is a call as well, and the
    role function, by its `name`, gives the result of the latest call of that function.

    What an assistant thought stands in its `reasoning_content` (or `reasoning`), or in parts of the content, as in
    Mistral's API: ``{"type": "thinking", "thinking": text or list of text parts, "closed": …}``. Messages of the system
    can have such parts too: they show how to think.

    A last message of the assistant's is to be continued, with or without ``"prefix": true``. No message needs to be
    the user's: one of the system alone is a conversation.

    Raises:
        InvalidMessages: names the entry that is wrong, e.g. ``messages[2].content[1]``.
    """
    if isinstance(messages, Conversation):
        return messages
    if isinstance(messages, (str, bytes, dict)) or not isinstance(messages, Iterable):
        raise InvalidMessages("messages", f"should be a list of messages, not {_kind(messages)}")
    parsed: list[Message] = []
    ids: set[str] = set()
    latest: dict[str, str] = {}  # of each function, the id of its last call
    for index, entry in enumerate(messages):
        parsed.append(_message(entry, f"messages[{index}]", ids, latest))
        ids |= {call.id for call in parsed[-1].tool_calls}
        latest |= {call.name: call.id for call in parsed[-1].tool_calls}
    if not parsed:
        raise InvalidMessages("messages", "the list is empty", "Give at least one user message.")
    for index in range(len(parsed) - 1, -1, -1):  # the assistant's last messages are one, which is continued
        if parsed[index].role != "assistant":
            break
        if parsed[index].tool_calls:
            raise InvalidMessages(f"messages[{index}]", "the last calls have no results", GIVE_RESULTS)
    return Conversation(tuple(parsed))


def _message(entry: Any, where: str, ids: AbstractSet[str], latest: Mapping[str, str]) -> Message:
    if not isinstance(entry, dict):
        raise InvalidMessages(where, f"should be an object with role and content, not {_kind(entry)}")
    role = entry.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidMessages(where, f"the role should be system, user, assistant or tool, not {_quoted(role)}")
    calls = _calls(entry, role, where)
    parts, is_string = _content(entry, role, bool(calls), where)
    answered = _answered(entry, where, ids, latest) if ROLES[role] == "tool" else ()
    message = Message(ROLES[role], parts, is_string, calls, *answered)
    if message.images and message.role not in ("user", "tool"):
        raise InvalidMessages(where, f"only messages of users and tools can hold pictures, not {message.role} messages")
    if message.thoughts and message.role not in ("assistant", "system"):
        raise InvalidMessages(where, f"only assistants and systems have thoughts, not {message.role} messages")
    return message


def _calls(entry: dict[str, Any], role: str, where: str) -> tuple[ToolCall, ...]:
    calls, older = entry.get("tool_calls"), entry.get("function_call")
    if not calls and not older:
        return ()
    if role != "assistant":
        raise InvalidMessages(where, f"only the assistant makes tool calls, not the {role}")
    if not calls:
        place = f"{where}.function_call"
        if not isinstance(older, dict):
            raise InvalidMessages(place, "should be an object with name and arguments")
        return (_call({"id": place, "function": older}, place, place),)
    if not isinstance(calls, list | tuple):
        raise InvalidMessages(f"{where}.tool_calls", f"should be a list, not {_kind(calls)}")
    places = (f"{where}.tool_calls[{index}]" for index in range(len(calls)))
    return tuple(_call(call, place, f"{place}.function") for call, place in zip(calls, places, strict=True))


def _call(call: Any, where: str, function_where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type") not in (None, "function"):
        raise InvalidMessages(where, 'should be an object with id, the type "function", and function')
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidMessages(f"{function_where}.name", f"should be {NAME_RULE}")
    text = "" if arguments is None else as_json(arguments) if isinstance(arguments, dict) else arguments
    if not isinstance(text, str):
        raise InvalidMessages(f"{function_where}.arguments", "should be JSON text or an object")
    return ToolCall(_id(call, "id", where), name, text)


def _answered(entry: dict[str, Any], where: str, ids: AbstractSet[str], latest: Mapping[str, str]) -> tuple[str, str]:
    """The id of the call whose result this is, and the name that is given."""
    name = entry.get("name") or ""
    if not isinstance(name, str):
        raise InvalidMessages(f"{where}.name", f"should be a string, not {_kind(name)}")
    if entry["role"] == "function":
        if name not in latest:
            raise InvalidMessages(f"{where}.name", "no message before it calls a function of that name")
        return latest[name], name
    id = _id(entry, "tool_call_id", where)
    if id not in ids:
        raise InvalidMessages(f"{where}.tool_call_id", "no message before it makes a call of that id")
    return id, name


def _id(entry: dict[str, Any], key: str, where: str) -> str:
    id = entry.get(key)
    if not isinstance(id, str) or not id:
        raise InvalidMessages(where, f"{key} should be a text that is not empty")
    return fitting_id(id)


def _content(entry: dict[str, Any], role: str, has_calls: bool, where: str) -> tuple[tuple[Part, ...], bool]:
    """The parts, thoughts first, and whether the content was a string. A refusal, a thought, calls and the result of a
    function can have no content."""
    content = entry.get("content")
    thoughts = _reasoning(entry, where) if role == "assistant" else ()
    if content is None and role == "assistant":
        content = entry.get("refusal")
    if content is None and (has_calls or thoughts or role == "function"):
        content = ""
    if isinstance(content, str):
        return (*thoughts, TextPart(content)), True
    if not isinstance(content, (list, tuple)):
        raise InvalidMessages(where, f"content should be a string or a list, not {_kind(content)}")
    parts = tuple(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if thoughts and any(isinstance(part, ThinkPart) for part in parts):
        raise InvalidMessages(where, "its thoughts stand in the content and beside it", "Give them once.")
    return (*thoughts, *parts), False


def _reasoning(entry: dict[str, Any], where: str) -> tuple[ThinkPart, ...]:
    """What stands under either of the two names that clients have for a thought."""
    given = {name: entry[name] for name in ("reasoning_content", "reasoning") if entry.get(name) not in (None, "")}
    for name, text in given.items():
        if not isinstance(text, str):
            raise InvalidMessages(f"{where}.{name}", f"should be a string, not {_kind(text)}")
    if len(set(given.values())) > 1:
        raise InvalidMessages(where, "reasoning_content and reasoning mean the same, and differ", "Give one of them.")
    return tuple(ThinkPart(text) for text in set(given.values()))


def _part(part: Any, where: str) -> Part:
    if isinstance(part, str):
        return TextPart(part)
    if not isinstance(part, dict):
        raise InvalidMessages(where, f"should be an object with a type, not {_kind(part)}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in PARTS:
        raise InvalidMessages(where, f"the type should be text, thinking, image_url or image, not {_quoted(kind)}")
    key = next((key for key in PARTS[kind] if part.get(key) is not None), PARTS[kind][0])
    if kind.startswith("image"):
        return _image(key, part.get(key), part.get("detail"), where)
    if kind == "thinking":
        return _thought(part.get(key), part.get("closed"), where)
    if not isinstance(part.get(key), str):
        raise InvalidMessages(where, f"{key} should be a string, not {_kind(part.get(key))}")
    return TextPart(part[key])


def _thought(thinking: Any, closed: Any, where: str) -> ThinkPart:
    """Mistral's API has a list of text parts where mistral-common has a string."""
    if isinstance(thinking, list | tuple):
        inner = [_part(part, f"{where}.thinking[{index}]") for index, part in enumerate(thinking)]
        if not all(isinstance(part, TextPart) for part in inner):
            raise InvalidMessages(f"{where}.thinking", "should hold texts alone")
        thinking = "".join(part.text for part in inner if isinstance(part, TextPart))
    if not isinstance(thinking, str):
        raise InvalidMessages(where, f"thinking should be a string or a list of texts, not {_kind(thinking)}")
    if not isinstance(closed, bool | None):
        raise InvalidMessages(where, "closed should be true or false")
    return ThinkPart(thinking, closed is not False)


def _image(key: str, source: Any, detail: Any, where: str) -> ImagePart:
    if isinstance(source, dict):
        source, detail = source.get("url"), source.get("detail")
    is_source = isinstance(source, str | bytes) or hasattr(source, "__fspath__") or is_image(source)
    if not is_source or source in ("", b""):
        raise InvalidMessages(where, f"{key} should be a path, an address, bytes or a picture, not {_kind(source)}")
    if isinstance(source, str):
        if ADDRESS.match(source):  # the name of a file keeps its blanks
            source = source.strip()
        if key == "base64" and not source.startswith("data:"):
            source = f"data:;base64,{source}"
    if detail not in (None, *get_args(Detail)):
        raise InvalidMessages(where, f"detail should be auto, low or high, not {_quoted(detail)}")
    return ImagePart(source, detail or "auto", where)


def _quoted(value: Any) -> str:
    """A short word as it is, else what kind of value it is."""
    return repr(value) if isinstance(value, str) and 0 < len(value) <= 60 else _kind(value)


def _kind(value: Any) -> str:
    return "an empty string" if isinstance(value, str) and not value else KINDS.get(type(value), type(value).__name__)
