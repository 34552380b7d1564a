"""A request under way: its tokens, what of them is computed, its cache. Knows no scheduling."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from pixtral_cli.engine.request import FinishReason, Request
from pixtral_cli.model.kv_cache import KVCache


class Sequence:
    """`token_ids` is the prompt and all that came after it; the first `cache.length` of them are computed.

    It ends after `max_tokens` new tokens at the latest.
    """

    def __init__(self, request_id: int, request: Request, max_tokens: int, cache: KVCache) -> None:
        self.id = request_id
        self.max_tokens = max_tokens
        self.cache = cache
        self.sampling, self.logprobs, self.end_token_ids = request.sampling, request.logprobs, request.end_token_ids
        self.prompt_length = len(request.token_ids)
        self.token_ids = list(request.token_ids)
        self.seen = set(self.token_ids)
        self.pictures = deque(request.pictures)  # not yet encoded
        self.features: Tensor | None = None  # of those that are, until the prompt is computed
        self.random = torch.Generator()
        if request.sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(request.sampling.seed)

    def append(self, token_id: int) -> None:
        """Take the token that was chosen; the pictures have done their work."""
        self.token_ids.append(token_id)
        self.seen.add(token_id)
        self.features = None

    @property
    def pending(self) -> int:
        """Tokens still to be computed: the rest of the prompt, or the one that was chosen last."""
        return len(self.token_ids) - self.cache.length

    @property
    def generated(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def prefilling(self) -> bool:
        return self.generated == 0

    @property
    def finish_reason(self) -> FinishReason | None:
        if self.generated and self.token_ids[-1] in self.end_token_ids:
            return "stop"
        return "length" if self.generated >= self.max_tokens else None
