"""Logits of several sequences in, a token for each out. Knows no sequences: a row gets the token that it gets alone.

What alters the logits comes in the order of vLLM (`v1/sample/sampler.py`): the tokens that a grammar allows, logit
bias, repetition penalty, frequency and presence penalty. Then the filters in the order of transformers
(`generation/logits_process.py`): temperature, top-k, top-p, min-p. Letters: N rows, V the vocabulary's size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pixtral_cli.engine.request import Sampling, TokenScores
from pixtral_cli.errors import BrokenLogits

if TYPE_CHECKING:
    from pixtral_cli.engine.grammar import Constraint


class Row(NamedTuple):
    """What decides the next token of one sequence: the first `prompt_length` of `token_ids` are its prompt."""

    sampling: Sampling
    token_ids: Sequence[int]
    prompt_length: int
    random: torch.Generator
    constraint: Constraint | None = None


def sample(logits: Tensor, rows: Sequence[Row]) -> list[int | Exception]:
    """The next token for each row of float32 logits [N, V], or why there is none; a row that fails fails alone.

    The errors are BrokenLogits, because the model computed numbers that are none, and RequestError, because a
    constraint became too complex.
    """
    try:
        return [*choose(logits, rows)]
    except Exception as error:  # noqa: BLE001  memory as well
        if len(rows) == 1:
            return [error]
        return [choice for each, row in zip(logits, rows, strict=True) for choice in sample(each[None], [row])]


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """As `sample`, but for any row that fails it raises. Nothing is drawn before."""
    best, likeliest = logits.max(-1)
    _check_finite(best)
    if any(row.constraint is not None or row.sampling.alters_logits for row in rows):
        logits = altered(logits, rows)
        best, likeliest = logits.max(-1)
        _check_finite(best)
    choices: list[int] = likeliest.tolist()
    drawing = [place for place, row in enumerate(rows) if not row.sampling.greedy]
    if drawing:
        drawn = draw((logits - best[:, None])[drawing], [rows[place] for place in drawing])
        for place, choice in zip(drawing, drawn, strict=True):
            choices[place] = choice
    return choices


def _check_finite(best: Tensor) -> None:
    """The largest is no number as well where a single score is none."""
    if not all(map(math.isfinite, best.tolist())):
        raise BrokenLogits


def altered(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits [N, V] after constraints, bias and penalties; only the answer counts for frequency and presence."""
    settings = [row.sampling for row in rows]
    logits = keep_allowed(logits, [None if row.constraint is None else row.constraint.mask() for row in rows])
    logits = add_bias(logits, [each.logit_bias for each in settings])
    seen = [row.token_ids for row in rows]
    logits = penalise_repetition(logits, seen, [each.repetition_penalty for each in settings])
    answers = [row.token_ids[row.prompt_length :] for row in rows]
    return penalise_frequency(logits, answers, [(each.frequency_penalty, each.presence_penalty) for each in settings])


