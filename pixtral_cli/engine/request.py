"""What the engine is asked and what it answers. Knows no model and imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from pixtral_cli.engine.grammar import Constraint

FinishReason = Literal["stop", "length"]
GREEDY_BELOW = 1e-5  # a lower temperature draws the likeliest token anyway, and its division would overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults are greedy.

    `top_k` below 1 and `top_p` 1 switch those filters off; `seed` None draws a fresh one. `logit_bias` is added to the
    logits of its token ids. `frequency_penalty` counts for every time that a token was generated, `presence_penalty`
    once for every token that was.
    """

    temperature: float = 0.0
    top_k: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1 or self.top_p == 0

    @property
    def penalises(self) -> bool:
        """Whether the tokens before count."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def alters_logits(self) -> bool:
        """Whether the likeliest token of the plain logits may not be the one to draw."""
        return self.penalises or bool(self.logit_bias)


@dataclass(frozen=True)
class ImageInput:
    """An image of a prompt: `pixels()` gives, when it is to be computed, normalised pixels [3, height, width].

    `key` names what they are, whatever the image was called: equal keys mean equal pixels. `features` is the number
    of its image tokens.
    """

    key: bytes
    features: int
    pixels: Callable[[], Tensor]


@dataclass(frozen=True)
class Request:
    """One prompt; `images` are in the order of their [IMG] tokens.

    Generation ends at a token of `end_token_ids`, after `max_new_tokens`, or with the context (None). `logprobs` is
    None, or how many alternatives to report beside the token that was chosen; `prompt_logprobs` is the same for the
    tokens of the prompt. `constraint` says which tokens may come next; it is this request's own. What is computed is
    shared only with requests of the same `cache_salt`.
    """

    token_ids: tuple[int, ...]
    max_new_tokens: int | None = None
    images: tuple[ImageInput, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    end_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    cache_salt: bytes = b""


class TokenScores(NamedTuple):
    """Scores of N consecutive tokens, each given those before it, float32 and int64.

    They are natural log-probabilities [N], and the ids [N, k] and log-probabilities [N, k] of the k likeliest tokens
    in the place of each, best first.
    """

    logprobs: Tensor
    best_ids: Tensor
    best_logprobs: Tensor


@dataclass(frozen=True)
class TokenEvent:
    """One new token of request `request_id`; log-probabilities are natural and of the unfiltered distribution.

    `cached_tokens` of the prompt had been computed before, for this or another request. The first event has the
    scores of the prompt's tokens, all but the first, if they were asked for. The only event of a request for no new
    tokens has no token. Of the answer, `proposed_tokens` were looked up and computed in advance until now, of which
    `accepted_tokens` were right.
    """

    request_id: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    cached_tokens: int = 0
    prompt_scores: tuple[TokenScores, ...] = ()
    proposed_tokens: int = field(default=0, compare=False)  # how, and not what, was answered
    accepted_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Failure:
    """Request `request_id` ended with `error`; others are not touched."""

    request_id: int
    error: Exception


Event = TokenEvent | Failure
