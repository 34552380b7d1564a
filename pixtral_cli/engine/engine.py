"""Requests in, tokens out: submit, cancel, step. Knows no text, no threads and no HTTP."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from pixtral_cli.engine import sampler
from pixtral_cli.engine.pages import PageTable
from pixtral_cli.engine.request import Event, Failure, Request, TokenEvent, TokenScores
from pixtral_cli.engine.runner import Computed, ImageFeatures, Runner
from pixtral_cli.engine.sampler import Choice, Choices
from pixtral_cli.engine.scheduler import CARD_CHUNKS, Chunk, Scheduler
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.engine.speculation import Speculation
from pixtral_cli.engine.transfers import current_device
from pixtral_cli.errors import BrokenLogits, PromptTooLong, RequestError
from pixtral_cli.model import triton_support
from pixtral_cli.model.kv_cache import PAGE, KVCache, pages_for
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.pass_sizes import IMAGE_CACHE


@dataclass
class Counters:
    """What an engine has done since it was made."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0


class Pass(NamedTuple):
    """Chunks after which tokens were chosen on the device, or that failed."""

    chunks: list[Chunk]
    choices: Choices | Exception


class Step(NamedTuple):
    """A step that was launched at the time `begun`; `rows` were decoded, 0 if there were prompts as well."""

    passes: list[Pass]
    rows: int
    begun: float


