"""Sequences that decode in, tokens worth computing with them out; measured while running. Knows no tensors.

A proposed token is one row more of the pass. A row more costs time; a token that is right saves a pass. So a step
computes as many proposals as make tokens a second the most, by what passes of so many rows took until now and by how
often proposals were right. Where nothing pays nothing is proposed, and what was learned is slowly forgotten, so that it
is tried again.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple
from weakref import WeakKeyDictionary

from pixtral_cli.engine.lookup import NOTHING, Lookup, Match
from pixtral_cli.engine.sequence import Sequence

MOST_ROWS = 8
"""Of a pass with proposals: as many as kernels for few rows take."""
WORTH = 1.03
"""A gain below this is within what measuring errs by."""
FIRST_LENGTH = 8
"""Shorter matches are not tried before a pass with proposals was measured: the first ones prepare what they run, on a
GPU for a part of a second."""
ROW_COST = 0.1
"""Of a pass, for each row more, until it is measured."""
NEWEST = 0.25  # the weight of the newest measurement in a mean
FORGOTTEN = 256  # passes after which a time not measured again is no longer believed
FIRST_SHARES = {1: 0.3, 2: 0.6, 3: 0.8, 4: 0.9}
"""How often a proposal is right after 2 and 3, 4 to 7, 8 to 15, and more tokens that match, until it is known."""
WEIGHT = 2.0  # of that, in proposals
KEPT, KEPT_UNTRIED = 0.98, 0.99
"""Of the counts, for every proposal, and for every match that was not tried: after some 100 it is tried again."""


class PassTimes:
    """Seconds that passes of N rows take: measured means, and lines between them."""

    def __init__(self) -> None:
        self._met: set[int] = set()
        self._seconds: dict[int, float] = {}
        self._measured: dict[int, int] = {}  # when, in passes
        self._passes = 0

    def measured(self, rows: int, seconds: float) -> None:
        """The first of each size counts for nothing: it prepares what the later ones find."""
        self._passes += 1
        if rows not in self._met:
            self._met.add(rows)
            return
        before = self._seconds.get(rows, seconds)
        self._seconds[rows] = before + NEWEST * min(seconds - before, before)  # another program may have come between
        self._measured[rows] = self._passes
        for old in [each for each, when in self._measured.items() if self._passes - when > FORGOTTEN]:
            del self._seconds[old], self._measured[old]

    def knows_above(self, rows: int) -> bool:
        """Whether a pass of more was measured, not too long ago."""
        return any(each > rows for each in self._seconds)

    def of(self, rows: int) -> float | None:
        """What `rows` are expected to take; None before anything is known."""
        if not self._seconds:
            return None
        if rows in self._seconds:
            return self._seconds[rows]
        below, above = ([n for n in self._seconds if (n < rows) == low] for low in (True, False))
        if below and above:
            first, second = max(below), min(above)
        elif len(self._seconds) > 1:
            first, second = sorted(self._seconds)[-2:] if below else sorted(self._seconds)[:2]
        else:
            (only,) = self._seconds
            return self._seconds[only] * (1 + ROW_COST * (rows - 1)) / (1 + ROW_COST * (only - 1))
        slope = max((self._seconds[second] - self._seconds[first]) / (second - first), 0.0)
        return max(self._seconds[first] + slope * (rows - first), self._seconds[first] / first * min(rows, first))


class Shares:
    """How often the token that is proposed after a match of some length is right. `before` knows of other sequences."""

    def __init__(self, before: Shares | None = None) -> None:
        self._before = before
        self._right: defaultdict[int, float] = defaultdict(float)
        self._all: defaultdict[int, float] = defaultdict(float)

    def of(self, length: int) -> float:
        kind = _kind(length)
        expected = FIRST_SHARES[kind] if self._before is None else self._before.of(length)
        return (self._right[kind] + WEIGHT * expected) / (self._all[kind] + WEIGHT)

    def count(self, length: int, right: bool) -> None:
        """A proposal was computed after a match of `length`."""
        self._forget(_kind(length), KEPT)
        self._right[_kind(length)] += right
        self._all[_kind(length)] += 1
        if self._before is not None:
            self._before.count(length, right)

    def untried(self, length: int) -> None:
        """A match was found and was not worth trying."""
        self._forget(_kind(length), KEPT_UNTRIED)
        if self._before is not None:
            self._before.untried(length)

    def _forget(self, kind: int, kept: float) -> None:
        self._right[kind] *= kept
        self._all[kind] *= kept


def _kind(length: int) -> int:
    return min(length.bit_length() - 1, max(FIRST_SHARES))


def worth_computing(matches: list[Match], shares: list[Shares], rows: int, times: PassTimes) -> list[int]:
    """How many tokens of each match to compute in a pass that has `rows` rows without them.

    Tokens expected of a pass are its rows' and, of each proposal, the chance that it and all before it are right; a
    match grows with every token that is. The likeliest come first.
    """
    alone = times.of(rows)
    if alone is None or rows >= MOST_ROWS:
        return [0] * len(matches)
    shortest = 0 if times.knows_above(rows) else FIRST_LENGTH
    chances: list[tuple[float, int]] = []
    for place, match in enumerate(matches):
        if match.length < shortest:
            continue
        chance = 1.0
        for n in range(len(match.tokens)):
            chance *= shares[place].of(match.length + n)
            chances.append((chance, place))
    chances.sort(key=lambda each: -each[0])
    most, best, expected = 0, WORTH * rows / alone, float(rows)
    for n, (chance, _) in enumerate(chances[: MOST_ROWS - rows], 1):
        expected += chance
        taken = times.of(rows + n)
        if taken and expected / taken > best:
            most, best = n, expected / taken
    counts = [0] * len(matches)
    for _, place in chances[:most]:
        counts[place] += 1
    return counts


class Guesses(NamedTuple):
    """What is known of one sequence."""

    lookup: Lookup
    shares: Shares


class Speculation:
    """Of one engine. `image_token_id` is the token that stands for a part of any image."""

    def __init__(self, image_token_id: int | None) -> None:
        self.times = PassTimes()
        self._image_token_id = image_token_id
        self._shares = Shares()
        self._guesses: WeakKeyDictionary[Sequence, Guesses] = WeakKeyDictionary()

    def proposals(self, sequences: list[Sequence]) -> list[Match]:
        """What is worth computing with the next token of each."""
        found = self._found(sequences)
        for sequence, (match, count) in zip(sequences, found, strict=True):
            if match.tokens and not count:
                self._of(sequence).shares.untried(match.length)
        return [Match(match.tokens[:count], match.length) for match, count in found]

    def promises(self, sequences: list[Sequence]) -> bool:
        """Whether it seems worth waiting for what was chosen last, so that something can be proposed."""
        return any(count for _, count in self._found(sequences))

    def _found(self, sequences: list[Sequence]) -> list[tuple[Match, int]]:
        """What may follow each, and how much of it is worth computing."""
        rows = len(sequences)
        if rows >= MOST_ROWS:
            return [(NOTHING, 0)] * rows
        matches = [self._ahead(sequence, min(MOST_ROWS - rows, sequence.unchosen - 1)) for sequence in sequences]
        shares = [self._of(sequence).shares for sequence in sequences]
        return list(zip(matches, self.worth(matches, shares, rows), strict=True))

    def _ahead(self, sequence: Sequence, most: int) -> Match:
        """What may follow tokens that are known, or unread: then the first of what was found stands for these."""
        if most < 1 or not sequence.row.follows_logits:
            return NOTHING
        match = self.look_up(sequence, sequence.unread + most)
        return Match(match.tokens[sequence.unread :], match.length)

    def look_up(self, sequence: Sequence, most: int) -> Match:
        """Up to `most` tokens that may follow the known ones."""
        return self._of(sequence).lookup.match(sequence.token_ids, sequence.known, most)

    def worth(self, matches: list[Match], shares: list[Shares], rows: int) -> list[int]:
        return worth_computing(matches, shares, rows, self.times)

    def tried(self, sequence: Sequence, length: int, right: bool) -> None:
        """Whether the token that was proposed after a match of `length` was right."""
        self._of(sequence).shares.count(length, right)

    def _of(self, sequence: Sequence) -> Guesses:
        guesses = self._guesses.get(sequence)
        if guesses is None:
            guesses = self._guesses[sequence] = Guesses(Lookup(self._image_token_id), Shares(self._shares))
        return guesses
