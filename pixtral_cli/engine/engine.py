"""Requests in, tokens out: submit, cancel, step. Knows no text, no threads and no HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from pixtral_cli.engine import sampler
from pixtral_cli.engine.pages import PageTable
from pixtral_cli.engine.request import Event, Failure, Request, TokenEvent, TokenScores
from pixtral_cli.engine.runner import Computed, ImageFeatures, Runner
from pixtral_cli.engine.scheduler import Chunk, Scheduler
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.errors import BrokenLogits, PromptTooLong, RequestError
from pixtral_cli.model.kv_cache import PAGE, KVCache, pages_for
from pixtral_cli.model.language_model import LanguageModel

IMAGE_CACHE = 512 * 2**20  # bytes


@dataclass
class Counters:
    """What an engine has done since it was made."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Engine:
    """Runs up to `max_batch_size` requests at once; more wait. For one thread at a time, but for `prepare`.

    `max_length` bounds the tokens of one prompt and its answer; default the model's own. Keys and values have room
    for `kv_tokens` tokens of all requests together, by default as many as the batch can need; those of requests that
    have ended stay known, up to the share `kv_kept` of that room. `image_cache` is how many bytes of images' features
    are kept. `kv_cache_dtype` is how keys and values are: "auto" or "fp8". In float32 on a CPU a request gets the very
    tokens that it gets alone.
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
        kv_cache_dtype: str = "auto",
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
        kv_cache = KVCache(text, model.dtype, model.device, pages, kv_cache_dtype)
        self.runner = Runner(model, kv_cache, self.features, exact)
        self._ids = count()

    def check(self, request: Request) -> None:
        """Raise RequestError if the request cannot be run: no tokens, unknown ones, or too many."""
        text, tokens = self.model.config.text, len(request.token_ids)
        if not tokens:
            raise RequestError("The prompt has no tokens.", hint="Write something, or look at the chat template.")
        if (highest := max(request.token_ids)) >= text.vocab_size:
            raise RequestError(
                f"The tokenizer gives token {highest}, and the model knows {text.vocab_size}.",
                hint="The model's tokenizer files and its weights may be of different models.",
            )
        if tokens + (request.max_new_tokens != 0) > self.max_length:
            could = self.max_length < text.max_length
            raise PromptTooLong(
                f"The prompt has {tokens} tokens, and the context has room for {self.max_length}, the answer included.",
                hint="Shorten it, or send fewer or smaller pictures"
                + (f"; --max-length can be up to {text.max_length}." if could else "."),
            )

    def prepare(self, request: Request) -> Sequence:
        """The sequence of a request, with an id of its own, for the scheduler's `add`. Any thread may call it.

        Raises RequestError as `check`.
        """
        self.check(request)
        room = self.max_length - len(request.token_ids)
        max_tokens = room if request.max_new_tokens is None else min(request.max_new_tokens, room)
        return Sequence(next(self._ids), request, max_tokens, self.model.config.image_token_id)

    def submit(self, request: Request) -> int:
        """Queue a request -> the id that its events have. Raises RequestError as `check`."""
        sequence = self.prepare(request)
        self.scheduler.add(sequence)
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """Drop a request and its memory; unknown and finished ones are passed over."""
        self.scheduler.remove(request_id)

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Event]:
        """Compute one step of all running requests -> at most one event each; none while prompts are computed."""
        events: list[Event] = []
        for chunks, computed in self._run(self.scheduler.schedule()):
            if isinstance(computed, Exception):
                events += [Failure(chunk.sequence.id, computed) for chunk in chunks]
                continue
            logits, scores = computed
            sequences = self._advance(chunks, scores)
            choices = sampler.sample(logits, [sequence.row for sequence in sequences])
            events += map(self._event, sequences, choices, logits)
        for event in events:
            if isinstance(event, Failure) or event.finish_reason is not None:
                self.scheduler.remove(event.request_id)
        return events

    def _run(self, chunks: list[Chunk]) -> Iterator[tuple[list[Chunk], Computed | Exception]]:
        """One pass for all chunks. If it fails, each is tried by itself: only the request at fault fails."""
        try:
            if chunks:
                yield chunks, self.runner.run(chunks)
        except Exception as error:  # noqa: BLE001  an image, a kernel, memory: it concerns one request
            if len(chunks) == 1:
                yield chunks, error
                return
            for chunk in chunks:
                yield from self._run([chunk])

    def _advance(self, chunks: list[Chunk], scores: dict[int, TokenScores]) -> list[Sequence]:
        """The chunks are computed -> the sequences whose next token can be chosen, one for each row of logits."""
        completed = [chunk.sequence for chunk in chunks if chunk.completes]
        for chunk in chunks:
            if chunk.sequence.id in scores:
                chunk.sequence.score(scores[chunk.sequence.id])
            self.scheduler.computed(chunk)
        return completed

    def _event(self, sequence: Sequence, choice: int | Exception, logits: Tensor) -> Event:
        """What was chosen after float32 logits [V], as the sequence takes it."""
        try:
            if isinstance(choice, Exception):
                raise choice
            if any(each.logprobs.isnan().any() for each in sequence.scores):
                raise BrokenLogits
            return self._token_event(sequence, choice, logits)
        except Exception as error:  # noqa: BLE001  as in `_run`
            return Failure(sequence.id, error)

    def _token_event(self, sequence: Sequence, token_id: int, logits: Tensor) -> TokenEvent:
        request, chosen, logprob = sequence.request, None, None
        alternatives: tuple[tuple[int, float], ...] = ()
        if not sequence.generated:
            self.counters.prompt_tokens += sequence.prompt_length
            self.counters.cached_tokens += sequence.cached_tokens
        if sequence.max_tokens:  # else only the prompt was to be computed
            chosen = token_id
            if request.constraint is not None:
                request.constraint.accept(chosen)
            sequence.token_ids.append(chosen)
            self.counters.generated_tokens += 1
            if request.logprobs is not None:
                logprob, alternatives = sampler.logprob(logits, chosen, request.logprobs)
        scores, sequence.scores = tuple(sequence.scores), []  # they are told once
        ended = sequence.finish_reason
        return TokenEvent(sequence.id, chosen, ended, logprob, alternatives, sequence.cached_tokens, scores)
