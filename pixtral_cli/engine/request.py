"""What the engine is asked and what it answers. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from pixtral_cli.engine.sampler import Sampling, TokenScores

if TYPE_CHECKING:
    from pixtral_cli.engine.grammar import Constraint

FinishReason = Literal["stop", "length"]


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


@dataclass(frozen=True)
class TokenEvent:
    """One new token of request `request_id`; log-probabilities are natural and of the unfiltered distribution.

    `cached_tokens` of the prompt had been computed before, for this or another request. The first event has the
    scores of the prompt's tokens, all but the first, if they were asked for. The only event of a request for no new
    tokens has no token.
    """

    request_id: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    cached_tokens: int = 0
    prompt_scores: tuple[TokenScores, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Request `request_id` ended with `error`; others are not touched."""

    request_id: int
    error: Exception


Event = TokenEvent | Failure
