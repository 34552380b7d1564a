"""Requests in, tokens out: submit, step, cancel. Knows no text and no HTTP."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from heapq import nlargest
from itertools import count
from threading import RLock

from torch import Tensor

from pixtral_cli.engine import sampler
from pixtral_cli.engine.request import Request, TokenEvent
from pixtral_cli.engine.runner import Runner
from pixtral_cli.engine.scheduler import Scheduler
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.errors import RequestError
from pixtral_cli.model.kv_cache import KVCache
from pixtral_cli.model.llava import Llava
from pixtral_cli.model.plan import check_prompts


class Engine:
    """Runs up to `max_batch_size` requests at once; more wait. In float32 each gets the tokens that it gets alone.

    `max_length` bounds the tokens of one prompt and its answer; default the model's own. Several threads may submit,
    take and cancel: whoever waits for an event drives the steps, and the others' events are kept for them.
    """

    def __init__(
        self, model: Llava, max_length: int | None = None, max_batch_size: int = 1, max_ce_batch_size: int = 32
    ) -> None:
        self.model = model
        self.max_length = max_length or model.config.text.max_length
        self.runner = Runner(model)
        self.scheduler = Scheduler(max_batch_size, max_ce_batch_size)
        self._ids = count()
        self._inbox: dict[int, deque[TokenEvent]] = {}
        self._lock = RLock()

    def check(self, *requests: Request) -> None:
        """Raise RequestError if a prompt is too long for the context, or those that run together for the memory."""
        for request in requests:
            self._check_tokens(request.token_ids)
        together = nlargest(self.scheduler.max_batch_size, (len(request.token_ids) for request in requests))
        check_prompts(self.model.config.text, together, self.model.dtype, self.model.device)

    def _check_tokens(self, token_ids: tuple[int, ...]) -> None:
        text = self.model.config.text
        if not token_ids:
            raise RequestError("The prompt has no tokens.", hint="Write something, or look at the chat template.")
        if (highest := max(token_ids)) >= text.vocab_size:
            raise RequestError(
                f"The tokenizer gives token {highest}, and the model knows {text.vocab_size}.",
                hint="The model's tokenizer files and its weights may be of different models.",
            )
        if len(token_ids) >= self.max_length:
            could = self.max_length < text.max_length
            raise RequestError(
                f"The prompt has {len(token_ids)} tokens, and the context has room for {self.max_length}, "
                "the answer included.",
                hint="Shorten it, or send fewer or smaller pictures"
                + (f"; --max-length can be up to {text.max_length}." if could else "."),
            )

    def submit(self, request: Request) -> int:
        """Queue a request -> the id that its events carry. Raises RequestError as `check`."""
        self.check(request)
        with self._lock:
            room = self.max_length - len(request.token_ids)
            cache = KVCache(self.model.config.text, self.model.dtype, self.model.device, self.max_length)
            max_tokens = room if request.max_new_tokens is None else min(request.max_new_tokens, room)
            sequence = Sequence(next(self._ids), request, max_tokens, cache)
            self._inbox[sequence.id] = deque()
            self.scheduler.add(sequence)
            return sequence.id

    def cancel(self, request_id: int) -> None:
        """Drop a request and its memory; unknown and finished ones are passed over."""
        with self._lock:
            self.scheduler.remove(request_id)
            self._inbox.pop(request_id, None)

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def take(self, request_ids: Collection[int]) -> list[TokenEvent]:
        """The next events of these requests, stepping until there is one; those of others wait for whoever asks."""
        while True:
            with self._lock:
                boxes = [self._inbox[request_id] for request_id in request_ids]
                ready = [box.popleft() for box in boxes if box]
                if ready:
                    return ready
                assert self.busy, f"nothing will ever come for {request_ids}"
                for event in self.step():
                    self._inbox[event.request_id].append(event)

    def step(self) -> list[TokenEvent]:
        """Compute one step of all running requests -> at most one new token each; none while prompts are computed."""
        pieces = self.scheduler.schedule()
        if not pieces:
            return []
        ready = [piece.sequence for piece in pieces if piece.completes]
        logits = self.runner.run(pieces)
        likeliest = logits.argmax(-1).tolist()  # one wait for the device, however many requests
        return [self._advance(*each) for each in zip(ready, logits, likeliest, strict=True)]

    def _advance(self, sequence: Sequence, logits: Tensor, likeliest: int) -> TokenEvent:
        sampling, token_id = sequence.sampling, likeliest
        if not sampling.greedy or sampling.repetition_penalty != 1:
            token_id = sampler.choose(logits, sampling, sequence.seen, sequence.random)
        sequence.append(token_id)
        if sequence.finish_reason is not None:
            self.scheduler.remove(sequence.id)
        logprob, alternatives = None, ()
        if sequence.logprobs is not None:
            logprob, alternatives = sampler.logprob(logits, token_id, sequence.logprobs)
        return TokenEvent(sequence.id, token_id, sequence.finish_reason, logprob, alternatives)
