"""A large file in, whether this machine has already seen it whole out: so that its hashes are checked once.

A stamp holds the file's size, time of change and inode under the name of its content's hash. Whoever changes the
file changes its time, and it is checked again.
"""

import os
from contextlib import suppress
from pathlib import Path

from .own_cache import own_cache_folder

FOLDER = "stamps"


def known(path: Path, content: bytes) -> bool:
    """Whether the file of that content hash was written or checked here and has not been touched since."""
    with suppress(OSError):
        return _stamp(content).read_text() == _state(path)
    return False


def remember(path: Path, content: bytes) -> None:
    """Note that the file is whole as it stands. Without a writable cache it will be checked again, no more."""
    with suppress(OSError):
        stamp = _stamp(content)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        partial = stamp.with_name(f"{stamp.name}.{os.getpid()}")
        partial.write_text(_state(path))
        partial.replace(stamp)


def _stamp(content: bytes) -> Path:
    return own_cache_folder() / FOLDER / content.hex()


def _state(path: Path) -> str:
    found = path.stat()
    return f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ino}"
