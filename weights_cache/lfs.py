"""The first bytes of a file in, an error out if they are a pointer of Git LFS. Knows no format.

`git clone` without Git LFS leaves such a text of three lines in the place of every large file
(https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
"""

from contextlib import suppress
from pathlib import Path

from .errors import LfsPointer

MOST_BYTES = 1024  # a pointer has fewer
BEGINNING = b"version https://git-lfs.github.com/spec/"


def check(path: Path) -> None:
    """Raise LfsPointer if the file `path` is one; one that cannot be opened is left to its reader."""
    with suppress(OSError), path.open("rb") as file:
        refuse_pointer(path, file.read(MOST_BYTES))


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raise LfsPointer if the bytes with which the file `path` begins are those of a pointer."""
    if start.startswith(BEGINNING):
        raise LfsPointer(path)
