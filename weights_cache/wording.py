"""What sentences for people share: sizes, short lists, and how to get a model's files again. Knows no other module."""

from collections.abc import Sequence
from pathlib import Path

NAMES_SHOWN = 3

FETCH_AGAIN = "Fetch the model again with --force-download"
"""Begins a hint where nobody knows how the files came here: whoever knows puts one of the others in its place."""
COPY_AGAIN = "Copy the model's files here again"
EXPORT_AGAIN = "Export the model again"


def get_again(path: Path) -> str:
    """How to get the file or folder `path` again, without a full stop: only what lies in a cache was fetched."""
    is_fetched = any(folder.name == "snapshots" for folder in path.absolute().parents)
    return FETCH_AGAIN if is_fetched else COPY_AGAIN


def listed(names: Sequence[str], shown: int = NAMES_SHOWN) -> str:
    """`a, b, c and 4 more`: a list short enough for a sentence."""
    head = ", ".join(names[:shown])
    return f"{head} and {len(names) - shown} more" if len(names) > shown else head


def size(nbytes: float) -> str:
    """`23.6 GiB`: a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
