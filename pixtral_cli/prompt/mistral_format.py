"""A conversation in, token ids by Mistral's own rules out, one mark per picture; knows no Jinja and no pixels.

Source: mistral-common `protocol/instruct/normalize.py` and `tokens/tokenizers/instruct.py`. V3 (Pixtral-12B, NeMo)
writes the system text into the last user turn; V7 and later have a turn for it. Tools stand before the last user turn,
from V13 on before the first. How calls are written is in `tool_calls.py`. An assistant's last turn is continued: it
has no end, as with mistral-common's `prefix`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pixtral_cli.prompt.messages import JOIN, Conversation, ImagePart, Message, Part, TextPart, user_first
from pixtral_cli.prompt.tokenizer import Tokenizer
from pixtral_cli.prompt.tool_calls import ARGS, CALL_ID, CALLS, CallForm
from pixtral_cli.prompt.tools import Tool, ToolCall, value_of

NEEDED = ("[INST]", "[/INST]")
FOR_TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
PIXTRAL = 3
SYSTEM_TURNS = 7
NAMED_CALLS = 11
TOOLS_FIRST = 13
TEXTS_TOUCH = 15
RESULTS_SHOW = 15
"""Pixtral's version, and the first ones with system turns, with calls that are no JSON list and results in the order of
their calls, with tools before the first user turn and calls without ids, with nothing between the texts of one message,
and with pictures in results."""


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the control tokens for tools as well."""
    return can_chat(tokenizer) and all(name in tokenizer.controls for name in FOR_TOOLS)


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the control tokens that the rules need."""
    return all(name in tokenizer.controls for name in NEEDED) and tokenizer.eos_id is not None


def version_of(template: str | None, written: int | None) -> int:
    """The version of the rules: what the checkpoint's template shows, else `written` in tekken.json, else Pixtral's.

    A template shows it by the way in which it writes system texts. The vocabulary tells nothing: mistral-common names
    the control tokens of V7 in those of V3 as well. Pixtral-12B, NeMo, Ministral-8B and the 7B models are V3; later
    models come with a tekken.json or a template.
    """
    if template is None or "system" not in template.lower():
        return written or PIXTRAL
    return max(SYSTEM_TURNS, written or 0) if "[SYSTEM_PROMPT]" in template else PIXTRAL


@dataclass
class MistralFormat:
    """Mistral's chat rules of one version, with a tokenizer."""

    tokenizer: Tokenizer
    template: str | None = None
    """A template that came with the model, which these rules stand in for: it tells their version."""

    @property
    def version(self) -> int:
        return version_of(self.template, self.tokenizer.version)

    @property
    def call_form(self) -> CallForm:
        """How the model writes its calls of tools."""
        if "[TOOL_CALLS]" not in self.tokenizer.controls:
            return "text"
        if self.version < NAMED_CALLS:
            return "list"
        return "named with id" if self.version < TOOLS_FIRST else "named"

    def arranged(self, conversation: Conversation) -> Conversation:
        """The turns, pictures included, in the order in which they are written."""
        if self.version < RESULTS_SHOW:
            conversation = conversation.images_after_results()
        turns = conversation.merged(apart=("system",)).messages
        return Conversation(tuple(_results_in_order(turns) if self.version >= NAMED_CALLS else turns))

    def encode(self, conversation: Conversation, tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids up to where the answer begins; every picture is one image token."""
        ids = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        turns = list(self.arranged(conversation).messages)
        system = ""
        if self.version < SYSTEM_TURNS:
            texts = [self._joined(turn.parts) for turn in turns if turn.role == "system"]
            system = JOIN.join(text for text in texts if text)
            turns = user_first([turn for turn in turns if turn.role != "system"])
        elif tools and all(turn.role != "user" for turn in turns):  # tools need one to stand before
            start = 1 if turns[0].role == "system" else 0
            turns = turns[:start] + user_first(turns[start:])
        users = [index for index, turn in enumerate(turns) if turn.role == "user"] or [-1]
        for index, turn in enumerate(turns):
            if index == users[0 if self.version >= TOOLS_FIRST else -1]:
                ids += self._tools(tools)
            ids += self._turn(turn, system if index == users[-1] else "")
        return ids[:-1] if conversation.is_continued else ids

    def _tools(self, tools: Sequence[Tool]) -> list[int]:
        if not tools or not knows_tools(self.tokenizer):
            return []
        return self._between("[AVAILABLE_TOOLS]", self._json([tool.described for tool in tools]), "[/AVAILABLE_TOOLS]")

    def _turn(self, turn: Message, system: str) -> list[int]:
        if turn.role == "system":
            return self._between("[SYSTEM_PROMPT]", self._text(self._joined(turn.parts)), "[/SYSTEM_PROMPT]")
        if turn.role == "assistant":
            said = [*self._text(self._joined(turn.parts).rstrip(" ")), *self._calls(turn.tool_calls)]
            return [*said, self.tokenizer.eos_id]  # type: ignore[list-item]
        if turn.role == "tool":
            return self._between("[TOOL_RESULTS]", self._result(turn), "[/TOOL_RESULTS]")
        return self._between("[INST]", self._user(turn, system), "[/INST]")

    def _between(self, begin: str, ids: list[int], end: str) -> list[int]:
        return [*self._mark(begin), *ids, *self._mark(end)]

    def _mark(self, name: str) -> list[int]:
        """Nothing where the vocabulary is older than this control token."""
        return [self.tokenizer.control(name)] if name in self.tokenizer.controls else []

    def _calls(self, calls: tuple[ToolCall, ...]) -> list[int]:
        if not calls:
            return []
        if self.call_form in ("list", "text"):
            listed = [{"name": call.name, "arguments": value_of(call.arguments), "id": call.id} for call in calls]
            return [*self._mark(CALLS), *self._json(listed)]
        return [id for call in calls for id in self._named(call)]

    def _named(self, call: ToolCall) -> list[int]:
        id = [*self._mark(CALL_ID), *self._text(call.id)] if self.call_form == "named with id" else []
        arguments = self._json(value_of(call.arguments))
        return [*self._mark(CALLS), *self._text(call.name), *id, *self._mark(ARGS), *arguments]

    def _result(self, turn: Message) -> list[int]:
        text = self._joined(turn.parts)
        if self.version < SYSTEM_TURNS:
            return self._json({"content": value_of(text), "call_id": turn.call_id})
        if self.version < TOOLS_FIRST:
            return [*self._text(turn.call_id), *self._mark("[TOOL_CONTENT]"), *self._text(text)]
        return self._in_pieces(self._pieces(turn.parts)) if turn.has_images else self._text(text)

    def _json(self, value: Any) -> list[int]:
        return self._text(json.dumps(value, ensure_ascii=False))

    def _user(self, turn: Message, system: str) -> list[int]:
        """Text alone is tokenised in one with the system text; with pictures, piece by piece."""
        lead = system + JOIN if system else ""
        if not turn.has_images:
            return self._text(lead + self._joined(turn.parts))
        pieces = self._pieces(turn.parts)
        if isinstance(pieces[-1], ImagePart) and all(isinstance(piece, TextPart) for piece in pieces[:-1]):
            pieces = [pieces[-1], *pieces[:-1]]  # a single picture at the end of only texts
        return self._text(lead) + self._in_pieces(pieces)

    def _pieces(self, parts: Iterable[Part]) -> list[Part]:
        """The parts with neighbouring texts joined."""
        pieces: list[Part] = []
        for part in parts:
            if isinstance(part, TextPart) and pieces and isinstance(pieces[-1], TextPart):
                pieces[-1] = TextPart(self._joined((pieces[-1], part)))
            elif part != TextPart(""):
                pieces.append(part)
        return pieces

    def _in_pieces(self, pieces: Iterable[Part]) -> list[int]:
        return [id for piece in pieces for id in self._part(piece)]

    def _joined(self, parts: tuple[Part, ...]) -> str:
        join = "" if self.version >= TEXTS_TOUCH else JOIN
        return join.join(part.text for part in parts if isinstance(part, TextPart) and part.text)

    def _part(self, part: Part) -> list[int]:
        return [self.tokenizer.control("[IMG]")] if isinstance(part, ImagePart) else self._text(part.text)

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []


def _results_in_order(turns: Iterable[Message]) -> list[Message]:
    """Neighbouring results of tools in the order in which their calls were made."""
    ordered: list[Message] = []
    called: dict[str, int] = {}
    for is_result, group in groupby(turns, key=lambda turn: turn.role == "tool"):
        if is_result:
            ordered += sorted(group, key=lambda turn: called.get(turn.call_id, len(called)))
            called = {}
            continue
        for turn in group:
            ordered.append(turn)
            called |= {call.id: len(called) + place for place, call in enumerate(turn.tool_calls)}
    return ordered
