"""The JSON of requests, as pydantic models that check and describe it; knows no HTTP and no engine.

Names and ranges are those of https://platform.openai.com/docs/api-reference; what has no meaning there (`top_k`,
`min_p`, `repetition_penalty`, `ignore_eos`) has vLLM's, and `random_seed`, `safe_prompt` and `prefix` are those of
https://docs.mistral.ai/api. Types are strict: "5" is no number, and true is none either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from pixtral_cli.generation_options import OPTION_RANGES, Effort
from pixtral_cli.prompt.image import Detail
from pixtral_cli.prompt.tools import NAME

MAX_ANSWERS = 16
MAX_STOPS, STOP_LENGTH = 16, 500
MAX_LIST = 10_000
"""Messages, and parts of one."""
MAX_PROMPTS = 64
MAX_ALTERNATIVES = 20
MAX_TEMPERATURE = 2
MAX_ID = 2**31 - 1

Json = dict[str, Any]
TokenId = Annotated[int, Field(ge=0, le=MAX_ID)]
IdText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=OPTION_RANGES["logit_bias"].low, le=OPTION_RANGES["logit_bias"].high)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
NoneGiven = Annotated[None, Field(description="Taken back from answers that have it; only null.")]
NO_CHANGE = "Changes no answer."


class Strict(BaseModel):
    """No field beside those named, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, given: Any) -> Any:
        """Null asks for nothing, whatever its name: many clients send each field that they know of."""
        if not isinstance(given, dict) or None not in given.values():
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in given.items() if value is not None or name in known}


class AsGiven:
    """Marks a field that is checked as `kind` and stays what it was: lists and dictionaries, not models."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(_checked, handler.generate_schema(self.kind))


def _checked(value: Any, check: Callable[[Any], Any]) -> Any:
    check(value)
    return value


class Marked(Strict):
    """What clients may mark for a prompt cache. Ours keeps everything, so the mark changes nothing."""

    cache_control: Json | None = Field(None, description=NO_CHANGE)


class TextPart(Marked):
    type: Literal["text"]
    text: str


class ThinkingPart(Marked):
    """A thought, as Mistral's API writes it."""

    type: Literal["thinking"]
    thinking: str | list[TextPart]
    closed: bool | None = Field(None, description="False for a thought that is to go on.")


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str


class ImageAddress(Strict):
    url: Text = Field(description="A data: URI, an http(s) address, or a file below --media-path.")
    detail: Detail | None = Field(None, description="low: at most 512 pixels on the longest side; else in full.")


class ImagePart(Marked):
    type: Literal["image_url"]
    image_url: ImageAddress | Text


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(max_length=MAX_LIST)]
SaidPart = Annotated[TextPart | ThinkingPart | RefusalPart, Field(discriminator="type")]
SystemPart = Annotated[TextPart | ThinkingPart, Field(discriminator="type")]


class CalledFunction(Strict):
    name: str
    arguments: str | Json = Field("", description="JSON text, or an object.")


class Call(Strict):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class AnyMessage(Marked):
    name: str | None = Field(None, description="Who speaks. " + NO_CHANGE)


class SystemMessage(AnyMessage):
    role: Literal["system", "developer"]
    content: str | list[SystemPart]


class UserMessage(AnyMessage):
    role: Literal["user"]
    content: str | Parts


class AssistantMessage(AnyMessage):
    role: Literal["assistant"]
    content: str | list[SaidPart] | None = None
    reasoning_content: str | None = Field(None, description="What was thought before the content.")
    reasoning: str | None = Field(None, description="Another name of reasoning_content.")
    tool_calls: list[Call] | None = None
    function_call: CalledFunction | None = Field(None, description="The older form of one tool call.")
    prefix: bool | None = Field(None, description="The last message of an assistant is continued, with it or without.")
    refusal: str | None = None
    audio: NoneGiven = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(AnyMessage):
    role: Literal["tool"]
    content: str | Parts
    tool_call_id: Text


class FunctionMessage(Marked):
    """The older form of a tool's message: the result of the call before it."""

    role: Literal["function"]
    name: str
    content: str | None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage, Field(discriminator="role")
]
HELLO = {"role": "user", "content": "Hello"}
_Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST, examples=[[HELLO]])]
Messages = Annotated[list[Json], AsGiven(_Messages)]
"""Checked here for their form; `prompt.messages` says what they mean and whether they go together."""


class ToolFunction(Strict):
    name: Name
    description: str | None = None
    parameters: Json | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool | None = Field(None, description="A forced call keeps to the parameters, strict or not.")


class ToolEntry(Marked):
    type: Literal["function"]
    function: ToolFunction


