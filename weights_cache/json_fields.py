"""A JSON object that nobody vouches for in, checked values out. Knows no meaning of a key, and no model.

`Fields` is the typed access. What an error says, and its class, is its subclass's: `CheckpointFields` here,
`SideFile` for a prompt's files, `ConfigFields` for a model's sizes.
"""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointCorrupt, Unreadable
from .file_kind import refuse_pointer

MAX_SIZE = 2**31 - 1


class NotAnObject(ValueError):
    """Valid JSON, but not an object."""


def load_object(text: bytes) -> dict[str, Any]:
    """`text` as a JSON object. A byte order mark, which editors on Windows put first, is passed over.

    Raises ValueError for what is not JSON, is nested too deeply or has a key twice, and NotAnObject.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
        raise NotAnObject(f"it should hold an object, not {kind}")
    return value


def parse_json_object(path: Path, text: bytes, what: str = "it") -> dict[str, Any]:
    """`text`, which `path` holds, as a JSON object. Raises CheckpointCorrupt; `what` begins the reason."""
    try:
        return load_object(text)
    except NotAnObject as error:
        raise CheckpointCorrupt(path, f"{what} is not a JSON object") from error
    except ValueError as error:
        raise CheckpointCorrupt(path, f"{what} is not valid JSON ({error})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`. Raises CheckpointCorrupt, Unreadable or LfsPointer."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise Unreadable(path, error.strerror or str(error)) from error
    refuse_pointer(path, text)
    return parse_json_object(path, text)


@dataclass(frozen=True)
class Fields(ABC):
    """Typed access to the object `values`. A key that is null counts as absent; without a default it must be there."""

    values: Mapping[str, Any]

    @abstractmethod
    def wrong(self, key: str, wanted: str) -> Exception:
        """The error for a value that is not what is `wanted`, or is absent."""

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:
        """The value as it is; None when it is absent."""
        return self.values.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number below 2^31."""
        return self.checked(key, default, is_size, "a positive whole number")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive and finite number."""
        return self.checked(key, default, is_positive, "a positive number")

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self.checked(key, default, lambda value: isinstance(value, bool), "true or false")

    def text(self, key: str, default: str | None = None) -> str:
        return self.checked(key, default, lambda value: isinstance(value, str), "a text")

    def object(self, key: str, default: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        return self.checked(key, default, lambda value: isinstance(value, Mapping), "an object")

    def checked(self, key: str, default: Any, is_right: Callable[[Any], bool], wanted: str) -> Any:
        """The value of `key` if it `is_right`; without one the `default`, unless that is None."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not is_right(value):
            raise self.wrong(key, wanted)
        return value


@dataclass(frozen=True)
class CheckpointFields(Fields):
    """The fields of an object in the checkpoint's file `path`; `prefix` comes before each key in errors."""

    path: Path
    prefix: str = ""

    def wrong(self, key: str, wanted: str) -> CheckpointCorrupt:
        if key not in self:
            return CheckpointCorrupt(self.path, f"it does not say {self.prefix + key!r}")
        shown = str(self.values[key])[:60]
        return CheckpointCorrupt(self.path, f"its {self.prefix + key!r} is {shown!r} and not {wanted}")


def is_size(value: Any) -> bool:
    """Whether it is a positive whole number below 2^31; a bool is none."""
    return type(value) is int and 0 < value <= MAX_SIZE


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold, infinities left out; a bool is none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:200]!r} occurs twice")
        found[key] = value
    return found
