"""A mapping from an untrusted file in, its fields as what they should be out. Knows no format and no model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointCorrupt

_REQUIRED: Any = object()


class Fields:
    """The fields of `values`, which `path` holds; one that is missing or of another type is a CheckpointCorrupt."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    def __contains__(self, key: str) -> bool:
        return self.values.get(self.prefix + key) is not None

    def get(self, key: str) -> Any:
        """The value as it is; None when it is absent."""
        return self.values.get(self.prefix + key)

    def count(self, key: str, default: Any = _REQUIRED) -> Any:
        """A positive whole number, or `default` when it is absent."""
        value = self._found(key, default)
        if value is default or (type(value) is int and 0 < value < 2**63):
            return value
        raise self._wrong(key, value, "a positive whole number")

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A positive number, or `default` when it is absent."""
        value = self._found(key, default)
        if value is default or (type(value) in (int, float) and 0 < value < float("inf")):
            return value
        raise self._wrong(key, value, "a positive number")

    def flag(self, key: str, default: bool) -> bool:
        value = self._found(key, default)
        if isinstance(value, bool):
            return value
        raise self._wrong(key, value, "true or false")

    def text(self, key: str, default: str = "") -> str:
        value = self._found(key, default)
        if isinstance(value, str):
            return value
        raise self._wrong(key, value, "a text")

    def _found(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is _REQUIRED:
            raise CheckpointCorrupt(self.path, f"it does not say {self.prefix + key!r}")
        return default if value is None else value

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(self.path, f"its {self.prefix + key!r} is {str(value)[:60]!r} and not {expected}")