Tools = Annotated[list[Json], AsGiven(list[ToolEntry])]


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class PlainText(Strict):
    type: Literal["text"]


class JsonObject(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    model_config = ConfigDict(extra="forbid", strict=True, serialize_by_alias=True)

    name: Name
    described_by: Json = Field(alias="schema", description="The JSON schema that the answer keeps to.")
    description: str | None = None
    strict: bool | None = None


class JsonSchema(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")]


class StreamOptions(Strict):
    include_usage: bool = Field(False, description="A last chunk tells the usage.")
    continuous_usage_stats: bool = Field(False, description="Each chunk tells the usage so far of its answer.")
    include_obfuscation: bool = Field(False, description="Changes no answer; nothing is padded.")


def option(name: str, high: float = math.inf, description: str | None = None) -> Any:
    """A generation option's field in its range, or up to `high` where HTTP takes less."""
    bounds = OPTION_RANGES[name]
    return Field(None, ge=bounds.low, le=min(bounds.high, high), description=description)


class SamplingFields(Strict):
    """How tokens are chosen. What is not given: the server's flags, the checkpoint's own settings, else greedy."""

    temperature: float | None = option("temperature", MAX_TEMPERATURE)
    top_p: float | None = option("top_p", description="0 is greedy.")
    top_k: int | None = option("top_k", MAX_ID, "0 and -1 are off.")
    min_p: float | None = option("min_p")
    frequency_penalty: float | None = option("frequency_penalty")
    presence_penalty: float | None = option("presence_penalty")
    repetition_penalty: float | None = option("repetition_penalty")
    seed: int | None = option("seed", description="Below 0: a fresh one.")
    random_seed: int | None = option("seed", description="Another name of seed.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    logit_bias: dict[IdText, Bias] | None = Field(
        None, description="Token ids, as strings, and what is added to their scores.", examples=[{"42": -100}]
    )
    ignore_eos: bool | None = Field(None, description="Go on after the model's end-of-answer token.")


class GenerationFields(SamplingFields):
    """What requests for answers have in common."""

    max_tokens: int | None = Field(None, ge=1, le=MAX_ID)
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    best_of: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="Only as many as n.")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, description=NO_CHANGE)
    safety_identifier: str | None = Field(None, description=NO_CHANGE)
    metadata: Json | None = Field(None, description=NO_CHANGE)
    store: bool | None = Field(None, description="Changes no answer; nothing is stored.")
    service_tier: str | None = Field(None, description=NO_CHANGE)
    cache_prompt: bool | None = Field(None, description="Changes no answer; prompts are always cached.")
    prompt_cache_key: str | None = Field(None, description=NO_CHANGE)
    prompt_cache_retention: str | None = Field(None, description=NO_CHANGE)


class PredictRequest(GenerationFields):
    """As a chat completion; the model's name is not needed, and answers are short and lively unless told otherwise."""

    model: str | None = None
    messages: Messages
    max_tokens: int | None = Field(None, ge=1, le=MAX_ID, description="512 if not given.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_ID, description="Another name of max_tokens.")
    temperature: float | None = option("temperature", MAX_TEMPERATURE, "0.7 if not given.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES, description="Above 0, only with logprobs.")
    response_format: Format | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "any", "required"] | NamedTool | None = Field(
        None, description="any is another name of required."
    )
    parallel_tool_calls: bool | None = None
    functions: list[ToolFunction] | None = Field(None, description="The older form of tools.")
    function_call: Literal["none", "auto"] | FunctionName | None = Field(
        None, description="The older form of tool_choice."
    )
    modalities: list[Literal["text"]] | None = None
    prediction: Json | None = Field(None, description=NO_CHANGE)
    reasoning_effort: Effort | None = Field(
        None, description="How hard to think, for models that can be told; Mistral's know none and high."
    )
    verbosity: str | None = Field(None, description=NO_CHANGE)
    safe_prompt: Literal[False] | None = None


class ChatRequest(PredictRequest):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    model: str
    max_tokens: int | None = Field(None, ge=1, le=MAX_ID, description="The rest of the context if not given.")
    temperature: float | None = option("temperature", MAX_TEMPERATURE)


Tokens = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    model: str
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(None, ge=0, le=MAX_ID, description="16 if not given; 0 only with echo.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_ALTERNATIVES, description="Of each token, and of so many likeliest in its place."
    )
    echo: bool | None = Field(None, description="The prompt comes first, with logprobs those of its tokens.")
    response_format: Format | None = None


class TokenizeRequest(Strict):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = Field(None, description="A text for /v1/completions.")
    messages: Messages | None = None
    tools: Tools | None = Field(None, description="Only with messages.")


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[TokenId]
