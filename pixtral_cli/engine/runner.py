"""Pieces of sequences in, logits out: flattens them into one forward pass. Knows no scheduling and chooses no token."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pixtral_cli.engine import sampler
from pixtral_cli.engine.features import PictureFeatures
from pixtral_cli.engine.request import TokenScores
from pixtral_cli.engine.scheduler import Piece
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.model.kv_cache import AttendPaged, KVCache
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.pass_threads import PassThreads

EXACT_ROWS = 8  # as many rows as a float32 matrix product takes for the price of one
SCORED_ROWS = 64
"""Tokens of prompts whose logits are held at one time: 32 MiB for a vocabulary of 131,072."""


class Computed(NamedTuple):
    """Float32 logits [N, V], and the scores that pieces give to the tokens of their prompts, by sequence id."""

    logits: Tensor
    scores: dict[int, TokenScores]


def rounded_rows(rows: int) -> int:
    """A few sizes for all passes: oneDNN and torch keep something like a megabyte for every size they have seen."""
    step = 1 if rows <= 16 else 16 if rows <= 128 else 64
    return -(-rows // step) * step


class Runner:
    """Computes pieces in one pass; with `exact`, in passes whose shapes do not depend on who else is there.

    A matrix product's last bits depend on its number of rows. So each piece of a prompt is then computed by itself,
    and tokens that are decoded in passes of EXACT_ROWS rows, empty ones among them.
    """

    def __init__(self, model: LanguageModel, kv_cache: KVCache, features: PictureFeatures, exact: bool) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.features = features
        self.exact = exact
        self.threads = PassThreads(exact)

    @torch.inference_mode()
    def run(self, pieces: list[Piece]) -> Computed:
        """Compute the pieces -> float32 logits [pieces that complete their sequence, vocab_size], in order; scores."""
        if not self.exact:
            logits, scores = self._pass(pieces, rounded_rows(sum(piece.tokens for piece in pieces)))
            return Computed(logits[: sum(piece.completes for piece in pieces)], scores)
        decoding = [piece for piece in pieces if piece.sequence.answering]
        groups = [decoding[at : at + EXACT_ROWS] for at in range(0, len(decoding), EXACT_ROWS)]
        answers = [self._pass(group, EXACT_ROWS).logits[_completing(group)] for group in groups]
        prompts = [self._pass([piece]) for piece in pieces if not piece.sequence.answering]
        scores = {request_id: of_piece for prompt in prompts for request_id, of_piece in prompt.scores.items()}
        return Computed(torch.cat(answers + [prompt.logits for prompt in prompts]), scores)

    def _pass(self, pieces: list[Piece], rows: int = 0) -> Computed:
        """One forward pass, padded to `rows` tokens; the logits of padding come last."""
        device = self.model.device
        x = torch.cat([self._embed(piece) for piece in pieces])
        positions = torch.cat([self._positions(piece) for piece in pieces])
        ends = list(accumulate(piece.tokens for piece in pieces))
        wanted = [end - 1 for end, piece in zip(ends, pieces, strict=True) if piece.completes or (self.exact and rows)]
        if len(x) < rows:
            wanted += range(len(x), rows)
            positions = torch.cat([positions, positions.new_zeros(rows - len(x))])
            x = torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])
        spans = [piece.sequence.span(piece.tokens) for piece in pieces]
        text = self.model.config.text
        with self.threads.chosen(len(x), text.multiplications_per_token):
            hidden = self.model(x, positions, AttendPaged(text, self.kv_cache, spans, device))
            logits = self.model.logits(hidden[wanted])
        scores = {
            piece.sequence.id: self._scores(piece, hidden[end - piece.tokens : end])
            for end, piece in zip(ends, pieces, strict=True)
            if piece.sequence.unscored(piece.tokens)
        }
        return Computed(logits, scores)

    def _scores(self, piece: Piece, hidden: Tensor) -> TokenScores:
        """Of the prompt's tokens that come after those of `hidden` [tokens of the piece, C]."""
        sequence = piece.sequence
        places, alternatives = sequence.unscored(piece.tokens), sequence.request.prompt_logprobs or 0
        blocks = []
        for start in range(places.start, places.stop, SCORED_ROWS):
            end = min(start + SCORED_ROWS, places.stop)
            following = torch.tensor(sequence.token_ids[start + 1 : end + 1], device=hidden.device)
            logits = self._few_logits(hidden[start - sequence.computed : end - sequence.computed])
            blocks.append(sampler.score(logits, following, alternatives))
        return TokenScores(*map(torch.cat, zip(*blocks, strict=True)))

    def _few_logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden [N, C], computed in one of a few sizes."""
        padding = hidden.new_zeros(rounded_rows(len(hidden)) - len(hidden), hidden.shape[1])
        return self.model.logits(torch.cat([hidden, padding]))[: len(hidden)]

    def _positions(self, piece: Piece) -> Tensor:
        start = piece.sequence.computed
        return torch.arange(start, start + piece.tokens, device=self.model.device)

    def _embed(self, piece: Piece) -> Tensor:
        """Only a prompt's own image tokens stand for pictures: one that was generated is a token like others."""
        sequence, start = piece.sequence, piece.sequence.computed
        ids = sequence.token_ids[start : start + piece.tokens]
        tensor = torch.tensor(ids, device=self.model.device)
        image_token, prompt = self.model.config.image_token_id, max(sequence.prompt_length - start, 0)
        here = ids[:prompt].count(image_token) if sequence.request.pictures else 0
        if not here:
            return self.model.embed(tensor)
        before = sequence.token_ids[:start].count(image_token)
        features = torch.cat(list(self._features(sequence, before, before + here)))
        return torch.cat([self.model.embed(tensor[:prompt], features), self.model.embed(tensor[prompt:])])

    def _features(self, sequence: Sequence, first: int, end: int) -> Iterator[Tensor]:
        """Features of the sequence's image tokens number `first` up to `end`; those of a picture are computed whole."""
        position = 0
        for picture in sequence.request.pictures:
            begin, position = position, position + picture.features
            if begin < end and position > first:
                features = self.features.of(picture, sequence.request.cache_salt)
                yield features[max(first - begin, 0) : end - begin]


def _completing(group: list[Piece]) -> list[int]:
    return [row for row, piece in enumerate(group) if piece.completes]
