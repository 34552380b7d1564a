"""Prompts in, streams of text events out: the one way that every command takes. Joins prompt and engine.

Each layer wraps the one below: the engine's tokens become text by bytes, stop strings cut the text, and the last
event carries the whole reply.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pixtral_cli.engine.request import FinishReason, Request, Sampling, TokenEvent
from pixtral_cli.errors import RequestError
from pixtral_cli.model.plan import check_prompt
from pixtral_cli.prompt.stops import StopMatcher
from pixtral_cli.prompt.tokenizer import ByteStream

if TYPE_CHECKING:
    from pixtral_cli.engine.engine import Engine
    from pixtral_cli.prompt.processor import Processor, Prompt


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer.

    max_new_tokens: the longest answer in tokens; -1 is until the end of the context.
    top_k: choose among that many likeliest tokens, 0 is off. None is 1 (greedy), or off with a temperature above 0.
    temperature: None is 0 (greedy), or 1 when a top_k above 1 is given.
    top_p, min_p, repetition_penalty: 1, 0 and 1 switch them off.
    seed: the same seed, the same choices; None draws a new one.
    stop: the answer ends before the first of these texts.
    ignore_eos: go on after the model's end-of-answer token.
    logprobs: True, or the number of alternatives to report beside each token.
    """

    max_new_tokens: int = -1
    top_k: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: bool | int = False

    def __post_init__(self) -> None:
        _check(self.max_new_tokens == -1 or self.max_new_tokens > 0, "max_new_tokens", "-1 or above 0")
        _check(self.top_k is None or self.top_k >= 0, "top_k", "0 or above")
        _check(self.temperature is None or 0 <= self.temperature < math.inf, "temperature", "0 or above")
        _check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        _check(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        _check(0 < self.repetition_penalty < math.inf, "repetition_penalty", "above 0")
        _check(all(self.stops), "stop", "text, not an empty string")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> Sampling:
        top_k = self.top_k if self.top_k is not None else (0 if self.temperature else 1)
        temperature = self.temperature if self.temperature is not None else (0.0 if top_k == 1 else 1.0)
        return Sampling(temperature, top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed)

    @property
    def alternatives(self) -> int | None:
        """For the engine: None without log-probabilities, else how many alternatives."""
        if self.logprobs is False:
            return None
        return 0 if self.logprobs is True else self.logprobs


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its text (bytes that are no whole character show as U+FFFD) and natural log-probability."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, of the answer, and those of the prompt that stand for pictures."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds to load the model, to the first token and in all since the request; rates in tokens a second."""

    load_s: float
    first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    total_s: float


@dataclass(frozen=True)
class Reply:
    """A whole answer. `token_ids` are all that the model chose, its end token included; `text` has no stop string."""

    model: str
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class TextEvent:
    """What one token adds. `text` may be empty: half a character, or what may begin a stop string, is held back."""

    text: str
    token_id: int
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    reply: Reply | None = None  # on the last event


@dataclass
class Answering:
    """One request on its way from tokens to text."""

    model: str
    prompt: Prompt
    options: GenerationOptions
    processor: Processor
    load_s: float
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.bytes = ByteStream(self.processor.tokenizer)
        self.stops = StopMatcher(self.options.stops)
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.first_token = self.started

    def push(self, event: TokenEvent) -> TextEvent:
        """Take the engine's next token; a stop string ends the answer before the engine would."""
        if not self.token_ids:
            self.first_token = time.perf_counter()
        self.token_ids.append(event.token_id)
        text, stopped = self.stops.push(self.bytes.push(event.token_id))
        if event.finish_reason and not stopped:
            rest, stopped = self.stops.push(self.bytes.finish())
            text += rest if stopped else rest + self.stops.flush()
        self.text.append(text)
        logprob = self._logprob(event)
        finish: FinishReason | None = "stop" if stopped else event.finish_reason
        return TextEvent(text, event.token_id, logprob, finish, self._reply(finish) if finish else None)

    def _logprob(self, event: TokenEvent) -> TokenLogprob | None:
        if event.logprob is None:
            return None
        top = tuple(self._named(*pair) for pair in event.alternatives)
        self.logprobs.append(self._named(event.token_id, event.logprob, top))
        return self.logprobs[-1]

    def _named(self, token_id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        token = self.processor.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return TokenLogprob(token_id, token, logprob, top)

    def _reply(self, finish: FinishReason) -> Reply:
        prompt = self.prompt
        usage = Usage(len(prompt.token_ids), len(self.token_ids), sum(image.tokens for image in prompt.images))
        return Reply(
            self.model,
            "".join(self.text),
            self.token_ids,
            prompt.token_ids,
            finish,
            usage,
            self._timings(),
            self.logprobs if self.options.alternatives is not None else None,
        )

    def _timings(self) -> Timings:
        now = time.perf_counter()
        prefill, decode = self.first_token - self.started, now - self.first_token
        decoded = len(self.token_ids) - 1
        return Timings(
            load_s=self.load_s,
            first_token_s=prefill,
            prefill_tokens_per_s=len(self.prompt.token_ids) / max(prefill, 1e-9),
            decode_tokens_per_s=decoded / max(decode, 1e-9) if decoded else 0.0,
            total_s=now - self.started,
        )


def engine_request(prompt: Prompt, options: GenerationOptions, ends: frozenset[int], engine: Engine) -> Request:
    """The engine's form of a prompt. Raises RequestError when it does not fit the context, or the memory."""
    length, context = len(prompt.token_ids), engine.max_length
    if length >= context:
        raise RequestError(
            f"The prompt has {length} tokens, and the context has room for {context}, the answer included.",
            hint="Shorten it, send fewer or smaller pictures, or raise --max-length where the model allows it.",
        )
    check_prompt(engine.model.config.text, length, engine.model.dtype, engine.model.device)
    room = context - length
    return Request(
        token_ids=tuple(prompt.token_ids),
        max_new_tokens=room if options.max_new_tokens == -1 else min(options.max_new_tokens, room),
        pictures=tuple(image.pixels() for image in prompt.images),
        sampling=options.sampling,
        end_token_ids=frozenset() if options.ignore_eos else ends,
        logprobs=options.alternatives,
    )


def run(engine: Engine, requests: Sequence[tuple[Request, Answering]]) -> Iterator[tuple[int, TextEvent]]:
    """Run the requests together -> (place in `requests`, event) as they come, until all have ended.

    Whoever stops listening early frees the engine: what still runs is cancelled.
    """
    open_requests = {
        engine.submit(request): (place, answering) for place, (request, answering) in enumerate(requests)
    }
    try:
        while open_requests:
            for token in engine.step():
                if token.request_id not in open_requests:
                    continue
                place, answering = open_requests[token.request_id]
                event = answering.push(token)
                if event.finish_reason:
                    del open_requests[token.request_id]
                    engine.cancel(token.request_id)
                yield place, event
    finally:
        for request_id in open_requests:
            engine.cancel(request_id)


def _check(holds: bool, name: str, wanted: str) -> None:
    if not holds:
        raise RequestError(f"{name} should be {wanted}.")
