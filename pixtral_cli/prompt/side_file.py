"""A JSON file beside a checkpoint's weights in, checked values out; an error names file and key. Knows no meanings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixtral_cli.errors import reason_of
from pixtral_cli.prompt.errors import PromptError
from weights_cache.json_fields import Fields, is_number, is_positive, load_object
from weights_cache.wording import FETCH_AGAIN


class SideFileUnreadable(PromptError):
    """A file of settings is damaged, or one of its values is not what it should be."""

    default_hint = f"{FETCH_AGAIN}, or correct the file."


@dataclass(frozen=True)
class SideFile(Fields):
    """The object in one file, or a part of it. A key that is missing or null gives the default."""

    values: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    """What to call it in a sentence."""

    @classmethod
    def read(cls, path: Path | None) -> SideFile:
        """The object in a JSON file; nothing without one. Raises SideFileUnreadable."""
        if path is None:
            return cls()
        try:
            return cls(load_object(path.read_bytes()), str(path))
        except (OSError, ValueError) as error:
            raise SideFileUnreadable(f"Cannot read {path}: {reason_of(error)}.") from error

    def section(self, key: str) -> SideFile:
        """The object under `key`."""
        return SideFile(self.object(key, {}), f"{key} in {self.where}")

    def positive(self, key: str, default: float) -> float:
        """A finite number above 0."""
        return self.checked(key, default, is_positive, "a number above 0")

    def length(self, key: str, default: int | None = None) -> int:
        """A whole number above 0, which may be written 4.0."""

        def is_right(value: Any) -> bool:
            return is_positive(value) and value == int(value)

        return int(self.checked(key, default, is_right, "a whole number above 0"))

    def three(self, key: str, default: tuple[float, ...], *, positive: bool = False) -> tuple[float, ...]:
        """Three numbers, one for each colour."""

        def is_right(value: Any) -> bool:
            each = is_positive if positive else is_number
            return isinstance(value, list | tuple) and len(value) == 3 and all(map(each, value))

        return tuple(self.checked(key, default, is_right, "a list of three numbers" + " above 0" * positive))

    def token(self, key: str, default: str | None) -> str | None:
        """A token's text: a string, or an object with one under `content`; None where it is null."""
        value = self.values.get(key, default)
        if isinstance(value, dict):
            value = value.get("content")
        if not isinstance(value, str | None):
            raise self.wrong(key, "a token's text")
        return value

    def wrong(self, key: str, wanted: str) -> SideFileUnreadable:
        found = json.dumps(self.values.get(key))
        shown = found if len(found) <= 60 else found[:60] + "…"
        return SideFileUnreadable(f"{key} in {self.where} should be {wanted}, not {shown}.")
