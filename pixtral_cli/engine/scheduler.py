"""Sequences in, the pieces to compute in the next step out. Knows no tensors.

A piece is a sequence and how many of its pending tokens to compute. Sequences that decode always get their one
token; prompts share what is left of `CHUNK`, so that a long prompt never makes the others wait for long.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from pixtral_cli.engine.sequence import Sequence

CHUNK = 1024  # prompt tokens a step: enough rows to keep a matrix product at its full speed


class Piece(NamedTuple):
    sequence: Sequence
    tokens: int

    @property
    def completes(self) -> bool:
        """Whether a next token can be chosen after this piece."""
        return self.tokens == self.sequence.pending


class Scheduler:
    """`max_batch_size` sequences run at once, of which `max_ce_batch_size` prefill in one step."""

    def __init__(self, max_batch_size: int, max_ce_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.max_ce_batch_size = max_ce_batch_size
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, request_id: int) -> None:
        """Forget a sequence wherever it is; a second time does nothing."""
        self.waiting = deque(s for s in self.waiting if s.id != request_id)
        self.running = [s for s in self.running if s.id != request_id]

    def schedule(self) -> list[Piece]:
        while self.waiting and len(self.running) < self.max_batch_size:
            self.running.append(self.waiting.popleft())
        decoding = [Piece(s, s.pending) for s in self.running if not s.prefilling]
        return decoding + self._prefill([s for s in self.running if s.prefilling])

    def _prefill(self, prompts: list[Sequence]) -> list[Piece]:
        pieces, left = [], CHUNK
        for sequence in prompts[: self.max_ce_batch_size]:
            if left > 0:
                pieces.append(Piece(sequence, min(sequence.pending, left)))
                left -= pieces[-1].tokens
        return pieces