class Engine:
    """Runs up to `max_batch_size` requests at once; more wait. For one thread at a time, but for `prepare`.

    `max_length` bounds the tokens of one prompt and its answer; default the model's own. Keys and values have room
    for `kv_tokens` tokens of all requests together, by default as many as the batch can need; those of requests that
    have ended stay known, up to the share `kv_kept` of that room. `image_cache` is how many bytes of images' features
    are kept. `kv_cache_dtype` is how keys and values are: "auto" or "fp8". With `speculative` several tokens of an
    answer are computed in one step where that pays; on a CPU where it changes no bit of them, too. In float32 on a CPU
    a request gets the very tokens that it gets alone. `clock` tells seconds.
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
        speculative: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        text = model.config.text
        wanted = max_length or text.max_length
        pages = pages_for(wanted) * max_batch_size if kv_tokens is None else max(kv_tokens // PAGE, 1)
        self.model = model
        self.max_length = min(wanted, pages * PAGE)
        self.counters = Counters()
        self.table = PageTable(pages, int(pages * kv_kept))
        on_card = triton_support.available(model.device)
        exact = model.dtype == torch.float32 and model.device.type == "cpu"
        chunks = CARD_CHUNKS if on_card else None
        self.scheduler = Scheduler(self.table, max_batch_size, max_ce_batch_size, exact, chunks)
        self.features = ImageFeatures(model, image_cache)
        kv_cache = KVCache(text, model.dtype, model.device, pages, kv_cache_dtype)
        if on_card:
            from pixtral_cli.engine.card_runner import CardRunner

            self.runner: Runner = CardRunner(model, kv_cache, self.features, max_batch_size, self.max_length)
        else:
            self.runner = Runner(model, kv_cache, self.features, exact)
        self.speculation: Speculation | None = None
        if speculative and (exact or model.device.type != "cpu" or model.rows_stand_alone):
            self.speculation = Speculation(model.config.image_token_id)
        self._clock = clock
        self._last_read = 0.0
        self._launched: deque[Step] = deque()
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
        return Sequence(next(self._ids), request, max_tokens, self.model.config.image_token_id, self.model.device)

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
        """Whether a request runs or waits, or a token has not been read."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._launched)

    def warm_up(self) -> None:
        """Prepare what would be prepared when it is first needed."""
        with current_device(self.model.device):
            self.runner.warm_up(self.speculation is not None)

    def step(self) -> list[Event]:
        """Launch a step of all running requests, and read one -> its events.

        On a GPU what is read was launched a step before, so that the device never waits for Python; there is none
        while prompts are computed. A choice that depends on the tokens before it waits for them. A request has several
        events where tokens that were proposed are right.
        """
        with current_device(self.model.device):
            return self._step()

    def _step(self) -> list[Event]:
        events: list[Event] = []
        if self._waits():
            events += self._read(0)
        begun, chunks = self._clock(), self._proposing(self.scheduler.schedule())
        rows = sum(chunk.rows for chunk in chunks) if _decode(chunks) else 0
        passes = self._launch(chunks)
        if passes:
            self._launched.append(Step(passes, rows, begun))
        failed = any(isinstance(each.choices, Exception) for each in passes)
        return events + self._read(0 if failed or not passes else self.runner.steps_ahead)

    def _waits(self) -> bool:
        """Whether what was launched is to be read before anything else is."""
        running = self.scheduler.running
        if any(sequence.row.needs_history for sequence in running):
            return True
        if self.speculation is None or not self._launched:
            return False
        if any(
            chunk.proposed.tokens for launched in self._launched for each in launched.passes for chunk in each.chunks
        ):
            return True
        return not any(each.prefilling for each in running) and self.speculation.promises(running)

    def _proposing(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks, with what is worth computing in advance where all of them decode."""
        if self.speculation is None or self._launched or not _decode(chunks):
            return chunks
        matches = self.speculation.proposals([chunk.sequence for chunk in chunks])
        found = [self.scheduler.proposing(chunk, match) for chunk, match in zip(chunks, matches, strict=True)]
        for sequence, _, (tokens, _) in found:
            sequence.proposed_tokens += len(tokens)
            self.counters.proposed_tokens += len(tokens)
        return found

    def _launch(self, chunks: list[Chunk]) -> list[Pass]:
        """Compute the chunks, choose what comes after them, and wait for nothing."""
        passes = []
        for some, computed in self._run(chunks):
            if isinstance(computed, Exception):
                passes.append(Pass(some, computed))
                continue
            logits, scores = computed
            completed = self._advance(some, scores)
            if completed:
                passes += self._choose(completed, logits)
        return passes

    def _run(self, chunks: list[Chunk]) -> Iterator[tuple[list[Chunk], Computed | Exception]]:
        """One pass for all chunks. If it fails, each is tried by itself: only the request at fault fails."""
        if not chunks:
            return
        result: Computed | Exception
        try:
            result = self.runner.run(chunks)
        except Exception as error:  # noqa: BLE001  an image, a kernel, memory: it concerns one request
            traceback.clear_frames(error.__traceback__)  # they hold what was computed, which may be the memory missing
            result = error
        if isinstance(result, Exception) and len(chunks) > 1:
            for chunk in chunks:
                yield from self._run([chunk])
        else:
            yield chunks, result

    def _advance(self, chunks: list[Chunk], scores: dict[int, TokenScores]) -> list[Chunk]:
        """The chunks are computed -> those after which tokens can be chosen."""
        completed = [chunk for chunk in chunks if chunk.completes]
        for chunk in chunks:
            if chunk.sequence.id in scores:
                chunk.sequence.score(scores[chunk.sequence.id])
            self.scheduler.computed(chunk)
        return completed

    def _choose(self, chunks: list[Chunk], logits: Tensor) -> list[Pass]:
        """A token for each choice of the chunks after float32 logits [N, V]; as in `_run`, who fails fails alone."""
        counts = [1 + len(chunk.proposed.tokens) for chunk in chunks]
        rows = [chunk.sequence.row for chunk, count in zip(chunks, counts, strict=True) for _ in range(count)]
        try:
            choices = sampler.sample(logits, rows)
        except Exception as error:  # noqa: BLE001  memory as well
            traceback.clear_frames(error.__traceback__)
            if len(chunks) == 1:
                return [Pass(chunks, error)]
            alone = zip(chunks, logits.split(counts), strict=True)
            return [each for chunk, rows_of in alone for each in self._choose([chunk], rows_of)]
        if len(rows) == len(chunks):
            self.runner.keep([chunk.sequence for chunk in chunks], choices.token_ids)
        for chunk in chunks:
            if chunk.sequence.max_tokens:  # else only the prompt was to be computed
                chunk.sequence.choose()
        return [Pass(chunks, choices)]

    def _read(self, ahead: int) -> list[Event]:
        """The events of what was launched, but for the last `ahead` steps; who ended is removed."""
        events: list[Event] = []
        while len(self._launched) > ahead:
            passes, rows, begun = self._launched.popleft()
            found = [choices if isinstance(choices, Exception) else choices.read() for _, choices in passes]
            self._took(rows, begun)
            for (chunks, _), choices in zip(passes, found, strict=True):
                each = repeat(choices) if isinstance(choices, Exception) else iter(choices)
                for chunk in chunks:
                    events += self._events(chunk, [next(each) for _ in range(1 + len(chunk.proposed.tokens))])
                if any(chunk.proposed.tokens for chunk in chunks):
                    left = [chunk.sequence for chunk in chunks if not chunk.sequence.removed]
                    self.runner.keep(left)
        return events

    def _took(self, rows: int, begun: float) -> None:
        """A step that was launched at the time `begun` has been computed."""
        now = self._clock()
        if rows and self.speculation is not None:
            self.speculation.times.measured(rows, now - max(begun, self._last_read))  # it began after the one before
        self._last_read = now

    def _events(self, chunk: Chunk, choices: list[Choice | Exception]) -> Iterator[Event]:
        """Those of what was chosen after the chunk, and after what was proposed, as long as that was right."""
        sequence, (tokens, length) = chunk.sequence, chunk.proposed
        if not sequence.removed:  # else it ended a step before, or was cancelled
            yield self._event(sequence, choices[0])
        for place, (token_id, choice) in enumerate(zip(tokens, choices[1:], strict=True)):
            if sequence.removed or not self._is_right(sequence, token_id, length + place):
                return
            self.scheduler.computed(Chunk(sequence, 1))
            sequence.choose()
            yield self._event(sequence, choice)

    def _is_right(self, sequence: Sequence, proposed: int, length: int) -> bool:
        """Whether the token that was proposed after a match of `length` is the one that came."""
        right = sequence.token_ids[-1] == proposed
        assert self.speculation is not None
        self.speculation.tried(sequence, length, right)
        sequence.accepted_tokens += right
        self.counters.accepted_tokens += right
        return right

    def _event(self, sequence: Sequence, choice: Choice | Exception) -> Event:
        """What was chosen, as the sequence takes it."""
        try:
            if isinstance(choice, Exception):
                raise choice
            if any(each.logprobs.isnan().any() for each in sequence.scores):
                raise BrokenLogits
            event = self._token_event(sequence, choice)
        except Exception as error:  # noqa: BLE001  as in `_run`
            self.scheduler.remove(sequence.id)
            return Failure(sequence.id, error)
        if event.finish_reason is not None:
            self.scheduler.remove(sequence.id)
        return event

    def _token_event(self, sequence: Sequence, choice: Choice) -> TokenEvent:
        request, chosen = sequence.request, None
        if not sequence.generated:
            self.counters.prompt_tokens += sequence.prompt_length
            self.counters.cached_tokens += sequence.cached_tokens
        if sequence.max_tokens:
            chosen = choice.token_id
            if request.constraint is not None:
                request.constraint.accept(chosen)
            sequence.read(chosen)
            self.scheduler.read(sequence)
            self.counters.generated_tokens += 1
        else:
            choice = Choice(choice.token_id)
        scores, sequence.scores = tuple(sequence.scores), []  # they are told once
        return TokenEvent(
            sequence.id,
            chosen,
            sequence.finish_reason,
            choice.logprob,
            choice.alternatives,
            sequence.cached_tokens,
            scores,
            sequence.proposed_tokens,
            sequence.accepted_tokens,
        )


def _decode(chunks: list[Chunk]) -> bool:
    """Whether there are chunks, and none of a prompt."""
    return bool(chunks) and not any(chunk.sequence.prefilling for chunk in chunks)
