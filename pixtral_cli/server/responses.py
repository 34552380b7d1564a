"""Replies and text events in, OpenAI's JSON of answers out, whole or as the chunks of a stream.

Knows no engine, no event loop and no HTTP. A chunk is put together from prepared text, and only what the model wrote is
encoded: at a thousand tokens a second anything more would be felt.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from pixtral_cli.generation import Echo, Reply, TextEvent, TokenLogprob, Usage, characters
from pixtral_cli.prompt.tool_calls import ToolCallDelta, whole_deltas

LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot come: JSON has no infinities."""
Json = dict[str, Any]
TokenBytes = Callable[[int], bytes]


@dataclass(frozen=True)
class Envelope:
    """What every part of one answer carries."""

    kind: Literal["chat", "text"]
    model: str
    fingerprint: str
    id: str
    created: int
    older_calls: bool = False
    """Whether a call is a `function_call`, as before there were tools."""

    @classmethod
    def new(cls, kind: Literal["chat", "text"], model: str, fingerprint: str, older_calls: bool = False) -> Envelope:
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        return cls(kind, model, fingerprint, f"{prefix}-{secrets.token_hex(12)}", int(time.time()), older_calls)

    def head(self, chunk: bool = False) -> Json:
        name = ("chat.completion.chunk" if chunk else "chat.completion") if self.kind == "chat" else "text_completion"
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def answer(envelope: Envelope, replies: Sequence[Reply], n: int, token_bytes: TokenBytes) -> Json:
    """A whole answer; `replies` in order, `n` to each prompt."""
    choice = chat_choice if envelope.kind == "chat" else text_choice
    choices = [choice(index, reply, token_bytes) for index, reply in enumerate(replies)]
    if envelope.older_calls:
        choices = [_with_function_call(each) for each in choices]
    return {**envelope.head(), "choices": choices, "usage": usage([reply.usage for reply in replies], n)}


def chat_choice(index: int, reply: Reply, token_bytes: TokenBytes) -> Json:
    message: Json = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.tool_calls:
        message["content"] = reply.text or None
        message["tool_calls"] = [tool_call(call) for call in reply.tool_calls]
    logprobs = None if reply.logprobs is None else chat_logprobs(reply.logprobs, token_bytes)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reply.finish_reason}


def _with_function_call(choice: Json) -> Json:
    """A chat's choice with its one call in the older form."""
    message = dict(choice["message"])
    for call in message.pop("tool_calls", ()):
        message["function_call"] = call["function"]
    return {**choice, "message": message, "finish_reason": older_reason(choice["finish_reason"])}


def older_reason(finish_reason: str) -> str:
    return "function_call" if finish_reason == "tool_calls" else finish_reason


def text_choice(index: int, reply: Reply, token_bytes: TokenBytes) -> Json:
    echoed = "" if reply.echo is None else reply.echo.text
    logprobs = None if reply.logprobs is None else text_logprobs(reply.logprobs, len(echoed), token_bytes)
    if reply.echo is not None and (before := echo_logprobs(reply.echo)) is not None:
        logprobs = {name: told + logprobs[name] for name, told in before.items()}
    return {"index": index, "text": echoed + reply.text, "logprobs": logprobs, "finish_reason": reply.finish_reason}


def tool_call(call: Any) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def tool_call_delta(delta: ToolCallDelta) -> Json:
    """What tells a client of a new call has its id and name; what goes on with one has neither."""
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {"index": delta.index, **tool_call(delta)}


