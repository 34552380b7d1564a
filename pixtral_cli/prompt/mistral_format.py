"""A conversation in, token ids by Mistral's own rules out, one mark per image; knows no Jinja and no pixels.

Source: mistral-common `protocol/instruct/normalize.py` and `tokens/tokenizers/instruct.py`. V1 writes [INST] as text,
and the system text into the first user message; V2 and V3 (Pixtral-12B, NeMo) write that into the last one, V7 and
later have a message for it. Tools stand before the last user message, from V13 on before the first, and in V15 the
model's settings after them. How calls are written is in `tool_calls.py`, how thoughts are in `thoughts.py`. An
assistant's last message is continued: it has no end, as with mistral-common's `prefix`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from pixtral_cli.prompt.errors import PartRefused
from pixtral_cli.prompt.messages import JOIN, Conversation, ImagePart, Message, Part, TextPart, ThinkPart, user_first
from pixtral_cli.prompt.model_settings import ModelSettings
from pixtral_cli.prompt.thoughts import ThoughtMarks
from pixtral_cli.prompt.tokenizer import TextOrId, Tokenizer
from pixtral_cli.prompt.tool_calls import ARGS, CALL_ID, CALLS, CallForm
from pixtral_cli.prompt.tools import Tool, ToolCall, value_of

NEEDED = ("[INST]", "[/INST]")
FOR_TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", CALLS, "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
PLAIN = 1
"""The version in which [INST] is text."""
PIXTRAL = 3
"""The version of Pixtral-12B. Below: the first versions with a rule."""
CALL_IDS = 3
"""Calls have ids, and none is forgotten when the user speaks again."""
SYSTEM_MESSAGES = 7
"""System messages stand by themselves."""
NAMED_CALLS = 11
"""Calls are no JSON list, and results come in the order of their calls."""
TOOLS_FIRST = 13
"""Tools stand before the first user message, and calls have no ids."""
TEXTS_TOUCH = 15
"""Nothing stands between the texts of one message."""
RESULTS_SHOW = 15
"""Results can hold images."""
SETTINGS = 15
"""Prompts tell the model's settings, and a system message shows no thought."""


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the control tokens for tools as well."""
    return can_chat(tokenizer) and tokenizer.version != PLAIN and all(name in tokenizer.controls for name in FOR_TOOLS)


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the control tokens that the rules need."""
    needed = () if tokenizer.version == PLAIN else NEEDED
    return all(name in tokenizer.controls for name in needed) and tokenizer.eos_id is not None


