"""Prompts in, streams of text events out: the one way that every command takes. Joins prompt and engine.

Each layer wraps the one below: the engine's tokens become text by bytes, stop strings cut the text, and the last
event carries the whole reply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

from pixtral_cli import constraints
from pixtral_cli.engine import request
from pixtral_cli.engine.request import Event, Failure, ImageInput, Request, TokenEvent
from pixtral_cli.errors import RequestError
from pixtral_cli.generation_options import GenerationOptions
from pixtral_cli.prompt.thoughts import AnswerReader
from pixtral_cli.prompt.tokenizer import ByteStream, StopMatcher
from pixtral_cli.prompt.tool_calls import ToolCallDelta, ToolCallReader, joined
from pixtral_cli.prompt.tools import ToolCall

if TYPE_CHECKING:
    from pixtral_cli.engine.driver import Driver
    from pixtral_cli.engine.grammar import Constraint
    from pixtral_cli.engine.request import TokenScores
    from pixtral_cli.prompt.processor import Prompt
    from pixtral_cli.prompt.tokenizer import Tokenizer

FinishReason = Literal[request.FinishReason, "tool_calls"]
Label = Callable[[int], str]
"""A token id -> the text that the token is shown as."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its text (bytes that are no whole character show as U+FFFD) and natural log-probability.

    The first token of a prompt has no log-probability.
    """

    token_id: int
    token: str
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(
        cls, token_id: int, logprob: float | None, alternatives: Iterable[tuple[int, float]], label: Label
    ) -> TokenLogprob:
        top = tuple(cls(other, label(other), score) for other, score in alternatives)
        return cls(token_id, label(token_id), logprob, top)


@dataclass(frozen=True, eq=False)
class Echo:
    """A prompt that is repeated before its answer.

    `text` is the prompt as it was written; of one that was given as tokens, what they spell, control tokens left out.
    `scores` are the engine's, of all tokens but the first; None if they were not asked for.
    """

    text: str
    token_ids: list[int]
    tokenizer: Tokenizer
    scores: tuple[TokenScores, ...] | None = None

    @classmethod
    def of(cls, prompt: Prompt, tokenizer: Tokenizer) -> Echo:
        text = _spelled(prompt.token_ids, tokenizer) if prompt.text is None else prompt.text
        return cls(text, prompt.token_ids, tokenizer)

    @cached_property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Of every token. They are made when first asked for: of a long prompt that takes a while."""
        if self.scores is None:
            return None
        ids, label = self.token_ids, cache(self.tokenizer.label)
        told = [TokenLogprob.of(ids[0], None, (), label)]
        for scores in self.scores:
            for logprob, *best in zip(*(each.tolist() for each in scores), strict=True):
                told.append(TokenLogprob.of(ids[len(told)], logprob, zip(*best, strict=True), label))
        return told

    @property
    def offsets(self) -> list[int]:
        """Where in `text` each token begins."""
        offsets = [0]
        for token_id in self.token_ids:
            offsets.append(offsets[-1] + self._width(token_id, offsets[-1]))
        return [min(offset, len(self.text)) for offset in offsets[:-1]]

    def _width(self, token_id: int, at: int) -> int:
        """Characters that begin in the token at the place `at`: none in a control token that the text does not show."""
        data = self.tokenizer.token_bytes(token_id)
        if not data:
            label = self.tokenizer.label(token_id)
            return len(label) if self.text.startswith(label, at) else 0
        if at == 0 and self.tokenizer.drops_first_space and not self.text.startswith(" "):
            data = data.removeprefix(b" ")
        return characters(data)


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, of the answer, and those of the prompt that stand for images or were computed before.

    Of the answer, `proposed_tokens` were looked up in what came before and computed in advance; `accepted_tokens` of
    them were right.
    """

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int
    cached_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    reasoning_tokens: int = 0
    """Those of the answer that were thoughts, the marks around them included."""


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
    """A whole answer. `token_ids` are all that the model chose, its end token included; `text` has no stop string.

    The finish reason is "tool_calls" when the model ended its answer with `tool_calls`. When it is "length", the last
    of them may be cut off: its arguments are then the beginning of some JSON. `echo` is the prompt, if it was asked
    for. `reasoning_content` is what the model thought before it answered, no part of `text`; of its tokens and
    log-probabilities there are all.
    """

    model: str
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    echo: Echo | None = None
    reasoning_content: str = ""


@dataclass(unsafe_hash=True)  # not frozen, which takes four times as long: there is one for each token
class TextEvent:
    """What one token adds. `text` may be empty: half a character, or what may begin a stop string, is held back.

    What belongs to tool calls comes in `tool_call_deltas`, and the whole `tool_calls` with the last event. The first
    event has the `echo`; where no answer was asked for, it is the only one, without a token. Not to be changed.
    """

    text: str
    token_id: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    reply: Reply | None = None  # on the last event
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_deltas: tuple[ToolCallDelta, ...] = ()
    echo: Echo | None = None
    usage: Usage | None = None
    """Up to this token."""
    reasoning_content: str = ""
    """More of a thought; a stop string in it stops nothing."""


class TextStream:
    """One request on its way from tokens to text. Keeps what the reply tells of the prompt, and not its images."""

    def __init__(
        self, model: str, prompt: Prompt, options: GenerationOptions, tokenizer: Tokenizer, load_s: float
    ) -> None:
        self.model, self.tokenizer, self.load_s = model, tokenizer, load_s
        self.prompt_token_ids, self.image_tokens = prompt.token_ids, prompt.image_tokens
        calls = ToolCallReader(
            tokenizer,
            at_start=prompt.answer_starts_text,
            reads_calls=bool(prompt.tools) and options.tool_choice != "none",
            only_calls=prompt.call_form == "text" and options.must_call,
        )
        self.reader = AnswerReader(
            tokenizer,
            calls,
            prompt.thought_marks,
            is_open=prompt.thought_is_open,
            may_think=prompt.answer_starts_text,
        )
        self.stops = StopMatcher(options.stops)
        self.text: list[str] = []
        self.thought: list[str] = []
        self.call_deltas: list[ToolCallDelta] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if options.alternatives is None else []
        self.echo = Echo.of(prompt, tokenizer) if options.echo else None
        self.cached_tokens = 0
        self.looked_up = 0, 0  # proposed, accepted
        self.started = self.first_token = time.perf_counter()

    def push(self, event: TokenEvent) -> TextEvent:
        """Take the engine's next token; a stop string ends the answer before the engine would."""
        echo = self._begin(event) if not self.token_ids else None
        if event.token_id is None:
            return TextEvent("", None, None, "length", self._reply("length"), echo=echo, usage=self.usage)
        self.token_ids.append(event.token_id)
        self.looked_up = event.proposed_tokens, event.accepted_tokens
        added = self.reader.push(event.token_id)
        if event.finish_reason:
            added = added.then(self.reader.finish(cut=event.finish_reason == "length"))
        text, deltas, thought = added
        text, stopped = self.stops.push(text)
        if event.finish_reason and not stopped:
            text += self.stops.flush()
        self.text.append(text)
        self.thought.append(thought)
        self.call_deltas += deltas
        logprob = None if self.logprobs is None else self._logprob(event, self.logprobs)
        finish: FinishReason | None = "stop" if stopped else event.finish_reason
        if self.call_deltas and finish == "stop":
            finish = "tool_calls"
        reply = self._reply(finish) if finish else None
        calls = reply.tool_calls if reply else ()
        return TextEvent(text, event.token_id, logprob, finish, reply, calls, deltas, echo, self.usage, thought)

    def _begin(self, event: TokenEvent) -> Echo | None:
        """Take what the first event tells of the prompt."""
        self.first_token = time.perf_counter()
        self.cached_tokens = event.cached_tokens
        if self.echo is not None and self.logprobs is not None:
            self.echo = replace(self.echo, scores=event.prompt_scores)
        return self.echo

    @property
    def usage(self) -> Usage:
        prompt, answer = len(self.prompt_token_ids), len(self.token_ids)
        return Usage(prompt, answer, self.image_tokens, self.cached_tokens, *self.looked_up, self.reader.tokens)

    def _logprob(self, event: TokenEvent, told: list[TokenLogprob]) -> TokenLogprob:
        assert event.token_id is not None and event.logprob is not None, event
        label = self._text_of if self.echo is None else self.tokenizer.label  # an echo names its control tokens
        told.append(TokenLogprob.of(event.token_id, event.logprob, event.alternatives, label))
        return told[-1]

    def _text_of(self, token_id: int) -> str:
        return self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _reply(self, finish: FinishReason) -> Reply:
        text = "".join(self.text)
        return Reply(
            self.model,
            text,
            self.token_ids,
            self.prompt_token_ids,
            finish,
            self.usage,
            self._timings(),
            self.logprobs,
            joined(self.call_deltas),
            self.echo,
            "".join(self.thought),
        )

    def _timings(self) -> Timings:
        now = time.perf_counter()
        prefill, decode = self.first_token - self.started, now - self.first_token
        decoded = max(len(self.token_ids) - 1, 0)
        return Timings(
            load_s=self.load_s,
            first_token_s=prefill,
            prefill_tokens_per_s=len(self.prompt_token_ids) / max(prefill, 1e-9),
            decode_tokens_per_s=decoded / max(decode, 1e-9) if decoded else 0.0,
            total_s=now - self.started,
        )