def draw(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """A token for each row of logits [N, V] whose largest is 0: as torch.multinomial, by each row's own generator."""
    settings = [row.sampling for row in rows]
    logits = (logits / _column([each.temperature for each in settings], logits)).cpu()
    logits = keep_top_k(logits, [each.top_k for each in settings])
    logits = keep_top_p(logits, [each.top_p for each in settings])
    logits = keep_min_p(logits, [each.min_p for each in settings])
    probabilities = logits.softmax(-1)
    waits = torch.empty_like(probabilities)  # of an exponential race, which each token wins with its probability
    for wait, row in zip(waits, rows, strict=True):
        wait.exponential_(generator=row.random)
    return (probabilities / waits).argmax(-1).tolist()


def keep_allowed(logits: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """Keep what each row's mask, bool [tokens of the tokenizer], allows; a model's further logits stand for no token.

    Without a mask, all is allowed.
    """
    if all(mask is None for mask in masks):
        return logits
    allowed = torch.zeros(logits.shape, dtype=torch.bool)
    for row, mask in zip(allowed, masks, strict=True):
        if mask is None:
            row.fill_(True)
        else:
            row[: mask.numel()] = mask[: row.numel()]
    return logits.masked_fill(~allowed.to(logits.device), -torch.inf)


def add_bias(logits: Tensor, biases: Sequence[Mapping[int, float]]) -> Tensor:
    """Add to the logits of each row's tokens (OpenAI's `logit_bias`)."""
    if not any(biases):
        return logits
    values = [value for bias in biases for value in bias.values()]
    return logits.index_put(_places(biases, logits), _like(values, logits), accumulate=True)


def penalise_repetition(logits: Tensor, seen: Sequence[Collection[int]], penalties: Sequence[float]) -> Tensor:
    """Divide positive and multiply negative logits of tokens already there (Keskar et al. 2019, section 4.1)."""
    tokens = [set(ids) if penalty != 1 else set() for ids, penalty in zip(seen, penalties, strict=True)]
    if not any(tokens):
        return logits
    rows, ids = _places(tokens, logits)
    scores, penalty = logits[rows, ids], _like(penalties, logits)[rows]
    return logits.index_put((rows, ids), torch.where(scores < 0, scores * penalty, scores / penalty))


def penalise_frequency(
    logits: Tensor, answers: Sequence[Sequence[int]], penalties: Sequence[tuple[float, float]]
) -> Tensor:
    """Subtract the first penalty for every time that a token was generated and the second once if it was.

    Source: OpenAI's API reference, "frequency and presence penalties"; as there and in vLLM, the prompt is not counted.
    """
    biases: list[dict[int, float]] = []
    for answer, (frequency, presence) in zip(answers, penalties, strict=True):
        counts = Counter(answer) if frequency or presence else {}
        biases.append({token_id: -(times * frequency + presence) for token_id, times in counts.items()})
    return add_bias(logits, biases)


def keep_top_k(logits: Tensor, ks: Sequence[int]) -> Tensor:
    """Keep each row's k largest, and what equals the smallest of them; a k below 1 keeps all."""
    size = logits.shape[-1]
    limited = [place for place, k in enumerate(ks) if 0 < k < size]
    if not limited:
        return logits
    largest = logits[limited].topk(max(ks[place] for place in limited)).values
    least = logits.new_full((len(logits), 1), -torch.inf)
    least[limited] = largest.gather(-1, torch.tensor([[ks[place] - 1] for place in limited], device=logits.device))
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, ps: Sequence[float]) -> Tensor:
    """Keep each row's likeliest tokens that together reach probability p (Holtzman et al. 2020); at least one."""
    limited = [place for place, p in enumerate(ps) if p < 1]
    if not limited:
        return logits
    ordered, places = logits[limited].sort(descending=True)
    probabilities = ordered.softmax(-1)
    reached = probabilities.cumsum(-1) - probabilities  # by what comes before
    beyond = reached >= _column([ps[place] for place in limited], logits)
    beyond[:, 0] = False  # a p that float32 rounds to 0 is reached by nothing at all
    kept = ordered.masked_fill(beyond, -torch.inf)
    return logits.index_put((torch.tensor(limited, device=logits.device)[:, None], places), kept)


def keep_min_p(logits: Tensor, ps: Sequence[float]) -> Tensor:
    """Keep each row's tokens at least p times as likely as its likeliest (Nguyen et al. 2024)."""
    if not any(ps):
        return logits
    probabilities = logits.softmax(-1)
    least = _column(ps, logits) * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)


def _places(tokens: Sequence[Collection[int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's number once for each of its tokens, and the tokens: indices into logits [N, V]."""
    counts = torch.tensor([len(ids) for ids in tokens], device=logits.device)
    ids = torch.tensor([token_id for ids in tokens for token_id in ids], device=logits.device)
    return torch.arange(len(tokens), device=logits.device).repeat_interleave(counts), ids


def _like(values: Sequence[object], logits: Tensor) -> Tensor:
    return torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _column(values: Sequence[float], logits: Tensor) -> Tensor:
    """One value for each row [N, 1]."""
    return _like(values, logits)[:, None]


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
