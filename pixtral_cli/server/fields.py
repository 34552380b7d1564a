"""What the fields of requests may hold, as pydantic models; knows no HTTP and nothing of what is done with them.

Names and ranges are those of https://platform.openai.com/docs/api-reference; what has no meaning there (`top_k`,
`min_p`, `repetition_penalty`, `ignore_eos`) has vLLM's. Types are strict: "5" is no number, and true is none either.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pixtral_cli.prompt.tools import NAME

MAX_ANSWERS = 16
MAX_STOPS, STOP_LENGTH = 16, 500
MAX_LIST = 10_000
"""Messages, and parts of one."""
MAX_PROMPTS = 64
MAX_ALTERNATIVES = 20
MAX_ID = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=MAX_ID)]
IdText = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
NoneGiven = Annotated[None, Field(description="Taken back from answers that have it; only null.")]


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


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageAddress(Strict):
    url: Text = Field(description="A data: URI, an http(s) address, or a file below --media-path.")
    detail: Literal["auto", "high"] | None = Field(None, description="Pictures are always seen in full.")


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageAddress | Text


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class CalledFunction(Strict):
    name: str
    arguments: str | dict[str, Any] = Field("", description="JSON text, or an object.")


class Call(Strict):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: str | list[TextPart]


class UserMessage(Strict):
    role: Literal["user"]
    content: str | Annotated[list[Part], Field(max_length=MAX_LIST)]


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Call] | None = None
    refusal: NoneGiven = None
    audio: NoneGiven = None
    function_call: NoneGiven = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: str | list[TextPart]
    tool_call_id: Text
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
HELLO = {"role": "user", "content": "Hello"}
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST, examples=[[HELLO]])]


class ToolFunction(Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments.")
    strict: bool | None = Field(None, description="A forced call keeps to the parameters, strict or not.")


class ToolEntry(Strict):
    type: Literal["function"]
    function: ToolFunction


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
    described_by: dict[str, Any] = Field(alias="schema", description="The JSON schema that the answer keeps to.")
    description: str | None = None
    strict: bool | None = None


class JsonSchema(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")]


class StreamOptions(Strict):
    include_usage: bool = Field(False, description="A last chunk tells the usage.")


class Sampled(Strict):
    """How tokens are chosen. What is not given: the server's flags, the checkpoint's own settings, else greedy."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_ID, description="0 is off.")
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.001, le=1000)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    logit_bias: dict[IdText, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token ids, as strings, and what is added to their scores.", examples=[{"42": -100}]
    )
    ignore_eos: bool | None = Field(None, description="Go on after the model's end-of-answer token.")


class Asked(Sampled):
    """What requests for answers have in common."""

    max_tokens: int | None = Field(None, ge=1, le=MAX_ID)
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, description="Changes no answer.")
    metadata: dict[str, Any] | None = Field(None, description="Changes no answer.")
    store: bool | None = Field(None, description="Changes no answer; nothing is stored.")
    service_tier: str | None = Field(None, description="Changes no answer.")


class PredictRequest(Asked):
    """As a chat completion; the model's name is not needed, and answers are short and lively unless told otherwise."""

    model: str | None = None
    messages: Messages
    max_tokens: int | None = Field(None, ge=1, le=MAX_ID, description="512 if not given.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_ID, description="Another name of max_tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="0.7 if not given.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES, description="Only with logprobs.")
    response_format: Format | None = None
    tools: list[ToolEntry] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class ChatRequest(PredictRequest):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    model: str
    max_tokens: int | None = Field(None, ge=1, le=MAX_ID, description="The rest of the context if not given.")
    temperature: float | None = Field(None, ge=0, le=2)


Tokens = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(Asked):
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
    tools: list[ToolEntry] | None = Field(None, description="Only with messages.")


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[TokenId]
