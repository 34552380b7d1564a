"""Text in pieces, text safe to show out; knows stop strings, not tokens."""

from __future__ import annotations

from collections.abc import Iterable


class StopMatcher:
    """Find the first of several stop strings in streamed text, however it is cut into pieces.

    The first stop is the one that is complete first; of two complete at once, the longer. Neither it nor what follows
    is shown. Text that might be the beginning of a stop is held back until it is decided.

    >>> matcher = StopMatcher(["END"])
    >>> matcher.push("the E"), matcher.push("Nd"), matcher.push(" END x")
    (('the ', False), ('ENd', False), (' ', True))
    """

    def __init__(self, stops: Iterable[str] = ()):
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; give the text that is now safe to show, and whether a stop was met."""
        if self._stopped:
            return "", True
        text = self._held + text
        start = self._first_stop(text)
        self._stopped = start is not None
        cut = len(text) - self._undecided(text) if start is None else start
        self._held = "" if self._stopped else text[cut:]
        return text[:cut], self._stopped

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _undecided(self, text: str) -> int:
        """The length of the longest end of `text` which begins, but is not, a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
