"""OpenAI's JSON in, what is asked of the engine out; replies in, OpenAI's JSON out. Knows no HTTP and no event loop."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from pixtral_cli.generate import Reply, TokenLogprob
from pixtral_cli.server.errors import ApiError
from pixtral_cli.server.fields import (
    Asked,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    PredictRequest,
    TokenizeRequest,
)

COMPLETION_TOKENS = 16
PREDICTED = {"max_tokens": 512, "temperature": 0.7}
LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot come: JSON has no infinities."""
SAMPLED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "logit_bias",
    "ignore_eos",
    "response_format",
    "tool_choice",
    "parallel_tool_calls",
)
"""Fields that are options of the same name."""
Model = TypeVar("Model", bound=BaseModel)
Json = dict[str, Any]
TextOrTokens = str | list[int]


@dataclass(frozen=True)
class Ask:
    """One HTTP request for answers: `n` to each of its prompts, in `options` (fields of GenerationOptions).

    A chat has one prompt, `messages` and `tools`; else there are `prompts`.
    """

    kind: Literal["chat", "text"]
    model: str | None
    options: Json
    messages: list[Json] = field(default_factory=list)
    tools: list[Json] | None = None
    prompts: list[TextOrTokens] = field(default_factory=list)
    n: int = 1
    stream: bool = False
    include_usage: bool = False

    @property
    def answers(self) -> int:
        """How many answers are asked for."""
        return self.n * (len(self.prompts) or 1)


def chat(body: Json) -> Ask:
    """The request of /v1/chat/completions. Raises ApiError."""
    return _chat(body, validated(ChatRequest, body))


def predict(body: Json) -> Ask:
    """The request of /predict. Raises ApiError."""
    given = validated(PredictRequest, body)
    for name, default in PREDICTED.items():
        if getattr(given, name) is None and not (name == "max_tokens" and given.max_completion_tokens):
            setattr(given, name, default)
    return _chat(body, given)


def completion(body: Json) -> Ask:
    """The request of /v1/completions. Raises ApiError."""
    given = validated(CompletionRequest, body)
    options = _options(given)
    options["max_new_tokens"] = given.max_tokens or COMPLETION_TOKENS
    if given.logprobs is not None:
        options["logprobs"] = given.logprobs
    several = isinstance(given.prompt, list) and not isinstance(given.prompt[0], int)
    prompts = given.prompt if several else [given.prompt]
    return Ask("text", given.model, options, prompts=prompts, **_form(given))


def tokenize(body: Json) -> TokenizeRequest:
    """Raises ApiError."""
    given = validated(TokenizeRequest, body)
    if (given.prompt is None) == (given.messages is None):
        raise ApiError(400, "Give either prompt or messages.", param="prompt")
    if given.tools and given.messages is None:
        raise ApiError(400, "tools are for messages.", param="tools")
    return given


def detokenize(body: Json) -> DetokenizeRequest:
    """Raises ApiError."""
    return validated(DetokenizeRequest, body)


def validated(model: type[Model], body: Json) -> Model:
    """`body` as `model`. Raises ApiError, which names the first field that is wrong."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _wrong(model, error) from None


def _chat(body: Json, given: PredictRequest) -> Ask:
    if given.max_completion_tokens is not None and given.max_tokens not in (None, given.max_completion_tokens):
        raise ApiError(
            400, "max_tokens and max_completion_tokens mean the same, and differ.", param="max_completion_tokens"
        )
    if given.top_logprobs is not None and not given.logprobs:
        raise ApiError(400, "top_logprobs is only for logprobs: true.", param="top_logprobs")
    options = _options(given)
    if most := given.max_completion_tokens or given.max_tokens:
        options["max_new_tokens"] = most
    if given.logprobs:
        options["logprobs"] = given.top_logprobs or True
    return Ask("chat", given.model, options, body["messages"], body.get("tools"), **_form(given))


def _options(given: Asked) -> Json:
    values = given.model_dump(include=set(SAMPLED), exclude_none=True, by_alias=True)
    values["logit_bias"] = _bias(values.get("logit_bias", {}))
    return {name: value for name, value in values.items() if value not in ({}, [])}


def _bias(bias: Mapping[str, float]) -> dict[int, float]:
    wrong = next((key for key in bias if not (key.isascii() and key.isdigit())), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias should name token ids, not {_shown(wrong)}.", param="logit_bias")
    return {int(key): value for key, value in bias.items()}


def _form(given: Asked) -> Json:
    stream = bool(given.stream)
    if given.stream_options is not None and not stream:
        raise ApiError(400, "stream_options is only for stream: true.", param="stream_options")
    usage = given.stream_options is not None and given.stream_options.include_usage
    return {"n": given.n or 1, "stream": stream, "include_usage": usage}


def _wrong(model: type[BaseModel], error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False, include_input=True, include_context=False)
    unknown = next((entry for entry in problems if entry["type"] == "extra_forbidden"), None)
    if unknown is not None:
        path = _path(unknown["loc"])
        return ApiError(400, f"{path} is not supported: no such field is known.", param=path, code="unknown_parameter")
    first = problems[0]
    path = _path(first["loc"])
    if first["type"] == "missing":
        return ApiError(400, f"{path} is missing.", param=path, code="missing_required_parameter")
    same = [entry["msg"] for entry in problems if _path(entry["loc"]) == path]
    wanted = " or ".join(dict.fromkeys(message.removeprefix("Input should ") for message in same))
    return ApiError(400, f"{path} should {wanted}.", param=path, code="invalid_value")


def _path(places: Sequence[int | str]) -> str:
    """``messages[0].content[1].text`` for a pydantic location, whose names of a union's branches are left out."""
    path = ""
    for place in places:
        if isinstance(place, int):
            path += f"[{place}]"
        elif place.isidentifier() and place.islower() and place not in BRANCHES:
            path += f".{place}" if path else place
        elif place and not _names_a_branch(place):
            path += f".{place[:64]}" if path else place[:64]
    return path or "The body"


