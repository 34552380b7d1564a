"""Measurements in, rows out: each beside what the machine allows and what is asked, printed and written as it comes.

Knows no torch and nothing of what is measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HEAD = "| work | encoding | tokens | batch | measured | of the limit | asked | |\n" + "| --- " * 8 + "|"
LESS_IS_BETTER = ("ms", "error")


@dataclass(frozen=True)
class Row:
    """`ours` is a median, `low` and `high` its spread; `limit` and `asked` are in the same unit."""

    work: str
    encoding: str
    tokens: int
    batch: int
    ours: float
    low: float
    high: float
    unit: str
    limit: float | None
    limit_fraction: float | None
    asked: float | None
    asked_as: str
    reached: bool | None
    card: str
    torch: str
    date: str

    def __str__(self) -> str:
        what = f"{self.work} {self.encoding}, {self.batch} x {self.tokens}"
        return f"{what:44} {self._measured:40} {self._share:24} {self._asked:36} {self._verdict}".rstrip()

    @property
    def markdown(self) -> str:
        """A line of the table whose first lines are HEAD."""
        verdict = self._verdict if self.reached is not False else f"**{self._verdict}**"
        columns = self.work, self.encoding, self.tokens, self.batch, self._measured, self._share, self._asked, verdict
        return "| " + " | ".join(map(str, columns)) + " |"

    @property
    def _measured(self) -> str:
        return f"{self.ours:,.4g} {self.unit} ({self.low:,.4g} to {self.high:,.4g})"

    @property
    def _share(self) -> str:
        return "" if self.limit is None else f"{self.limit_fraction:.0%} of {self.limit:,.4g}"

    @property
    def _asked(self) -> str:
        return "" if self.asked is None else f"{self.asked:,.4g} ({self.asked_as})"

    @property
    def _verdict(self) -> str:
        return {None: "", True: "reached", False: "not reached"}[self.reached]


class Table:
    """The rows so far, and what was left out; in `path`, if there is one, from the first row on."""

    def __init__(self, path: Path | None, card: str, torch: str) -> None:
        self.path, self.card, self.torch = path, card, torch
        self.rows: list[Row] = []
        self.left_out: list[str] = []

    def add(
        self,
        work: str,
        encoding: str,
        tokens: int,
        batch: int,
        values: list[float],
        unit: str = "tok/s",
        limit: float | None = None,
        asked: tuple[float, str] | None = None,
    ) -> float:
        """Note the rounds of a measurement -> their median. What is asked is a figure, and words for it."""
        ours, wanted = statistics.median(values), asked[0] if asked else None
        less = unit in LESS_IS_BETTER
        fraction = None if limit is None else limit / ours if less else ours / limit
        reached = None if wanted is None else ours <= wanted if less else ours >= wanted
        row = Row(
            work, encoding, tokens, batch, ours, min(values), max(values), unit, limit, fraction, wanted,
            asked[1] if asked else "", reached, self.card, self.torch, today(),
        )  # fmt: skip
        self.rows.append(row)
        print(row, flush=True)
        self.write()
        return ours

    def leave_out(self, what: str, why: str) -> None:
        self.left_out.append(f"{what}: {why}")
        print(f"LEFT OUT: {what}: {why}", flush=True)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            found = {"rows": [asdict(row) for row in self.rows], "left_out": self.left_out}
            self.path.write_text(json.dumps(found, indent=1) + "\n")

    def found(self, work: str, encoding: str, tokens: int, batch: int) -> float | None:
        """The median of an earlier row."""
        wanted = (work, encoding, tokens, batch)
        rows = (row.ours for row in self.rows if (row.work, row.encoding, row.tokens, row.batch) == wanted)
        return next(rows, None)


def markdown(found: Mapping[str, Any]) -> str:
    """The table of what `Table.write` wrote."""
    rows = [Row(**row) for row in found["rows"]]
    first = [f"{rows[0].card}, torch {rows[0].torch}, {rows[0].date}", "", HEAD] if rows else []
    left_out = [f"- left out: {what}" for what in found["left_out"]]
    return "\n".join([*first, *(row.markdown for row in rows), "", *left_out])


def today() -> str:
    return datetime.now(UTC).date().isoformat()
