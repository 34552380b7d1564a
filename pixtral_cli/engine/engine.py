"""Requests in, tokens out: submit, step, cancel. Knows no text and no HTTP."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count
from threading import RLock

import torch
from torch import Tensor

from pixtral_cli.engine import sampler
from pixtral_cli.engine.pages import PageTable
from pixtral_cli.engine.request import Event, Failure, Request, TokenEvent
from pixtral_cli.engine.runner import ImageFeatures, Runner
from pixtral_cli.engine.scheduler import Chunk, Scheduler
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.errors import BrokenLogits, PromptTooLong, RequestError
from pixtral_cli.model.kv_cache import PAGE, KVCache, pages_for
from pixtral_cli.model.language_model import LanguageModel

IMAGE_CACHE = 512 * 2**20  # bytes
Sink = Callable[[Event], None]


@dataclass
class Counters:
    """What an engine has done since it was made."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Engine:
    """Runs up to `max_batch_size` requests at once; more wait.

    `max_length` bounds the tokens of one prompt and its answer; default the model's own. Keys and values have room
    for `kv_tokens` tokens of all requests together, by default as many as the batch can need; those of requests that
    have ended stay known, up to the share `kv_kept` of that room. `image_cache` is how many bytes of pictures' features
    are kept. In float32 on a CPU a request gets the very tokens that it gets alone.

    Several threads may submit, take and cancel, which never wait for a step but to take: whoever waits for an event
    drives the steps, and the others' events are kept for them.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_length: int | None = None,
        max_batch_size: int = 1,
        max_ce_batch_size: int = 32,
        *,
        kv_tokens: int | None = None,
        kv_kept: float = 1.0,
        image_cache: int = IMAGE_CACHE,
    ) -> None:
        text = model.config.text
        wanted = max_length or text.max_length
        pages = pages_for(wanted) * max_batch_size if kv_tokens is None else max(kv_tokens // PAGE, 1)
        self.model = model
        self.max_length = min(wanted, pages * PAGE)
        self.counters = Counters()
        self.table = PageTable(pages, int(pages * kv_kept))
        exact = model.dtype == torch.float32 and model.device.type == "cpu"
        self.scheduler = Scheduler(self.table, max_batch_size, max_ce_batch_size, exact)
        self.features = ImageFeatures(model, image_cache)
        kv_cache = KVCache(text, model.dtype, model.device, pages)
        self.runner = Runner(model, kv_cache, self.features, exact)
        self._ids = count()
        self._arrived: deque[tuple[Sequence, Sink]] = deque()
        self._cancelled: deque[int] = deque()
        self._sinks: dict[int, Sink] = {}
        self._boxes: dict[int, deque[Event]] = {}
        self._lock = RLock()

    def check(self, *requests: Request) -> None:
        """Raise RequestError if a request cannot be run: no tokens, unknown ones, or too many."""
        for request in requests:
            self._check_tokens(request.token_ids, 0 if request.max_new_tokens == 0 else 1)

    def _check_tokens(self, token_ids: tuple[int, ...], least: int) -> None:
        """`least`: new tokens that there must be room for."""
        text = self.model.config.text
        if not token_ids:
            raise RequestError("The prompt has no tokens.", hint="Write something, or look at the chat template.")
        if (highest := max(token_ids)) >= text.vocab_size:
            raise RequestError(
                f"The tokenizer gives token {highest}, and the model knows {text.vocab_size}.",
                hint="The model's tokenizer files and its weights may be of different models.",
            )
        if len(token_ids) + least > self.max_length:
            could = self.max_length < text.max_length
            raise PromptTooLong(
                f"The prompt has {len(token_ids)} tokens, and the context has room for {self.max_length}, "
                "the answer included.",
                hint="Shorten it, or send fewer or smaller pictures"
                + (f"; --max-length can be up to {text.max_length}." if could else "."),
            )

    def submit(self, request: Request, sink: Sink | None = None) -> int:
        """Queue a request -> its id. Its events are given to `sink`, by whoever steps, or kept for `take`.

        Raises RequestError as `check`.
        """
        self.check(request)
        room = self.max_length - len(request.token_ids)
        max_tokens = room if request.max_new_tokens is None else min(request.max_new_tokens, room)
        sequence = Sequence(next(self._ids), request, max_tokens, self.model.config.image_token_id)
        if sink is None:
            sink = self._boxes.setdefault(sequence.id, deque()).append
        self._arrived.append((sequence, sink))
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """Drop a request and its memory, after the step under way; unknown and finished ones are passed over."""
        self._boxes.pop(request_id, None)
        self._cancelled.append(request_id)
        if self._lock.acquire(blocking=False):
            try:
                self._welcome()
            finally:
                self._lock.release()

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self._arrived)

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self.running or self.waiting)

    def take(self, request_ids: Collection[int]) -> list[Event]:
        """The next events of these requests, stepping until there is one; those of others wait for whoever asks."""
        while True:
            with self._lock:
                boxes = [self._boxes[request_id] for request_id in request_ids]
                ready = [box.popleft() for box in boxes if box]
                if ready:
                    return ready
                assert self.busy, f"nothing will ever come for {request_ids}"
                self.step()

    def step(self) -> list[Event]:
        """Compute one step of all running requests -> at most one event each; none while prompts are computed."""
        with self._lock:
            self._welcome()
            chunks = self.scheduler.schedule()
            events = self._run(chunks) if chunks else []
            for event in events:
                self._deliver(event)
            return events

    def fail(self, error: Exception) -> None:
        """End every request with `error`; those that come later begin afresh."""
        with self._lock:
            self._welcome()
            for request_id in list(self._sinks):
                self._deliver(Failure(request_id, error))

    def _welcome(self) -> None:
        """Take in what was submitted and cancelled meanwhile, in that order."""
        while self._arrived:
            sequence, sink = self._arrived.popleft()
            self._sinks[sequence.id] = sink
            self.scheduler.add(sequence)
        while self._cancelled:
            request_id = self._cancelled.popleft()
            self._sinks.pop(request_id, None)
            self.scheduler.remove(request_id)

    def _deliver(self, event: Event) -> None:
        ended = isinstance(event, Failure) or event.finish_reason is not None
        if ended:
            self.scheduler.remove(event.request_id)
        self._sinks[event.request_id](event)
        if ended:
            del self._sinks[event.request_id]

    def _run(self, chunks: list[Chunk]) -> list[Event]:
        """What the chunks give. If that fails, each is tried by itself, so that only the request at fault fails."""
        try:
            logits, scores = self.runner.run(chunks)
        except Exception as error:
            if len(chunks) == 1:
                return [Failure(chunks[0].sequence.id, error)]
            return [event for chunk in chunks for event in self._run([chunk])]
        ready = [chunk.sequence for chunk in chunks if chunk.completes]
        for chunk in chunks:
            if chunk.sequence.id in scores:
                chunk.sequence.score(scores[chunk.sequence.id])
            self.scheduler.computed(chunk)
        likeliest = logits.argmax(-1, keepdim=True)
        highest = logits.gather(-1, likeliest).flatten().tolist()  # one wait for the device, however many requests
        return [self._next(*each) for each in zip(ready, logits, likeliest.flatten().tolist(), highest, strict=True)]

    def _next(self, sequence: Sequence, logits: Tensor, likeliest: int, highest: float) -> Event:
        try:
            if not math.isfinite(highest):  # so it is as well where a single score is no number
                raise BrokenLogits
            if any(each.logprobs.isnan().any() for each in sequence.scores):
                raise BrokenLogits
            return self._advance(sequence, logits, likeliest) if sequence.max_tokens else self._end_of_prompt(sequence)
        except Exception as error:
            return Failure(sequence.id, error)

    def _advance(self, sequence: Sequence, logits: Tensor, likeliest: int) -> TokenEvent:
        request, first = sequence.request, not sequence.generated
        token_id, constraint = likeliest, request.constraint
        if not request.sampling.greedy or request.sampling.alters_logits or constraint is not None:
            answer = sequence.token_ids[sequence.prompt_length :]
            token_id = sampler.choose(logits, request.sampling, request.token_ids, answer, sequence.random, constraint)
        if constraint is not None:
            constraint.accept(token_id)
        sequence.append(token_id)
        self._count(sequence, first)
        logprob, alternatives = None, ()
        if request.logprobs is not None:
            logprob, alternatives = sampler.logprob(logits, token_id, request.logprobs)
        return TokenEvent(
            sequence.id,
            token_id,
            sequence.finish_reason,
            logprob,
            alternatives,
            sequence.cached_tokens,
            sequence.take_scores(),
        )

    def _end_of_prompt(self, sequence: Sequence) -> TokenEvent:
        self._count_prompt(sequence)
        cached, scores = sequence.cached_tokens, sequence.take_scores()
        return TokenEvent(sequence.id, None, sequence.finish_reason, cached_tokens=cached, prompt_scores=scores)

    def _count(self, sequence: Sequence, first: bool) -> None:
        self.counters.generated_tokens += 1
        if first:
            self._count_prompt(sequence)

    def _count_prompt(self, sequence: Sequence) -> None:
        self.counters.prompt_tokens += sequence.prompt_length
        self.counters.cached_tokens += sequence.cached_tokens
