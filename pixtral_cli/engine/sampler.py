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
from pixtral_cli.engine.transfers import ToHost, send, to_device
from pixtral_cli.errors import BrokenLogits

if TYPE_CHECKING:
    from pixtral_cli.engine.grammar import Constraint


class Row(NamedTuple):
    """What decides the next token of one sequence: the first `prompt_length` of `token_ids` are its prompt.

    `logprobs` is None, or how many alternatives to report. `random` is a generator of the logits' device.
    """

    sampling: Sampling
    token_ids: Sequence[int]
    prompt_length: int
    random: torch.Generator
    constraint: Constraint | None = None
    logprobs: int | None = None

    @property
    def needs_history(self) -> bool:
        """Whether its next choice depends on the tokens before, other than by the logits."""
        return self.constraint is not None or self.sampling.penalises

    @property
    def follows_logits(self) -> bool:
        """Whether its next choice depends on the logits alone, so that it can be made before those before it."""
        return self.sampling.greedy and not self.needs_history


class Choice(NamedTuple):
    """A token; its natural log-probability in the unaltered distribution and the likeliest (id, log-probability) in
    its place, best first, if they were asked for."""

    token_id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class Choices:
    """A token for each of N rows, `token_ids` int64 [N] on the device of the logits; `read` waits for them."""

    def __init__(
        self, token_ids: Tensor, peaks: Tensor, scores: Mapping[int, TokenScores], errors: Mapping[int, Exception]
    ) -> None:
        """`peaks` [N] are finite where the logits of a row were numbers; errors and scores are of some rows."""
        self.token_ids = token_ids
        self._errors = errors
        self._scored = list(scores)
        self._arriving = ToHost(
            torch.stack([token_ids.double(), peaks.double()]),  # which holds both exactly
            *(part for each in scores.values() for part in each),
        )

    def read(self) -> list[Choice | Exception]:
        """What was chosen, or why there is none: BrokenLogits, because the model computed numbers that are none, and
        RequestError, because a constraint became too complex."""
        both, *parts = self._arriving.read()
        scores = {place: parts[3 * n : 3 * n + 3] for n, place in enumerate(self._scored)}
        return [
            self._choice(place, int(token_id), math.isfinite(peak), scores.get(place))
            for place, (token_id, peak) in enumerate(zip(*both.tolist(), strict=True))
        ]

    def _choice(self, place: int, token_id: int, usable: bool, scores: list[Tensor] | None) -> Choice | Exception:
        if place in self._errors:
            return self._errors[place]
        if not usable:
            return BrokenLogits()
        if scores is None:
            return Choice(token_id)
        logprob, ids, logprobs = scores
        return Choice(token_id, float(logprob), tuple(zip(ids[0].tolist(), logprobs[0].tolist(), strict=True)))


def sample(logits: Tensor, rows: Sequence[Row]) -> Choices:
    """The next token for each row of float32 logits [N, V], on their device; a row that fails fails alone.

    Waits for the device only where a row has a constraint or a penalty.
    """
    best, likeliest = logits.max(-1)
    peaks = best  # the largest is no number as well where a single score is none
    masks, errors = _masks(rows)
    altering = any(row.constraint is not None or row.sampling.alters_logits for row in rows)
    changed = altered(logits, rows, masks) if altering else logits
    if altering:
        best, likeliest = changed.max(-1)
        peaks = peaks + best
    drawing = [place for place, row in enumerate(rows) if not row.sampling.greedy]
    if drawing:
        places = to_device(drawing, torch.long, logits.device)
        shifted = (changed - best[:, None])[places]
        likeliest[places] = draw(shifted, [rows[place] for place in drawing])
    scores = {
        place: score(logits[place : place + 1], likeliest[place : place + 1], row.logprobs)
        for place, row in enumerate(rows)
        if row.logprobs is not None
    }
    return Choices(likeliest, peaks, scores, errors)


def _masks(rows: Sequence[Row]) -> tuple[list[Tensor | None], dict[int, Exception]]:
    """What each row's constraint allows, and the errors of those that failed."""
    masks: list[Tensor | None] = [None] * len(rows)
    errors: dict[int, Exception] = {}
    for place, row in enumerate(rows):
        try:
            masks[place] = None if row.constraint is None else row.constraint.mask()
        except Exception as error:  # noqa: BLE001  it concerns one request
            errors[place] = error
    return masks, errors


