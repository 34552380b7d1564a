"""How to answer, by name, in; checked values and the engine's Sampling out. Knows no prompt and no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pixtral_cli import constraints
from pixtral_cli.engine.sampler import Sampling
from pixtral_cli.errors import RequestError


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

    def __post_init__(self) -> None:
        if not isinstance(self.echo, bool):
            raise RequestError(f"echo should be true or false, not {self.echo!r}.")
        if not (self.echo and self.max_new_tokens == 0):
            wanted = "-1 or a whole number above 0"
            _check("max_new_tokens", self.max_new_tokens, int, lambda n: n == -1 or n > 0, wanted)
        _check("top_k", self.top_k, int, lambda k: k >= -1, "a whole number, -1 or above", optional=True)
        _check("temperature", self.temperature, float, lambda t: 0 <= t < math.inf, "0 or above", optional=True)
        _check("top_p", self.top_p, float, lambda p: 0 <= p <= 1, "from 0 to 1")
        _check("min_p", self.min_p, float, lambda p: 0 <= p <= 1, "from 0 to 1")
        _check("repetition_penalty", self.repetition_penalty, float, lambda x: 1e-3 <= x <= 1e3, "from 0.001 to 1000")
        _check("frequency_penalty", self.frequency_penalty, float, lambda x: -2 <= x <= 2, "from -2 to 2")
        _check("presence_penalty", self.presence_penalty, float, lambda x: -2 <= x <= 2, "from -2 to 2")
        _check_bias(self.logit_bias)
        _check("seed", self.seed, int, lambda n: abs(n) < 2**63, "a whole number up to 2^63 - 1", optional=True)
        if not isinstance(self.logprobs, bool):
            _check("logprobs", self.logprobs, int, lambda n: n >= 0, "True, False or a number of alternatives")
        if not isinstance(self.stop, str | list | tuple | None):
            raise RequestError(f"stop should be a text or a list of texts, not {self.stop!r}.")
        for stop in self.stops:
            _check("stop", stop, str, bool, "texts, none of them empty")
        constraints.schema_of(self.response_format)
        constraints.check_choice(self.tool_choice)
        if not isinstance(self.parallel_tool_calls, bool):
            raise RequestError(f"parallel_tool_calls should be true or false, not {self.parallel_tool_calls!r}.")

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


def _check(
    name: str, value: Any, kind: type, holds: Callable[[Any], bool], wanted: str, optional: bool = False
) -> None:
    """Raise RequestError unless `value` is of `kind` (a whole number passes for a float) and `holds`."""
    if optional and value is None:
        return
    kinds = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, kinds) or not holds(value):
        raise RequestError(f"{name} should be {wanted}, not {value!r}.", hint=f"Change {name}, or leave it out.")


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, Mapping | None):
        raise RequestError(f"logit_bias should be an object of token ids and numbers, not {bias!r}.")
    for token_id, value in (bias or {}).items():
        if not (isinstance(token_id, int) or (isinstance(token_id, str) and token_id.isdecimal())) or int(token_id) < 0:
            raise RequestError(f"The keys of logit_bias should be token ids, not {token_id!r}.")
        _check("logit_bias", value, float, lambda x: -100 <= x <= 100, "numbers from -100 to 100")