def chat_logprobs(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> Json:
    content = [
        {**_logprob(entry, token_bytes), "top_logprobs": [_logprob(other, token_bytes) for other in entry.top]}
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _logprob(entry: TokenLogprob, token_bytes: TokenBytes) -> Json:
    data = list(token_bytes(entry.token_id))
    return {"token": entry.token, "logprob": _number(entry), "bytes": data}


def _number(entry: TokenLogprob) -> float | None:
    return None if entry.logprob is None else max(entry.logprob, LOWEST_LOGPROB)


def text_logprobs(logprobs: Sequence[TokenLogprob], offset: int, token_bytes: TokenBytes) -> Json:
    """`offset`: characters of the text before the first of them."""
    rooms = [characters(token_bytes(entry.token_id)) for entry in logprobs]
    return _text_logprobs(logprobs, list(accumulate(rooms, initial=offset))[:-1])


def echo_logprobs(echo: Echo) -> Json | None:
    """Of the prompt that comes before an answer, if they were asked for."""
    return None if echo.logprobs is None else _text_logprobs(echo.logprobs, echo.offsets)


def _text_logprobs(logprobs: Sequence[TokenLogprob], offsets: list[int]) -> Json:
    return {
        "tokens": [entry.token for entry in logprobs],
        "token_logprobs": [_number(entry) for entry in logprobs],
        "top_logprobs": [_alternatives(entry) for entry in logprobs],
        "text_offset": offsets,
    }


def _alternatives(entry: TokenLogprob) -> dict[str, float | None] | None:
    """By text, the likeliest first; of tokens that look alike, that one. The chosen token is among them as well."""
    if entry.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for other in (*entry.top, entry):
        found.setdefault(other.token, _number(other))
    return found


def usage(answers: Sequence[Usage], n: int) -> Json:
    """Of all answers; a prompt counts once, however many answers it has."""
    prompts = answers[::n]
    prompt_tokens = sum(each.prompt_tokens for each in prompts)
    completion_tokens = sum(each.completion_tokens for each in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(each.cached_tokens for each in prompts),
            "image_tokens": sum(each.image_tokens for each in prompts),
        },
    }


DONE = b"data: [DONE]\n\n"
compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""In ASCII: many a client takes U+2028 and its like for the end of a line."""
WHOLE_CALLS = ("mistral-client-", "python-httpx/")
"""How user agents begin of clients that need each call whole, as Mistral's own servers send it. Mistral's packages
refuse a piece without a name. langchain-mistralai, which says that it is httpx, takes each piece for another call.
"""


def takes_pieces(user_agent: str) -> bool:
    """Whether a client can put a call together that comes in pieces, as OpenAI sends it."""
    return not user_agent.startswith(WHOLE_CALLS)


class Chunks:
    """Turns the events of `answers` answers into bytes of a stream.

    With `in_pieces` calls come in pieces, as from OpenAI. Else each call comes whole, and the last choice has the
    usage, as from Mistral.
    """

    def __init__(
        self,
        envelope: Envelope,
        answers: int,
        n: int,
        token_bytes: TokenBytes,
        include_usage: bool,
        usage_in_each: bool = False,
        in_pieces: bool = True,
    ) -> None:
        self.envelope, self.n, self.token_bytes, self.include_usage = envelope, n, token_bytes, include_usage
        self.usage_in_each, self.in_pieces = usage_in_each, in_pieces
        head = compact(envelope.head(chunk=True))[:-1]
        self.head = f'data: {head},"choices":['
        self.tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self.replies: list[Reply | None] = [None] * answers
        self.held: list[list[TokenLogprob]] = [[] for _ in range(answers)]
        self.offsets = [0] * answers
        """Characters of the tokens whose log-probabilities were told."""
        self.is_chat = envelope.kind == "chat"

    def opening(self, first: Sequence[tuple[int, TextEvent]]) -> bytes:
        """A chat's first chunk of each answer, which has the role. The `first` events give the usage of the prompt."""
        if not self.is_chat:
            return b""
        used = replace(first[0][1].usage, completion_tokens=0) if self.usage_in_each else None
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        choices = [f'{{"index":{place},{delta}}}' for place in range(len(self.replies))]
        return "".join(self._chunk(choice, used) for choice in choices).encode()

    def of(self, events: list[tuple[int, TextEvent]]) -> bytes:
        """The chunks of what came together; b"" while nothing can be shown."""
        return "".join(self._event(place, event) for place, event in events).encode()

    def closing(self) -> bytes:
        """After the last event."""
        if not self.include_usage:
            return DONE
        return self._with_usage("", self.usage()).encode() + DONE

    def usage(self) -> Json:
        """Of all answers, when they have ended."""
        return usage([reply.usage for reply in self.replies if reply is not None], self.n)

    def _event(self, place: int, event: TextEvent) -> str:
        used = event.usage if self.usage_in_each else None
        chunks = "".join([self._chunk(choice, used) for choice in self._choices(place, event)])
        if event.finish_reason:
            self.replies[place] = event.reply
            chunks += self._end(place, event.finish_reason, used)
        return chunks

    def _choices(self, place: int, event: TextEvent) -> list[str]:
        """What the event adds to its answer: one choice for each chunk."""
        choices = []
        if event.logprob is not None:
            self.held[place].append(event.logprob)
        if event.echo is not None:
            choices.append(self._echo(place, event.echo))
        if event.text:
            choices.append(self._text(place, event.text))
        deltas = event.tool_call_deltas if self.in_pieces else whole_deltas(event.tool_calls)
        choices += [self._call(place, delta) for delta in deltas]
        if event.finish_reason and self.held[place]:
            choices.append(self._text(place, ""))
        return choices

    def _text(self, place: int, text: str) -> str:
        said = f'"delta":{{"content":{compact(text)}}}' if self.is_chat else f'"text":{compact(text)}'
        return self._said(place, said)

    def _call(self, place: int, delta: ToolCallDelta) -> str:
        told = tool_call_delta(delta)
        calls = {"function_call": told["function"]} if self.envelope.older_calls else {"tool_calls": [told]}
        return self._said(place, f'"delta":{compact(calls)}')

    def _echo(self, place: int, echo: Echo) -> str:
        """The prompt, which comes before the answer."""
        self.offsets[place] = len(echo.text)
        said, logprobs = compact(echo.text), compact(echo_logprobs(echo))
        return f'{{"index":{place},"text":{said},"logprobs":{logprobs},"finish_reason":null}}'

    def _said(self, place: int, said: str) -> str:
        logprobs = self._logprobs(place) if self.held[place] else "null"
        return f'{{"index":{place},{said},"logprobs":{logprobs},"finish_reason":null}}'

    def _end(self, place: int, finish_reason: str, used: Usage | None) -> str:
        """The last chunk of an answer. The last of all answers has their usage, for clients that want calls whole."""
        said = '"delta":{}' if self.is_chat else '"text":""'
        reason = older_reason(finish_reason) if self.envelope.older_calls else finish_reason
        choice = f'{{"index":{place},{said},"logprobs":null,"finish_reason":"{reason}"}}'
        if self.in_pieces or self.include_usage or None in self.replies:
            return self._chunk(choice, used)
        return self._with_usage(choice, self.usage())

    def _logprobs(self, place: int) -> str:
        """Of the tokens since the last chunk."""
        held, self.held[place] = self.held[place], []
        if self.is_chat:
            return compact(chat_logprobs(held, self.token_bytes))
        offset = self.offsets[place]
        self.offsets[place] += sum(characters(self.token_bytes(entry.token_id)) for entry in held)
        return compact(text_logprobs(held, offset, self.token_bytes))

    def _chunk(self, choice: str, used: Usage | None) -> str:
        """`used` is told only where each chunk tells the usage so far."""
        return f"{self.head}{choice}{self.tail}" if used is None else self._with_usage(choice, usage([used], 1))

    def _with_usage(self, choice: str, usage: Json) -> str:
        return f'{self.head}{choice}],"usage":{compact(usage)}}}\n\n'
