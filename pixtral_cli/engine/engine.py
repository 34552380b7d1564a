"""Requests in, tokens out: submit, step, cancel. Knows no text and no HTTP."""

from __future__ import annotations

from itertools import count

from torch import Tensor

from pixtral_cli.engine import sampler
from pixtral_cli.engine.request import Request, TokenEvent
from pixtral_cli.engine.runner import Runner
from pixtral_cli.engine.scheduler import Scheduler
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.model.kv_cache import KVCache
from pixtral_cli.model.llava import Llava


class Engine:
    """Runs up to `max_batch_size` requests at once; more wait. Each gets the tokens that it would get alone.

    `max_length` bounds the tokens of one prompt and its answer; default the model's own.
    """

    def __init__(
        self, model: Llava, max_length: int | None = None, max_batch_size: int = 1, max_ce_batch_size: int = 32
    ) -> None:
        self.model = model
        self.max_length = max_length or model.config.text.max_length
        self.runner = Runner(model)
        self.scheduler = Scheduler(max_batch_size, max_ce_batch_size)
        self._ids = count()

    def submit(self, request: Request) -> int:
        """Queue a request -> the id that its events carry."""
        tokens = len(request.token_ids), request.max_new_tokens
        assert min(tokens) > 0 and sum(tokens) <= self.max_length, (tokens, self.max_length)
        cache = KVCache(self.model.config.text, self.model.dtype, self.model.device)
        sequence = Sequence(next(self._ids), request, cache)
        self.scheduler.add(sequence)
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """Drop a request and its memory; unknown and finished ones are passed over."""
        self.scheduler.remove(request_id)

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[TokenEvent]:
        """Compute one step of all running requests -> at most one new token each; none while prompts are computed."""
        pieces = self.scheduler.schedule()
        if not pieces:
            return []
        ready = [piece.sequence for piece in pieces if piece.completes]
        logits = self.runner.run(pieces)
        return [self._advance(sequence, row) for sequence, row in zip(ready, logits, strict=True)]

    def _advance(self, sequence: Sequence, logits: Tensor) -> TokenEvent:
        request = sequence.request
        token_id = sampler.choose(logits, request.sampling, sequence.token_ids, sequence.random)
        sequence.token_ids.append(token_id)
        if sequence.finish_reason is not None:
            self.scheduler.remove(sequence.id)
        logprob, alternatives = None, ()
        if request.logprobs is not None:
            logprob, alternatives = sampler.logprob(logits, token_id, request.logprobs)
        return TokenEvent(sequence.id, token_id, sequence.finish_reason, logprob, alternatives)
