"""A checked body in, what is asked of the engine out; knows no HTTP and no event loop.

A field that is not supported is refused, and so is a value that would be ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pixtral_cli.server.errors import ApiError
from pixtral_cli.server.request_schemas import (
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    Json,
    PredictRequest,
    SamplingFields,
    StreamOptions,
    TokenizeRequest,
)

COMPLETION_TOKENS = 16
PREDICTED = {"max_tokens": 512, "temperature": 0.7}
MAX_TOGETHER = 128
"""Answers to one request."""
OPTIONS = {*SamplingFields.model_fields} - {"random_seed"}
OPTIONS |= {"response_format", "tool_choice", "parallel_tool_calls", "reasoning_effort"}
"""Fields that are options of the same name."""
TextOrTokens = str | list[int]


@dataclass(frozen=True)
class AnswerRequest:
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
    usage_in_each: bool = False
    """Whether each chunk of a stream tells the usage so far."""
    older_calls: bool = False
    """Whether calls are answered as a `function_call`, because `functions` were given."""

    @property
    def answers(self) -> int:
        """How many answers are asked for."""
        return self.n * (len(self.prompts) or 1)

    @property
    def scores_prompts(self) -> bool:
        """Whether its answers have the log-probabilities of all tokens of the prompts, which may take long to write."""
        return "echo" in self.options and "logprobs" in self.options

    @property
    def param(self) -> str:
        """The field that holds the question."""
        return "messages" if self.kind == "chat" else "prompt"

    @property
    def is_slow(self) -> bool:
        """Whether its prompt may take long to make: pictures, grammars."""
        return bool(self.tools or "response_format" in self.options or count_images(self.messages))


def chat(given: ChatRequest | PredictRequest) -> AnswerRequest:
    """The request of /v1/chat/completions. Raises ApiError."""
    if given.max_completion_tokens is not None and given.max_tokens not in (None, given.max_completion_tokens):
        raise ApiError(
            400, "max_tokens and max_completion_tokens mean the same, and differ.", param="max_completion_tokens"
        )
    if given.top_logprobs and not given.logprobs:
        raise ApiError(400, "top_logprobs is only for logprobs: true.", param="top_logprobs")
    options = _options(given)
    if most := given.max_completion_tokens or given.max_tokens:
        options["max_new_tokens"] = most
    if given.logprobs:
        options["logprobs"] = given.top_logprobs or True
    older = given.functions is not None or given.function_call is not None
    tools = _newer_form(given, options) if older else given.tools
    if options.get("tool_choice") == "any":
        options["tool_choice"] = "required"
    return AnswerRequest("chat", given.model, options, given.messages, tools, older_calls=older, **_form(given))


def predict(given: PredictRequest) -> AnswerRequest:
    """The request of /predict. Raises ApiError."""
    defaults = {name: value for name, value in PREDICTED.items() if getattr(given, name) is None}
    if given.max_completion_tokens:
        defaults.pop("max_tokens", None)
    return chat(given.model_copy(update=defaults))


def completion(given: CompletionRequest) -> AnswerRequest:
    """The request of /v1/completions. Raises ApiError."""
    options = _options(given)
    options["max_new_tokens"] = COMPLETION_TOKENS if given.max_tokens is None else given.max_tokens
    if given.echo:
        options["echo"] = True
    elif given.max_tokens == 0:
        raise ApiError(400, "max_tokens should be above 0, or 0 with echo: true.", param="max_tokens")
    if given.logprobs is not None:
        options["logprobs"] = given.logprobs
    several = isinstance(given.prompt, list) and not isinstance(given.prompt[0], int)
    prompts: Any = given.prompt if several else [given.prompt]
    request = AnswerRequest("text", given.model, options, prompts=prompts, **_form(given))
    if request.answers > MAX_TOGETHER:
        raise ApiError(400, f"Prompts times n should be at most {MAX_TOGETHER}, not {request.answers}.", param="n")
    return request


def check_tokenize(given: TokenizeRequest) -> None:
    """Raise ApiError unless either a prompt or messages are given."""
    if (given.prompt is None) == (given.messages is None):
        raise ApiError(400, "Give either prompt or messages.", param="prompt")
    if given.tools and given.messages is None:
        raise ApiError(400, "tools are for messages.", param="tools")


def _newer_form(given: PredictRequest, options: Json) -> list[Json]:
    """The tools that older clients call functions, of which an answer calls one at most."""
    if given.tools:
        raise ApiError(400, "tools and functions mean the same: give one of them.", param="functions")
    if not given.functions and given.function_call not in (None, "none", "auto"):
        raise ApiError(400, "function_call asks for a call, and there are no functions.", param="function_call")
    options["parallel_tool_calls"] = False
    if isinstance(given.function_call, str):
        options["tool_choice"] = given.function_call
    elif given.function_call is not None:
        options["tool_choice"] = {"type": "function", "function": {"name": given.function_call.name}}
    return [{"type": "function", "function": each.model_dump(exclude_none=True)} for each in given.functions or ()]


def _options(given: GenerationFields) -> Json:
    if given.random_seed is not None and given.seed not in (None, given.random_seed):
        raise ApiError(400, "seed and random_seed mean the same, and differ.", param="random_seed")
    options = given.model_dump(include=OPTIONS, exclude_none=True, by_alias=True)
    return options if given.random_seed is None else options | {"seed": given.random_seed}


def _form(given: GenerationFields) -> Json:
    stream = bool(given.stream)
    if given.stream_options is not None and not stream:
        raise ApiError(400, "stream_options is only for stream: true.", param="stream_options")
    n, told = given.n or 1, given.stream_options or StreamOptions()
    if given.best_of not in (None, n):
        raise ApiError(400, f"best_of can only be n, which is {n}.", param="best_of")
    return {
        "n": n,
        "stream": stream,
        "include_usage": told.include_usage,
        "usage_in_each": told.continuous_usage_stats,
    }


def count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    """Pictures in messages that were validated."""
    parts = (message["content"] for message in messages if isinstance(message.get("content"), list))
    return sum(part["type"] == "image_url" for content in parts for part in content)
