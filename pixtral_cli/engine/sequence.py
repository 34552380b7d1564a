"""A request under way: its tokens, what of them is computed, its cache. Knows no scheduling."""

from __future__ import annotations

import torch
from torch import Tensor

from pixtral_cli.engine.request import FinishReason, Request
from pixtral_cli.model.kv_cache import KVCache


class Sequence:
    """`token_ids` is the prompt and all that came after it; the first `cache.length` of them are computed."""

    def __init__(self, request_id: int, request: Request, cache: KVCache) -> None:
        self.id = request_id
        self.request = request
        self.token_ids = list(request.token_ids)
        self.cache = cache
        self.features: Tensor | None = None  # of the pictures, until the prompt is computed
        self.random = torch.Generator()
        if request.sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(request.sampling.seed)

    @property
    def pending(self) -> int:
        """Tokens still to be computed: the rest of the prompt, or the one that was chosen last."""
        return len(self.token_ids) - self.cache.length

    @property
    def generated(self) -> int:
        return len(self.token_ids) - len(self.request.token_ids)

    @property
    def prefilling(self) -> bool:
        return self.generated == 0

    @property
    def finish_reason(self) -> FinishReason | None:
        if self.generated and self.token_ids[-1] in self.request.end_token_ids:
            return "stop"
        return "length" if self.generated >= self.request.max_new_tokens else None
