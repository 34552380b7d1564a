"""Logits in, a token out. Knows no sequences.

What alters the logits comes in the order of vLLM (`v1/sample/sampler.py`): the tokens that a grammar allows, logit
bias, repetition penalty, frequency and presence penalty. Then the filters in the order of transformers
(`generation/logits_process.py`): temperature, top-k, top-p, min-p. V is the vocabulary's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pixtral_cli.engine.request import Sampling, TokenScores
from pixtral_cli.errors import BrokenLogits

if TYPE_CHECKING:
    from pixtral_cli.engine.grammar import Constraint


def choose(
    logits: Tensor,
    sampling: Sampling,
    prompt: Sequence[int],
    answer: Sequence[int],
    random: torch.Generator,
    constraint: Constraint | None = None,
) -> int:
    """The next token for float32 logits [V] after the tokens of the prompt and of the answer so far.

    Raises:
        BrokenLogits: no token can be chosen, because the model computed numbers that are none.
        RequestError: the constraint became too complex.
    """
    mask = None if constraint is None else constraint.mask()
    logits = keep_allowed(logits, mask)
    logits = add_bias(logits, sampling.logit_bias)
    if sampling.repetition_penalty != 1:
        logits = penalise_repetition(logits, {*prompt, *answer}, sampling.repetition_penalty)
    logits = penalise_frequency(logits, answer, sampling.frequency_penalty, sampling.presence_penalty)
    best, place = logits.max(0)
    if not best.isfinite():
        raise BrokenLogits
    if sampling.greedy:
        return int(place)
    logits = ((logits - best) / sampling.temperature).cpu()
    logits = keep_top_k(logits, sampling.top_k)
    logits = keep_top_p(logits, sampling.top_p)
    logits = keep_min_p(logits, sampling.min_p)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=random))


def keep_allowed(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Keep what the mask, bool [tokens of the tokenizer], allows; a model's further logits stand for no token."""
    if mask is None:
        return logits
    allowed = torch.zeros(logits.numel(), dtype=torch.bool)
    allowed[: mask.numel()] = mask[: logits.numel()]
    return logits.masked_fill(~allowed.to(logits.device), -torch.inf)


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Add to the logits of these tokens (OpenAI's `logit_bias`)."""
    if not bias:
        return logits
    places = torch.tensor(list(bias), device=logits.device)
    return logits.index_add(0, places, torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device))


def penalise_frequency(logits: Tensor, answer: Sequence[int], frequency: float, presence: float) -> Tensor:
    """Subtract `frequency` for every time that a token was generated and `presence` once if it was.

    Source: OpenAI's API reference, "frequency and presence penalties"; as there and in vLLM, the prompt is not counted.
    """
    if not answer or (frequency == 0 and presence == 0):
        return logits
    counts = Counter(answer)
    places = torch.tensor(list(counts), device=logits.device)
    times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(0, places, -(times * frequency + presence))


def penalise_repetition(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens already there (Keskar et al. 2019, section 4.1)."""
    if penalty == 1 or not seen:
        return logits
    places = torch.tensor(list(seen), device=logits.device)
    scores = logits[places]
    return logits.index_copy(0, places, torch.where(scores < 0, scores * penalty, scores / penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest, and what equals the smallest of them; 0 keeps all."""
    if not 0 < k < logits.numel():
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the likeliest tokens that together reach probability p (Holtzman et al. 2020); at least one."""
    if p >= 1:
        return logits
    ordered, places = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    beyond = probabilities.cumsum(-1) - probabilities >= p  # what came before it reaches p already
    beyond[0] = False  # a p that float32 rounds to 0 is reached by nothing at all
    return logits.index_fill(0, places[beyond], -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    if p <= 0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(), -torch.inf)


def score(logits: Tensor, token_ids: Tensor, alternatives: int) -> TokenScores:
    """Of the tokens [N] that came after float32 logits [N, V], and of the likeliest `alternatives`."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(alternatives, logits.shape[-1]))
    return TokenScores(logprobs.gather(-1, token_ids[:, None])[:, 0].cpu(), best.indices.cpu(), best.values.cpu())


def logprob(logits: Tensor, token_id: int, alternatives: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Natural log-probability of the token, and the likeliest `alternatives` (id, log-probability), best first."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(alternatives, logits.numel()))
    return float(logprobs[token_id]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
