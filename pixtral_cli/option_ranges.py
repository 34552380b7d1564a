"""The ranges of the generation options: one table for flags, Python and HTTP. Knows no flag, no field and no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `whole` ones only, or any finite ones."""

    low: float
    high: float = math.inf
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        """True and False are no numbers, and a whole number is a float as well."""
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return self.low <= value <= self.high and value < math.inf

    def __str__(self) -> str:
        """As in "top_p should be …"."""
        number = "a whole number, " if self.whole else ""
        return number + (f"from {self.low} to {self.high}" if self.high < math.inf else f"{self.low} or above")


OPTION_RANGES = {
    "top_k": Range(-1, whole=True),
    "temperature": Range(0),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0.001, 1000),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "logit_bias": Range(-100, 100),
    "seed": Range(-(2**63) + 1, 2**63 - 1, whole=True),
    "logprobs": Range(0, whole=True),
}
"""What each option may be. `top_k` 0 and -1 and a `seed` below 0 mean that none is set; `top_p` 0 is greedy."""
