"""What answers look like, as pydantic models for the description of the API; no answer is checked by them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class TokenDetails(BaseModel):
    cached_tokens: int
    image_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionCallPart(BaseModel):
    name: str | None = None
    arguments: str


class ToolCallPart(BaseModel):
    """The first of each `index` has id, type and name; the arguments are those of all of them joined."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallPart


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallPart] = []


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class Answered(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Answered):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(Answered):
    """The data of one event of a stream; after the last comes ``[DONE]``."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    """Of an echoed prompt the first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class Completion(Answered):
    """Also the data of one event of a stream, where `finish_reason` is null but in the last."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class PictureCost(BaseModel):
    """In pixels as the model sees it, and in tokens."""

    width: int
    height: int
    tokens: int


class Tokenized(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    images: list[PictureCost] = []


class Detokenized(BaseModel):
    prompt: str


class Status(BaseModel):
    status: str


class Version(BaseModel):
    version: str


class ErrorDetail(BaseModel):
    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail
