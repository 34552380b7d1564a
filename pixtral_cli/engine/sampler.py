"""Logits in, a token out. Knows no sequences.

Filters come in the order of transformers (`generation/logits_process.py`): repetition penalty, temperature, top-k,
top-p, min-p. V is the vocabulary's size.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from pixtral_cli.engine.request import Sampling


def choose(logits: Tensor, sampling: Sampling, seen: Collection[int], random: torch.Generator) -> int:
    """The next token for float32 logits [V]; `seen` are the different tokens that came before."""
    logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return int(logits.argmax())
    logits = (logits / sampling.temperature).cpu()
    logits = keep_top_k(logits, sampling.top_k)
    logits = keep_top_p(logits, sampling.top_p)
    logits = keep_min_p(logits, sampling.min_p)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=random))


def penalise_repetition(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens already there (Keskar et al. 2019, section 4.1)."""
    if penalty == 1:
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
    return logits.index_fill(0, places[beyond], -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    if p <= 0:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(), -torch.inf)


def logprob(logits: Tensor, token_id: int, alternatives: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Natural log-probability of the token, and the likeliest `alternatives` (id, log-probability), best first."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(alternatives, logits.numel()))
    return float(logprobs[token_id]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
