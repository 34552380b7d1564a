"""Pieces of sequences in, logits out: flattens them into one forward pass. Knows no scheduling and no sampling."""

from __future__ import annotations

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
        ends = torch.tensor([piece.tokens for piece in pieces]).cumsum(0) - 1
        rows = [int(end) for end, piece in zip(ends, pieces, strict=True) if piece.completes]
        attend = AttendCached(self.model.config.text, [(p.sequence.cache, p.tokens) for p in pieces])
        with attend:
            hidden = self.model(x, positions, attend)
        return self.model.logits(hidden[rows])

    def _positions(self, piece: Piece) -> Tensor:
        start = piece.sequence.cache.length
        return torch.arange(start, start + piece.tokens, device=self.model.device)

    def _embed(self, piece: Piece) -> Tensor:
        sequence, start = piece.sequence, piece.sequence.cache.length
        ids = torch.tensor(sequence.token_ids[start : start + piece.tokens], device=self.model.device)
        if not (sequence.prefilling and sequence.request.pictures):
            return self.model.embed(ids)
        features = self._features(sequence)
        image_token = self.model.config.image_token_id
        before = sequence.token_ids[:start].count(image_token)
        here = int((ids == image_token).sum())
        if piece.completes:
            sequence.features = None
        return self.model.embed(ids, features[before : before + here])

    def _features(self, sequence: Sequence) -> Tensor:
        """Features of all the sequence's pictures, computed picture by picture at its first piece."""
        if sequence.features is None:
            pictures = [self.model.encode_picture(pixels) for pixels in sequence.request.pictures]
            sequence.features = torch.cat(pictures)
        return sequence.features
