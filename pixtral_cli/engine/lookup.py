"""A sequence's tokens in, what came after them the last time out: prompt look-up. Knows no model and no time.

After Saxena 2023, "Prompt Lookup Decoding". The tokens at the end are looked for further up, in prompt and answer: what
followed there is proposed. Here every earlier place of the last two tokens is known at once, and of the latest CHAIN
places the one that agrees with most tokens before is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LONGEST = 16
"""Tokens that are compared; more say nothing new."""
CHAIN = 16
"""Places that are compared: a step costs microseconds, whatever repeats."""


class Match(NamedTuple):
    """`tokens` may come next, for the `length` tokens before them came before: 2 to LONGEST, 0 if nothing did."""

    tokens: tuple[int, ...] = ()
    length: int = 0


NOTHING = Match()


class Lookup:
    """The pairs of one sequence's tokens; `image_token_id` stands for any image, so it matches and follows nothing."""

    def __init__(self, image_token_id: int | None) -> None:
        self._image_token_id = image_token_id
        self._latest: dict[tuple[int, int], int] = {}
        """Of each pair of tokens, where it ends last."""
        self._before: list[int] = [0]
        """Of the pair that ends at each token, where it ended before; 0, where none can end, if it did not."""

    def match(self, token_ids: Sequence[int], known: int, most: int) -> Match:
        """Up to `most` tokens that may come after the first `known` of `token_ids`, no fewer than in the last call."""
        end = known - 1
        for at in range(len(self._before), end):
            pair = token_ids[at - 1], token_ids[at]
            self._before.append(self._latest.get(pair, 0))
            if self._image_token_id not in pair:
                self._latest[pair] = at
        place, best, longest = self._latest.get((token_ids[end - 1], token_ids[end]), 0), 0, 0
        for _ in range(CHAIN):
            if place == 0 or longest == LONGEST:
                break
            if (length := self._agreeing(token_ids, place, end)) > longest:
                best, longest = place, length
            place = self._before[place]
        return (
            Match(self._following(token_ids[best + 1 : min(best + 1 + most, known)], most), longest)
            if best
            else NOTHING
        )

    def _agreeing(self, token_ids: Sequence[int], place: int, end: int) -> int:
        """How many tokens up to `place` are those up to `end`, two of which are known to be."""
        length = 2
        while length < LONGEST and length <= place:
            token_id = token_ids[place - length]
            if token_id != token_ids[end - length] or token_id == self._image_token_id:
                break
            length += 1
        return length

    def _following(self, came: Sequence[int], most: int) -> tuple[int, ...]:
        """Of the tokens that came, `most`: beyond the end they go round, for a text that repeats itself may go on."""
        found = tuple(came[n % len(came)] for n in range(most))
        return found[: found.index(self._image_token_id)] if self._image_token_id in found else found
