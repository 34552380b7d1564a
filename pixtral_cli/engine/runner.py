"""Pieces of sequences in, logits out: flattens them into one forward pass. Knows no scheduling and no sampling."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from pixtral_cli.engine.scheduler import Piece
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.model.kv_cache import AttendCached
from pixtral_cli.model.llava import Llava


class Runner:
    def __init__(self, model: Llava) -> None:
        self.model = model

    @torch.inference_mode()
    def run(self, pieces: list[Piece]) -> Tensor:
        """Compute the pieces -> float32 logits [pieces that complete their sequence, vocab_size], in order."""
        x = torch.cat([self._embed(piece) for piece in pieces])
        positions = torch.cat([self._positions(piece) for piece in pieces])
        ends = accumulate(piece.tokens for piece in pieces)
        rows = [end - 1 for end, piece in zip(ends, pieces, strict=True) if piece.completes]
        for piece in pieces:
            piece.sequence.cache.reserve(piece.sequence.pending)  # a prompt's room at once, however it is cut
        attend = AttendCached(self.model.config.text, [(p.sequence.cache, p.tokens) for p in pieces])
        with attend:
            hidden = self.model(x, positions, attend)
        return self.model.logits(hidden[rows])

    def _positions(self, piece: Piece) -> Tensor:
        start = piece.sequence.cache.length
        return torch.arange(start, start + piece.tokens, device=self.model.device)

    def _embed(self, piece: Piece) -> Tensor:
        sequence, start = piece.sequence, piece.sequence.cache.length
        ids = sequence.token_ids[start : start + piece.tokens]
        tensor = torch.tensor(ids, device=self.model.device)
        if not (sequence.prefilling and (sequence.pictures or sequence.features is not None)):
            return self.model.embed(tensor)
        image_token = self.model.config.image_token_id
        before, here = sequence.token_ids[:start].count(image_token), ids.count(image_token)
        return self.model.embed(tensor, self._features(sequence, before + here)[before:])

    def _features(self, sequence: Sequence, count: int) -> Tensor:
        """Features of the sequence's first `count` image tokens; a picture is encoded when the prompt gets to it."""
        features = sequence.features
        while sequence.pictures and (features is None or len(features) < count):
            more = self.model.encode_picture(sequence.pictures[0]())
            features = more if features is None else torch.cat([features, more])
            sequence.features = features
            sequence.pictures.popleft()
        assert features is not None, "a prompt with pictures has image tokens"
        return features[:count]
