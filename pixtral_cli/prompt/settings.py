"""A checkpoint's small JSON files in, checked values out; an error names the file and the key. Knows no meanings."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixtral_cli.prompt.errors import FETCH_AGAIN, PromptError


class SettingsUnreadable(PromptError):
    """A file of settings is damaged, or one of its values is not what it should be."""

    default_hint = f"{FETCH_AGAIN}, or correct the file."


@dataclass(frozen=True)
class Settings:
    """The object in one file, or a part of it. A key that is missing or null gives the default."""

    values: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    """What to call it in a sentence."""

    @classmethod
    def read(cls, path: Path | None) -> Settings:
        """The object in a JSON file; nothing without one. Raises SettingsUnreadable."""
        if path is None:
            return cls()
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise SettingsUnreadable(f"Cannot read {path}: {reason_of(error)}.") from error
        if not isinstance(values, dict):
            raise SettingsUnreadable(f"Cannot read {path}: it should hold an object, not {_kind(values)}.")
        return cls(values, str(path))

    def section(self, key: str) -> Settings:
        """The object under `key`."""
        return Settings(self._checked(key, dict, "an object", {}), f"{key} in {self.where}")

    def flag(self, key: str, default: bool) -> bool:
        return self._checked(key, bool, "true or false", default)

    def positive(self, key: str, default: float | None = None) -> Any:
        """A finite number above 0."""
        value = self.values.get(key)
        if value is None:
            return default
        if not _is_number(value) or value <= 0:
            raise self.wrong(key, "a number above 0")
        return value

    def length(self, key: str, default: int | None = None) -> Any:
        """A whole number above 0."""
        value = self.positive(key, default)
        if value is not None and value != int(value):
            raise self.wrong(key, "a whole number above 0")
        return None if value is None else int(value)

    def three(self, key: str, default: tuple[float, ...], *, positive: bool = False) -> tuple[float, ...]:
        """Three numbers, one for each colour."""
        value = self._checked(key, list, "a list of three numbers", list(default))
        if len(value) != 3 or not all(map(_is_number, value)) or (positive and min(value) <= 0):
            raise self.wrong(key, "a list of three numbers" + " above 0" * positive)
        return tuple(value)

    def token(self, key: str, default: str | None) -> str | None:
        """A token's text: a string, or an object with one under `content`; None where it is null."""
        value = self.values.get(key, default)
        if isinstance(value, dict):
            value = value.get("content")
        if not isinstance(value, str | None):
            raise self.wrong(key, "a token's text")
        return value

    def wrong(self, key: str, wanted: str) -> SettingsUnreadable:
        """The error for a value that is not what is wanted."""
        found = json.dumps(self.values[key])
        shown = found if len(found) <= 60 else found[:60] + "…"
        return SettingsUnreadable(f"{key} in {self.where} should be {wanted}, not {shown}.")

    def _checked(self, key: str, kind: type, wanted: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.wrong(key, wanted)
        return value


def reason_of(error: Exception) -> str:
    """What an exception says, on one line and without a full stop."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    visible = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(visible.split()).rstrip(".") or type(error).__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number")
