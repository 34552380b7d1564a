"""A large file in, whether this machine has already seen it whole out: so that its hashes are checked once.

A stamp is a file of one line, named after the path: the hash of the content, size, time of change, inode, path. Whoever
changes the file changes that time (ctime: unlike the content's own, nobody can set it back), and it is checked again.
The stamp's own time is when the file was last used. So stamps also say where serialized models lie that were written
to a place of the user's.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .own_cache import own_cache_folder
from .replacing import replacing

FOLDER = "stamps"
FIELDS = 4  # before the path


def known(path: Path, content: bytes) -> bool:
    """Whether the file of that content hash was written or checked here and has not been touched since."""
    with suppress(OSError):
        stamp = _stamp(path)
        if stamp.read_bytes() == _line(path, content):
            os.utime(stamp)
            return True
    return False


def remember(path: Path, content: bytes) -> None:
    """Note that the file is whole as it stands. Without a writable cache it will be checked again, no more."""
    with suppress(OSError), replacing(_stamp(path)) as temporary:
        temporary.write_bytes(_line(path, content))


def files() -> Iterator[Path]:
    """The files that were ever remembered and are there; of those that are not, the stamp is removed."""
    with suppress(OSError):
        for stamp in sorted((own_cache_folder() / FOLDER).iterdir()):
            with suppress(OSError):
                path = Path(os.fsdecode(stamp.read_bytes().split(b" ", FIELDS)[-1]))
                if stamp == _stamp(path) and path.is_file():
                    yield path
                else:
                    stamp.unlink()


def last_used(path: Path) -> float | None:
    """When the file was last written, checked or loaded, in seconds since 1970, or None."""
    with suppress(OSError):
        return _stamp(path).stat().st_mtime
    return None


def _stamp(path: Path) -> Path:
    return own_cache_folder() / FOLDER / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()


def _line(path: Path, content: bytes) -> bytes:
    found = path.stat()
    numbers = f"{content.hex()} {found.st_size} {found.st_ctime_ns} {found.st_ino} "
    return numbers.encode() + os.fsencode(path.resolve())