BRANCHES = {"str", "int", "float", "user", "system", "developer", "assistant", "tool", "json_object", "json_schema"}


def _names_a_branch(place: str) -> bool:
    return place.startswith(("list[", "constrained-", "literal[", "dict[", "tagged-union", "nullable")) or (
        place in BRANCHES or place[:1].isupper()
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


# What goes back.


@dataclass(frozen=True)
class Envelope:
    """What every part of one answer carries."""

    kind: Literal["chat", "text"]
    model: str
    fingerprint: str
    id: str
    created: int

    @classmethod
    def new(cls, kind: Literal["chat", "text"], model: str, fingerprint: str) -> Envelope:
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        return cls(kind, model, fingerprint, f"{prefix}-{secrets.token_hex(12)}", int(time.time()))

    def head(self, chunk: bool = False) -> Json:
        name = ("chat.completion.chunk" if chunk else "chat.completion") if self.kind == "chat" else "text_completion"
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


TokenBytes = Callable[[int], bytes]


def answer(envelope: Envelope, replies: Sequence[Reply], n: int, token_bytes: TokenBytes) -> Json:
    """A whole answer; `replies` in order, `n` to each prompt."""
    choice = chat_choice if envelope.kind == "chat" else text_choice
    choices = [choice(index, reply, token_bytes) for index, reply in enumerate(replies)]
    return {**envelope.head(), "choices": choices, "usage": usage(replies, n)}


def chat_choice(index: int, reply: Reply, token_bytes: TokenBytes) -> Json:
    message: Json = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.tool_calls:
        message["content"] = reply.text or None
        message["tool_calls"] = [tool_call(call) for call in reply.tool_calls]
    logprobs = None if reply.logprobs is None else chat_logprobs(reply.logprobs, token_bytes)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reply.finish_reason}


def text_choice(index: int, reply: Reply, token_bytes: TokenBytes) -> Json:
    logprobs = None if reply.logprobs is None else text_logprobs(reply.logprobs, 0)
    return {"index": index, "text": reply.text, "logprobs": logprobs, "finish_reason": reply.finish_reason}


def tool_call(call: Any) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_logprobs(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> Json:
    content = [
        {**_logprob(entry, token_bytes), "top_logprobs": [_logprob(other, token_bytes) for other in entry.top]}
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _logprob(entry: TokenLogprob, token_bytes: TokenBytes) -> Json:
    data = list(token_bytes(entry.token_id))
    return {"token": entry.token, "logprob": max(entry.logprob, LOWEST_LOGPROB), "bytes": data}


def text_logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> Json:
    """`offset`: characters of the answer before the first of them."""
    offsets = []
    for entry in logprobs:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in logprobs],
        "token_logprobs": [max(entry.logprob, LOWEST_LOGPROB) for entry in logprobs],
        "top_logprobs": [
            {other.token: max(other.logprob, LOWEST_LOGPROB) for other in entry.top} for entry in logprobs
        ],
        "text_offset": offsets,
    }


def usage(replies: Sequence[Reply], n: int) -> Json:
    """Of all answers; a prompt counts once, however many answers it has."""
    prompts = [reply.usage for reply in replies[::n]]
    prompt_tokens = sum(each.prompt_tokens for each in prompts)
    completion_tokens = sum(reply.usage.completion_tokens for reply in replies)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(each.cached_tokens for each in prompts),
            "image_tokens": sum(each.image_tokens for each in prompts),
        },
    }
