"""How to answer, by name, in; checked values and the engine's Sampling out. Knows no prompt, no model and no torch.

The ranges of the options are one table, for flags, Python and HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pixtral_cli.engine.request import Sampling
from pixtral_cli.errors import RequestError

SPECULATIVE = ("auto", "off")
"""Whether several tokens of a greedy answer are computed at once: where it pays, or never."""
FORMATS = ("text", "json_object", "json_schema")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS = get_args(Effort)
"""How hard a model may be asked to think. Mistral's know "none" and "high"."""
CHOICES = ("auto", "none", "required")
ANY_OBJECT = {"type": "object"}
FORMAT_HINT = 'Give {"type": "json_schema", "json_schema": {"name": "…", "schema": {…}}}.'
CHOICE_HINT = 'Give "auto", "none", "required" or {"type": "function", "function": {"name": "…"}}.'


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `whole` ones only, or any finite ones."""

    low: float
    high: float = math.inf
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        """True and False are no numbers, and a whole number is a float as well."""
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return self.low <= value <= self.high and value < math.inf

    def __str__(self) -> str:
        """As in "top_p should be …"."""
        number = "a whole number, " if self.whole else ""
        return number + (f"from {self.low} to {self.high}" if self.high < math.inf else f"{self.low} or above")


OPTION_RANGES = {
    "top_k": Range(-1, whole=True),
    "temperature": Range(0),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0.001, 1000),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "logit_bias": Range(-100, 100),
    "seed": Range(-(2**63) + 1, 2**63 - 1, whole=True),
    "logprobs": Range(0, whole=True),
}
"""What each option may be. `top_k` 0 and -1 and a `seed` below 0 mean that none is set; `top_p` 0 is greedy."""
RANGED = [name for name in OPTION_RANGES if name not in ("logit_bias", "logprobs")]


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer.

    max_new_tokens: the longest answer in tokens; -1 is until the end of the context.
    top_k: choose among that many likeliest tokens, 0 or -1 is off. None is 1 (greedy), or off with a temperature
        above 0.
    temperature: None is 0 (greedy), or 1 when a top_k above 1 is given.
    top_p, min_p, repetition_penalty: 1, 0 and 1 switch them off; a top_p of 0 is greedy.
    frequency_penalty, presence_penalty: from -2 to 2; taken off a token's score for every time that the answer has it,
        and once if it does.
    logit_bias: token ids, and what is added to their scores, from -100 to 100.
    seed: the same seed, the same choices; None, or one below 0, draws a new one.
    stop: the answer ends before the first of these texts.
    ignore_eos: go on after the model's end-of-answer token.
    logprobs: True, or the number of alternatives to report beside each token.
    echo: repeat the prompt in Reply.echo, with `logprobs` those of its tokens as well; max_new_tokens may be 0 then.
    response_format: OpenAI's, {"type": "text" | "json_object" | "json_schema", "json_schema": {"schema": …}}; the
        answer keeps to it, `strict` or not.
    tool_choice: OpenAI's, "auto", "none", "required" or {"type": "function", "function": {"name": …}}.
    parallel_tool_calls: whether an answer may hold several calls.
    reasoning_effort: how hard to think before the answer, for models that can be told; Mistral's know "none", "high".
    """

    max_new_tokens: int = -1
    top_k: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int | str, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    ignore_eos: bool = False
    logprobs: bool | int = False
    echo: bool = False
    response_format: Mapping[str, Any] | None = None
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None

    def __post_init__(self) -> None:
        for name in ("echo", "parallel_tool_calls"):
            if not isinstance(value := getattr(self, name), bool):
                raise RequestError(f"{name} should be true or false, not {value!r}.")
        length = self.max_new_tokens
        if length not in Range(-1, whole=True) or (length == 0 and not self.echo):
            raise _wrong("max_new_tokens", length, "-1 or a whole number above 0")
        for name in RANGED:
            value, wanted = getattr(self, name), OPTION_RANGES[name]
            optional = type(self).__dataclass_fields__[name].default is None
            if value not in wanted and not (optional and value is None):
                raise _wrong(name, value, "a whole number up to 2^63 - 1" if name == "seed" else wanted)
        if self.logit_bias is not None:
            self._check_bias(self.logit_bias)
        if not isinstance(self.logprobs, bool) and self.logprobs not in OPTION_RANGES["logprobs"]:
            raise _wrong("logprobs", self.logprobs, "True, False or a number of alternatives")
        if self.reasoning_effort not in (None, *EFFORTS):
            raise _wrong("reasoning_effort", self.reasoning_effort, f"{', '.join(EFFORTS[:-1])} or {EFFORTS[-1]}")
        self._check_stop()
        _ = self.schema  # which raises for what it is not
        if self.tool_choice not in CHOICES and self.chosen_tool is None:
            raise RequestError(f"tool_choice should be {', '.join(CHOICES)} or name a function.", hint=CHOICE_HINT)

    def _check_stop(self) -> None:
        if not isinstance(self.stop, str | list | tuple | None):
            raise RequestError(f"stop should be a text or a list of texts, not {self.stop!r}.")
        for stop in self.stops:
            if not isinstance(stop, str) or not stop:
                raise _wrong("stop", stop, "texts, none of them empty")

    @staticmethod
    def _check_bias(biases: Any) -> None:
        if not isinstance(biases, Mapping):
            raise RequestError(f"logit_bias should be an object of token ids and numbers, not {biases!r}.")
        for token_id, value in biases.items():
            known = isinstance(token_id, int) or (isinstance(token_id, str) and token_id.isdecimal())
            if not known or int(token_id) < 0:
                raise RequestError(f"The keys of logit_bias should be token ids, not {token_id!r}.")
            if value not in OPTION_RANGES["logit_bias"]:
                raise _wrong("logit_bias", value, f"numbers {OPTION_RANGES['logit_bias']}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GenerationOptions:
        """Options by name. Raises RequestError, also for a name that is none."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise RequestError(f"There is no option {name!r}.", hint=f"Options are {', '.join(known)}.")
        return cls(**options)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling(self) -> Sampling:
        top_k = self.top_k if self.top_k is not None else (0 if self.temperature else 1)
        temperature = self.temperature if self.temperature is not None else (0.0 if top_k == 1 else 1.0)
        return Sampling(
            temperature,
            top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.frequency_penalty,
            self.presence_penalty,
            {int(token_id): float(bias) for token_id, bias in (self.logit_bias or {}).items()},
            None if self.seed is None or self.seed < 0 else self.seed,
        )

    @property
    def alternatives(self) -> int | None:
        """For the engine: None without log-probabilities, else how many alternatives."""
        if self.logprobs is False:
            return None
        return 0 if self.logprobs is True else self.logprobs

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """The JSON schema that `response_format` asks for; None for plain text. Raises RequestError."""
        asked = self.response_format
        if asked is None:
            return None
        kind = asked.get("type") if isinstance(asked, Mapping) else None
        if kind not in FORMATS:
            raise RequestError(f"The type of response_format should be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
        if kind != "json_schema":
            return ANY_OBJECT if kind == "json_object" else None
        described = asked.get("json_schema")
        schema = described.get("schema") if isinstance(described, Mapping) else None
        if not isinstance(schema, dict):
            wanted = "response_format.json_schema.schema should be an object: a JSON schema."
            raise RequestError(wanted, hint=FORMAT_HINT)
        return schema

    @property
    def chosen_tool(self) -> str | None:
        """The name of the one function that `tool_choice` names."""
        function = self.tool_choice.get("function") if isinstance(self.tool_choice, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        return name if isinstance(name, str) else None

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice not in ("auto", "none")


def _wrong(name: str, value: Any, wanted: object) -> RequestError:
    return RequestError(f"{name} should be {wanted}, not {value!r}.", hint=f"Change {name}, or leave it out.")
