"""Whole replies in, OpenAI's JSON of answers out; knows no streams and no HTTP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from pixtral_cli.generation import Echo, Reply, TokenLogprob, Usage, characters
from pixtral_cli.prompt.tool_calls import ToolCallDelta

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
