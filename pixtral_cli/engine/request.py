"""What the engine is asked and what it answers. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

FinishReason = Literal["stop", "length"]
GREEDY_BELOW = 1e-5  # a lower temperature draws the likeliest token anyway, and its division would overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults are greedy.

    `top_k` 0 and `top_p` 1 switch those filters off; `seed` None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1


@dataclass(frozen=True)
class Request:
    """One prompt. Each of `pictures` gives, when its turn comes, normalised pixels [3, height, width]; they are in
    the order of their [IMG] tokens.

    Generation ends at a token of `end_token_ids`, after `max_new_tokens`, or with the context (None). `logprobs` is
    None, or how many alternatives to report beside the token that was chosen.
    """

    token_ids: tuple[int, ...]
    max_new_tokens: int | None = None
    pictures: tuple[Callable[[], Tensor], ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    end_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One new token of request `request_id`; log-probabilities are natural and of the unfiltered distribution."""

    request_id: int
    token_id: int
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
