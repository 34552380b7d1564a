"""Sequences in, the chunks to compute in the next step out. Knows pages and no tensors.

A chunk is a sequence, how many of its pending tokens to compute, and perhaps what is proposed to follow. Sequences
that decode always get their one token. Prompts share what is left of a step, first who waited longest, so that a long
one does not hold up the others. When no page is left for one that decodes, the one that came last gives its pages back
and begins again later.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from pixtral_cli.engine.lookup import NOTHING, Match
from pixtral_cli.engine.pages import PageTable
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.model.kv_cache import PAGE, pages_for
from pixtral_cli.model.pass_sizes import PREFILL

CHUNK = 1024  # prompt tokens a step: enough rows to keep a matrix product at its full speed
SHORT_CHUNK = 256  # while others decode, who wait meanwhile
CARD_CHUNKS = PREFILL, 1024
"""The same for a card's own attention, which needs more rows for its full speed: a picture's tokens and its question
in one step."""


class Chunk(NamedTuple):
    """Of a sequence, its next `tokens` pending tokens, and what was `proposed` to follow them."""

    sequence: Sequence
    tokens: int
    proposed: Match = NOTHING

    @property
    def rows(self) -> int:
        """Tokens to compute."""
        return self.tokens + len(self.proposed.tokens)

    @property
    def choices(self) -> int:
        """Tokens that can be chosen after this chunk: one if it completes, one more for each that is proposed."""
        return 1 + len(self.proposed.tokens) if self.completes else 0

    @property
    def completes(self) -> bool:
        """Whether a next token can be chosen after this chunk."""
        return self.tokens == self.sequence.pending


class Scheduler:
    """`max_batch_size` sequences run at once, of which `max_ce_batch_size` prefill in one step.

    With `exact`, a prompt is cut at the same places whoever else is there, at multiples of SHORT_CHUNK, and only such
    whole chunks are known afterwards: what is shared then has the very bits that would be computed. What begins
    again after a pre-emption is computed in the same chunks as at first. `chunks` are the tokens of prompts in a step,
    alone and while others decode; by default CHUNK and SHORT_CHUNK.
    """

    def __init__(
        self,
        table: PageTable,
        max_batch_size: int,
        max_ce_batch_size: int,
        exact: bool = False,
        chunks: tuple[int, int] | None = None,
    ) -> None:
        self.table = table
        self.max_batch_size = max_batch_size
        self.max_ce_batch_size = max_ce_batch_size
        self.exact = exact
        self.chunks = chunks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they came
        self.preemptions = 0
        self._steps = 0
        self._free_seats = list(range(max_batch_size))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, request_id: int) -> None:
        """Forget a sequence wherever it is, and free its pages; a second time does nothing."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.id == request_id:
                sequence.removed = True
                if sequence in self.running:
                    self._stop(sequence)
        self.waiting = deque(s for s in self.waiting if s.id != request_id)
        self.running = [s for s in self.running if s.id != request_id]

    def schedule(self) -> list[Chunk]:
        self._steps += 1
        self._make_room_to_decode()
        self._admit()
        decoding = [Chunk(s, s.pending) for s in self.running if self._decodes(s)]
        return sorted(decoding + self._prefill(bool(decoding)), key=lambda chunk: not chunk.sequence.answering)

    def proposing(self, chunk: Chunk, match: Match) -> Chunk:
        """The chunk with what is proposed to follow it, as far as there are pages for that."""
        if match.tokens and not self._grow(chunk.sequence, chunk.tokens + len(match.tokens)):
            room = len(chunk.sequence.pages) * PAGE - chunk.sequence.computed - chunk.tokens
            match = Match(match.tokens[:room], match.length)
        return chunk._replace(proposed=match)

    def computed(self, chunk: Chunk) -> None:
        """The chunk is computed, or will be before anything that comes after: its full pages are known from now on."""
        chunk.sequence.advance(chunk.tokens)
        filled = chunk.sequence.filled_pages()
        if not (self.exact and chunk.tokens < SHORT_CHUNK):
            self._name(chunk.sequence, filled)

    def read(self, sequence: Sequence) -> None:
        """A token of it is known now: so are, perhaps, more of its full pages."""
        self._name(sequence, sequence.filled_pages())

    def _name(self, sequence: Sequence, places: range) -> None:
        for place in places:
            self.table.name(sequence.pages[place], sequence.page_keys.keys[place])

    @staticmethod
    def _decodes(sequence: Sequence) -> bool:
        return not sequence.prefilling and not sequence.all_chosen

    def _make_room_to_decode(self) -> None:
        for sequence in list(self.running):
            while sequence in self.running and self._decodes(sequence) and not self._grow(sequence, sequence.pending):
                self._preempt(self.running[-1])

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give it pages for so many pending tokens; False if there are none."""
        missing = pages_for(sequence.computed + tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        pages = self.table.take(missing, sequence.pages[-1] if sequence.pages else None)
        sequence.pages += pages or []
        return pages is not None

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._stop(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.table.release(sequence.pages)
        sequence.restart()
        self._free_seats.append(sequence.seat)

    def _admit(self) -> None:
        """Take in who waits, first come first served, but for prompts that begin like one being computed now."""
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_batch_size or sequence.unread:  # who begins again begins with its tokens
                return
            if self._awaits_another(sequence):
                continue
            if not self._enter(sequence):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)

    def _awaits_another(self, sequence: Sequence) -> bool:
        """Whether the next page that it needs is being computed for another: then it is cheaper to wait for it."""
        keys = sequence.page_keys.keys[: sequence.shareable // PAGE]
        known = len(self.table.known(keys))
        if known == len(keys):
            return False
        others = (other for other in self.running if other.prefilling)
        return any(keys[known : known + 1] == other.page_keys.keys[known : known + 1] for other in others)

    def _enter(self, sequence: Sequence) -> bool:
        """Give it the pages of its whole prompt, those that are known already shared; False if there is no room."""
        most = min(sequence.shareable, sequence.prompt_length - 1) if self.exact else sequence.shareable
        known = self.table.known(sequence.page_keys.keys)[: most // PAGE]
        if self.exact:
            known = known[: len(known) - len(known) % (SHORT_CHUNK // PAGE)]
        self.table.share(known)
        sequence.begin(self._free_seats.pop(), known)
        sequence.waits_since = self._steps
        if not self._grow(sequence, sequence.pending):
            self._stop(sequence)
            return False
        if not sequence.generated:
            sequence.cached_tokens = sequence.computed
        return True

    def _prefill(self, others_decode: bool) -> list[Chunk]:
        chunks: list[Chunk] = []
        alone, beside_others = self.chunks or (CHUNK, SHORT_CHUNK)
        left = beside_others if others_decode else alone
        waiting = sorted((s for s in self.running if s.prefilling), key=lambda s: s.waits_since)
        for sequence in waiting[: self.max_ce_batch_size]:
            most = self._exactly(sequence) if self.exact else left
            tokens = min(sequence.pending, most)
            if tokens == 0 or (chunks and tokens > left):
                break
            chunks.append(Chunk(sequence, tokens))
            sequence.waits_since = self._steps + 1
            left -= tokens
        return chunks

    def _exactly(self, sequence: Sequence) -> int:
        """As many tokens as were computed together when this part of the sequence was computed first."""
        if sequence.answering:
            return 1
        return min(SHORT_CHUNK - sequence.computed % SHORT_CHUNK, sequence.prompt_length - sequence.computed)
