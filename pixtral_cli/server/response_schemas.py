"""The JSON of answers, as typed dictionaries: mypy holds who builds them to these shapes, and pydantic describes them.

No models: an answer may have millions of log-probabilities, and a stream a thousand chunks a second.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from pixtral_cli import generation
from pixtral_cli.server.errors import ErrorType

FinishReason = Literal[generation.FinishReason, "function_call"]


class TokenDetails(TypedDict):
    cached_tokens: int
    image_tokens: int


class CompletionDetails(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails
    completion_tokens_details: CompletionDetails


class Logprob(TypedDict):
    token: str
    logprob: float | None
    bytes: list[int]


class ChatLogprob(Logprob):
    top_logprobs: list[Logprob]


class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]
    refusal: None


class FunctionCall(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionCallDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The first of each `index` has id, type and name; the arguments are those of all of them joined."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallDelta


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]
    function_call: NotRequired[FunctionCall]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]
    function_call: NotRequired[FunctionCallDelta]


class ChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class AnswerHead(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(AnswerHead):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(AnswerHead):
    """The data of one event of a stream; after the last comes ``[DONE]``."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]


class TextLogprobs(TypedDict):
    """Of an echoed prompt the first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class Completion(AnswerHead):
    """Also the data of one event of a stream, where `finish_reason` is null but in the last."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class Capabilities(TypedDict):
    """As Mistral's API tells them."""

    completion_chat: bool
    completion_fim: bool
    function_calling: bool
    fine_tuning: bool
    vision: bool


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    type: Literal["base"]
    capabilities: Capabilities


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class ImageCost(TypedDict):
    """In pixels as the model sees it, and in tokens."""

    width: int
    height: int
    tokens: int


class Tokenized(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int
    images: NotRequired[list[ImageCost]]


class Detokenized(TypedDict):
    prompt: str


class Status(TypedDict):
    status: str


class Version(TypedDict):
    version: str


class ErrorDetail(TypedDict):
    message: str
    type: ErrorType
    param: str | None
    code: str | None


class Error(TypedDict):
    error: ErrorDetail
