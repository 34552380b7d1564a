"""A path in, a name beside it to write under, which takes its place when it is whole. Knows no format."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Inside, write to the given path: at the end it becomes `path`, and after an error nothing is left of it.

    A reader sees what was there before or all of the new, never half. Folders are made. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(6)}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