def altered(logits: Tensor, rows: Sequence[Row], masks: Sequence[Tensor | None]) -> Tensor:
    """Logits [N, V] after constraints, bias and penalties; only the answer counts for frequency and presence."""
    settings = [row.sampling for row in rows]
    logits = keep_allowed(logits, masks)
    logits = add_bias(logits, [each.logit_bias for each in settings])
    seen = [row.token_ids if row.sampling.penalises else () for row in rows]
    logits = penalise_repetition(logits, seen, [each.repetition_penalty for each in settings])
    answers = [row.token_ids[row.prompt_length :] if row.sampling.penalises else () for row in rows]
    return penalise_frequency(logits, answers, [(each.frequency_penalty, each.presence_penalty) for each in settings])


def draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """A token for each row of logits [N, V] whose largest is 0, int64 [N]: as torch.multinomial, by each row's own
    generator."""
    settings = [row.sampling for row in rows]
    logits = logits / _column([each.temperature for each in settings], logits)
    logits = keep_top_k(logits, [each.top_k for each in settings])
    logits = keep_top_p(logits, [each.top_p for each in settings])
    logits = keep_min_p(logits, [each.min_p for each in settings])
    probabilities = logits.softmax(-1)
    waits = torch.empty_like(probabilities)  # of an exponential race, which each token wins with its probability
    for wait, row in zip(waits, rows, strict=True):
        wait.exponential_(generator=row.random)
    return (probabilities / waits).argmax(-1)


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
    return logits.masked_fill(~send(allowed, logits.device), -torch.inf)


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
    places, lasts = to_device([limited, [ks[place] - 1 for place in limited]], torch.long, logits.device)
    largest = logits[places].topk(max(ks[place] for place in limited)).values
    least = logits.new_full((len(logits), 1), -torch.inf)
    least[places] = largest.gather(-1, lasts[:, None])
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, ps: Sequence[float]) -> Tensor:
    """Keep each row's likeliest tokens that together reach probability p (Holtzman et al. 2020); at least one."""
    limited = [place for place, p in enumerate(ps) if p < 1]
    if not limited:
        return logits
    rows = to_device(limited, torch.long, logits.device)
    ordered, places = logits[rows].sort(descending=True)
    probabilities = ordered.softmax(-1)
    reached = probabilities.cumsum(-1) - probabilities  # by what comes before
    beyond = reached >= _column([ps[place] for place in limited], logits)
    beyond[:, 0] = False  # a p that float32 rounds to 0 is reached by nothing at all
    kept = ordered.masked_fill(beyond, -torch.inf)
    return logits.index_put((rows[:, None], places), kept)


def keep_min_p(logits: Tensor, ps: Sequence[float]) -> Tensor:
    """Keep each row's tokens at least p times as likely as its likeliest (Nguyen et al. 2024)."""
    if not any(ps):
        return logits
    probabilities = logits.softmax(-1)
    least = _column(ps, logits) * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)


def _places(tokens: Sequence[Collection[int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's number once for each of its tokens, and the tokens: indices into logits [N, V]."""
    pairs = [(row, token_id) for row, ids in enumerate(tokens) for token_id in ids]
    rows, ids = to_device(list(zip(*pairs, strict=True)) or [(), ()], torch.long, logits.device)
    return rows, ids


def _like(values: Sequence[object], logits: Tensor) -> Tensor:
    return to_device(values, logits.dtype, logits.device)


def _column(values: Sequence[float], logits: Tensor) -> Tensor:
    """One value for each row [N, 1]."""
    return _like(values, logits)[:, None]


def score(logits: Tensor, token_ids: Tensor, alternatives: int) -> TokenScores:
    """Of the tokens [N] that came after float32 logits [N, V], and of the likeliest `alternatives`; on their device."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(alternatives, logits.shape[-1]))
    return TokenScores(logprobs.gather(-1, token_ids[:, None])[:, 0], best.indices, best.values)