@dataclass
class MistralFormat:
    """Mistral's chat rules of one version, with a tokenizer."""

    tokenizer: Tokenizer
    template: str | None = None
    """A template that came with the model, which these rules stand in for: it tells their version."""

    @property
    def version(self) -> int:
        """Of the rules: what the checkpoint's template shows, else what tekken.json says, else Pixtral's.

        A template shows it by the way in which it writes system texts. The vocabulary tells nothing: mistral-common
        names the control tokens of V7 in those of V3 as well. Pixtral-12B, NeMo, Ministral-8B and the 7B models are V3;
        later models come with a tekken.json or a template.
        """
        template, written = self.template, self.tokenizer.version
        if template is None or "system" not in template.lower():
            return written or PIXTRAL
        return max(SYSTEM_MESSAGES, written or 0) if "[SYSTEM_PROMPT]" in template else PIXTRAL

    @property
    def call_form(self) -> CallForm:
        """How the model writes its calls of tools."""
        if CALLS not in self.tokenizer.controls:
            return "text"
        if self.version < NAMED_CALLS:
            return "list"
        return "named with id" if self.version < TOOLS_FIRST else "named"

    def arranged(self, conversation: Conversation) -> Conversation:
        """The conversation as `encode` takes it: all messages, and images, in the order in which they are written."""
        if self.version < RESULTS_SHOW:
            conversation = conversation.images_after_results()
        messages = conversation.merged(apart=("system",)).messages
        return Conversation(_results_in_order(messages) if self.version >= NAMED_CALLS else messages)

    def thought_marks(self, conversation: Conversation) -> ThoughtMarks | None:
        """How the model marks its thoughts in this conversation; None where it has none."""
        return ThoughtMarks.of(self.tokenizer, conversation, self.template or "")

    def encode(
        self, conversation: Conversation, tools: Sequence[Tool] = (), settings: ModelSettings | None = None
    ) -> list[int]:
        """Token ids of an `arranged` conversation, up to where the answer begins; every image is one image token.

        Raises:
            PartRefused: tools in V1, a thought in a system message of V15.
            EffortUnknown: the model has no such reasoning effort.
        """
        marks = self.thought_marks(conversation)
        messages = [self._with_thoughts(message, marks) for message in conversation.messages]
        system = ""
        if self.version < SYSTEM_MESSAGES:
            texts = [self._joined(message.parts) for message in messages if message.role == "system"]
            system = JOIN.join(text for text in texts if text)
            messages = user_first([message for message in messages if message.role != "system"])
        elif tools and all(message.role != "user" for message in messages):  # tools need one to stand before
            start = 1 if messages[0].role == "system" else 0
            messages = messages[:start] + user_first(messages[start:])
        users = [index for index, message in enumerate(messages) if message.role == "user"] or [-1]
        parts: list[TextOrId] = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        first, last = users[0], users[-1]
        for index, message in enumerate(messages):
            if index == (first if self.version >= TOOLS_FIRST else last):
                parts += self._tools(tools) + self._settings(settings or ModelSettings())
            if self.version >= CALL_IDS or index > last or not (message.tool_calls or message.role == "tool"):
                parts += self._message(message, system if index == (first if self.version == PLAIN else last) else "")
        return self.tokenizer.encode_with_controls(parts[:-1] if conversation.is_continued else parts, apart=True)

    def _settings(self, settings: ModelSettings) -> list[TextOrId]:
        told = self.tokenizer.settings_rules.built(settings) if self.version >= SETTINGS else {}
        return self._between("[MODEL_SETTINGS]", [_json(told)], "[/MODEL_SETTINGS]") if told else []

    def _tools(self, tools: Sequence[Tool]) -> list[TextOrId]:
        if not tools or not knows_tools(self.tokenizer):
            return []
        return self._between("[AVAILABLE_TOOLS]", [_json([tool.described for tool in tools])], "[/AVAILABLE_TOOLS]")

    def _message(self, message: Message, system: str) -> list[TextOrId]:
        if message.role == "system":
            if message.thoughts and self.version >= SETTINGS:
                raise PartRefused("This model's system messages hold no thoughts.")
            return self._between("[SYSTEM_PROMPT]", self._parts(message.parts), "[/SYSTEM_PROMPT]")
        if self.version == PLAIN and (message.role == "tool" or message.tool_calls):
            raise PartRefused("This model knows no tools.")
        if message.role == "tool":
            return self._between("[TOOL_RESULTS]", self._result(message), "[/TOOL_RESULTS]")
        if message.role == "user":
            content = self._user(message, system)
            if self.version == PLAIN:
                return [f"[INST] {''.join(map(str, content))} [/INST]"]
            return self._between("[INST]", content, "[/INST]")
        said = self._parts(message.parts)
        if not message.thoughts and self.version != PLAIN:
            said = [self._joined(message.parts).rstrip(" ")]
        assert self.tokenizer.eos_id is not None, "see `can_chat`"
        return [*said, *self._calls(message.tool_calls), self.tokenizer.eos_id]

    def _user(self, message: Message, system: str) -> list[TextOrId]:
        """Text alone is tokenised in one with the system text; with images, part by part."""
        lead = system + JOIN if system else ""
        if not message.images:
            return [lead + self._joined(message.parts)]
        parts = [part for part in message.parts if part != TextPart("")]
        if len(message.images) == 1 and isinstance(parts[-1], ImagePart):  # a single image after texts comes first
            parts = [parts[-1], *parts[:-1]]
        return [lead, *self._parts(parts)]

    def _result(self, message: Message) -> list[TextOrId]:
        text = self._joined(message.parts)
        if self.version < CALL_IDS:
            return [_json([{"name": message.name or None, "content": value_of(text)}])]
        if self.version < SYSTEM_MESSAGES:
            return [_json({"content": value_of(text), "call_id": message.call_id})]
        if self.version < TOOLS_FIRST:
            return [message.call_id, *self._mark("[TOOL_CONTENT]"), text]
        return self._parts(message.parts)

    def _calls(self, calls: Sequence[ToolCall]) -> list[TextOrId]:
        if calls and self.call_form in ("list", "text"):
            ids = [{"id": call.id} if self.version >= CALL_IDS else {} for call in calls]
            listed = [
                {"name": call.name, "arguments": value_of(call.arguments), **id}
                for call, id in zip(calls, ids, strict=True)
            ]
            return [*self._mark(CALLS), _json(listed)]
        written: list[TextOrId] = []
        for call in calls:
            written += [*self._mark(CALLS), call.name]
            if self.call_form == "named with id":
                written += [*self._mark(CALL_ID), call.id]
            written += [*self._mark(ARGS), _json(value_of(call.arguments))]
        return written

    def _between(self, begin: str, inner: Sequence[TextOrId], end: str) -> list[TextOrId]:
        return [*self._mark(begin), *inner, *self._mark(end)]

    def _mark(self, name: str) -> list[TextOrId]:
        """Nothing where the vocabulary is older than this control token."""
        return [self.tokenizer.control(name)] if name in self.tokenizer.controls else []

    def _parts(self, parts: Sequence[Part]) -> list[TextOrId]:
        """Neighbouring texts are tokenised in one."""
        written: list[TextOrId] = []
        for kind, group in groupby(parts, key=type):
            neighbours = list(group)
            if kind is TextPart:
                written.append(self._joined(neighbours))
            elif kind is ImagePart:
                written += self._mark("[IMG]") * len(neighbours)
            else:
                written += [each for part in neighbours if isinstance(part, ThinkPart) for each in self._thought(part)]
        return written

    def _thought(self, thought: ThinkPart) -> list[TextOrId]:
        marks = ThoughtMarks.controls(self.tokenizer)
        assert marks is not None, "see `_with_thoughts`"
        begin, end = self._mark(marks.begin), self._mark(marks.end)
        return [*begin, thought.text, *(end if thought.closed else [])]

    def _with_thoughts(self, message: Message, marks: ThoughtMarks | None) -> Message:
        """Thoughts whose marks are text are text; a model that does not think is not told of them."""
        if not message.thoughts or (marks and marks.are_controls):
            return message
        groups = ((kind, list(group)) for kind, group in groupby(message.parts, key=type))
        texts = [
            "".join(marks.around(part.text, part.closed) for part in group if isinstance(part, ThinkPart) and marks)
            if kind is ThinkPart
            else self._joined(group)
            for kind, group in groups
        ]
        return replace(message, parts=(TextPart("".join(texts)),))

    def _joined(self, parts: Sequence[Part]) -> str:
        join = "" if self.version >= TEXTS_TOUCH else JOIN
        return join.join(part.text for part in parts if isinstance(part, TextPart) and part.text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _results_in_order(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Neighbouring results of tools in the order in which their calls were made."""
    ordered: list[Message] = []
    called: dict[str, int] = {}
    for is_result, group in groupby(messages, key=lambda message: message.role == "tool"):
        if is_result:
            ordered += sorted(group, key=lambda message: called.get(message.call_id, len(called)))
            called = {}
            continue
        for message in group:
            ordered.append(message)
            called |= {call.id: len(called) + place for place, call in enumerate(message.tool_calls)}
    return tuple(ordered)
