"""A JSON file that should hold an object in, the object out, or a CheckpointCorrupt that names the file."""

import json
from pathlib import Path
from typing import Any

from . import lfs
from .errors import CheckpointCorrupt, Unreadable


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`. Raises CheckpointCorrupt with the place of the first mistake."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise Unreadable(path, error.strerror or str(error)) from error
    lfs.refuse_pointer(path, text)
    return parse_json_object(path, text)


def parse_json_object(path: Path, text: bytes, what: str = "it") -> dict[str, Any]:
    """`text` as a JSON object without doubled keys; `what` begins the reason when it is anything else.

    A byte order mark, which editors on Windows put first, is passed over.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointCorrupt(path, f"{what} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointCorrupt(path, f"{what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:200]!r} occurs twice")
        found[key] = value
    return found