def engine_request(
    prompt: Prompt,
    options: GenerationOptions,
    ends: frozenset[int],
    tokenizer: Tokenizer,
    constraint: Constraint | None,
) -> Request:
    """The engine's form of a prompt. Images become pixels when the engine gets to them. Raises RequestError."""
    sampling, known = options.sampling, tokenizer.id_limit
    if outside := [token_id for token_id in sampling.logit_bias if token_id >= known]:
        raise RequestError(f"logit_bias has token {outside[0]}, and the model knows {known}.")
    banned = constraints.banned(prompt, options, tokenizer) if prompt.tools else {}
    return Request(
        token_ids=tuple(prompt.token_ids),
        max_new_tokens=None if options.max_new_tokens == -1 else options.max_new_tokens,
        images=tuple(ImageInput(image.key, image.features, image.pixels) for image in prompt.images),
        sampling=replace(sampling, logit_bias={**sampling.logit_bias, **banned}),
        end_token_ids=frozenset() if options.ignore_eos else ends,
        logprobs=options.alternatives,
        prompt_logprobs=options.alternatives if options.echo else None,
        constraint=constraint,
    )


def nth(request: Request, place: int) -> Request:
    """The same request for another answer: the next seed, and the grammar from its beginning."""
    sampling, constraint = request.sampling, request.constraint
    if sampling.seed is not None:
        sampling = replace(sampling, seed=(sampling.seed + place) % 2**63)
    return replace(request, sampling=sampling, constraint=constraint and constraint.fresh())


