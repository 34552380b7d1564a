"""A conversation in, token ids by Mistral's own rules out, one mark per image; knows no Jinja and no pixels.

Source: mistral-common `protocol/instruct/normalize.py` and `tokens/tokenizers/instruct.py`. V3 (Pixtral-12B, NeMo)
writes the system text into the last user message; V7 and later have a message for it. Tools stand before the last user
message, from V13 on before the first. How calls are written is in `tool_calls.py`. An assistant's last message is
continued: it has no end, as with mistral-common's `prefix`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pixtral_cli.prompt.messages import JOIN, Conversation, ImagePart, Message, Part, TextPart, user_first
from pixtral_cli.prompt.tokenizer import TextOrId, Tokenizer
from pixtral_cli.prompt.tool_calls import ARGS, CALL_ID, CALLS, CallForm
from pixtral_cli.prompt.tools import Tool, ToolCall, value_of

NEEDED = ("[INST]", "[/INST]")
FOR_TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", CALLS, "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
PIXTRAL = 3
"""The version of Pixtral-12B. Below: the first versions with a rule."""
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


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the control tokens for tools as well."""
    return can_chat(tokenizer) and all(name in tokenizer.controls for name in FOR_TOOLS)


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the control tokens that the rules need."""
    return all(name in tokenizer.controls for name in NEEDED) and tokenizer.eos_id is not None


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

    def encode(self, conversation: Conversation, tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids of an `arranged` conversation, up to where the answer begins; every image is one image token."""
        messages = list(conversation.messages)
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
        for index, message in enumerate(messages):
            if index == users[0 if self.version >= TOOLS_FIRST else -1]:
                parts += self._tools(tools)
            parts += self._message(message, system if index == users[-1] else "")
        return self.tokenizer.encode_with_controls(parts[:-1] if conversation.is_continued else parts, apart=True)

    def _tools(self, tools: Sequence[Tool]) -> list[TextOrId]:
        if not tools or not knows_tools(self.tokenizer):
            return []
        return self._between("[AVAILABLE_TOOLS]", [_json([tool.described for tool in tools])], "[/AVAILABLE_TOOLS]")

    def _message(self, message: Message, system: str) -> list[TextOrId]:
        if message.role == "system":
            return self._between("[SYSTEM_PROMPT]", [self._joined(message.parts)], "[/SYSTEM_PROMPT]")
        if message.role == "tool":
            return self._between("[TOOL_RESULTS]", self._result(message), "[/TOOL_RESULTS]")
        if message.role == "user":
            return self._between("[INST]", self._user(message, system), "[/INST]")
        said = self._joined(message.parts).rstrip(" ")
        assert self.tokenizer.eos_id is not None, "see `can_chat`"
        return [said, *self._calls(message.tool_calls), self.tokenizer.eos_id]

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
        if self.version < SYSTEM_MESSAGES:
            return [_json({"content": value_of(text), "call_id": message.call_id})]
        if self.version < TOOLS_FIRST:
            return [message.call_id, *self._mark("[TOOL_CONTENT]"), text]
        return self._parts(message.parts)

    def _calls(self, calls: Sequence[ToolCall]) -> list[TextOrId]:
        if calls and self.call_form in ("list", "text"):
            listed = [{"name": call.name, "arguments": value_of(call.arguments), "id": call.id} for call in calls]
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
        for is_text, group in groupby(parts, key=lambda part: isinstance(part, TextPart)):
            neighbours = list(group)
            written += [self._joined(neighbours)] if is_text else self._mark("[IMG]") * len(neighbours)
        return written

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