def run(driver: Driver, jobs: list[tuple[Request, TextStream]]) -> Generator[tuple[int, TextEvent]]:
    """Run the requests together -> (place in `jobs`, event) as they come, until all have ended.

    Raises what the engine fails with. Whoever stops listening early frees the engine: what still runs is cancelled.
    """
    arrived: SimpleQueue[list[Event]] = SimpleQueue()
    streams = [stream for _, stream in jobs]
    running: dict[int, int] = {}
    """The engine's ids, and the places."""
    try:
        running.update((driver.submit(request, arrived.put), place) for place, (request, _) in enumerate(jobs))
        jobs.clear()  # the engine lets go of the images once they are computed, and so must we
        while running:
            for event in arrived.get():
                if isinstance(event, Failure):
                    raise event.error
                if (place := running.get(event.request_id)) is not None:  # else a stop string has ended it
                    text_event = streams[place].push(event)
                    if text_event.finish_reason:
                        del running[event.request_id]
                        driver.cancel(event.request_id)
                    yield place, text_event
    finally:
        for request_id in running:
            driver.cancel(request_id)


def characters(data: bytes) -> int:
    """How many characters begin in these bytes of UTF-8; of a character cut in two, the second half begins none."""
    return sum(byte & 0xC0 != 0x80 for byte in data)


def _spelled(token_ids: list[int], tokenizer: Tokenizer) -> str:
    stream = ByteStream(tokenizer)
    return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()
