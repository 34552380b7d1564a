"""What a weights file is, by its first bytes: a name may say anything, or nothing. Knows no format's inside.

`git clone` without Git LFS leaves a pointer, three lines of text, in the place of every large file
(https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
"""

from contextlib import suppress
from pathlib import Path
from typing import Literal

from .errors import LfsPointer

Kind = Literal["gguf", "safetensors", "pickle"]
GGUF_MAGIC = b"GGUF"
MAX_HEADER_BYTES = 100_000_000  # of safetensors: the limit of the format's reference implementation
PICKLE_MAGICS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")  # torch's archives, and bare pickles
SUFFIXES: dict[str, Kind] = {
    ".gguf": "gguf",
    ".safetensors": "safetensors",
    **dict.fromkeys((".bin", ".pt", ".pth", ".pkl", ".ckpt"), "pickle"),
}
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
LFS_BYTES = 1024  # a pointer has fewer


def of(path: Path) -> Kind | None:
    """What the weights file `path` is: by its header, else (so that its reader can say what is wrong) by its name.

    None for what is no file, or none of weights. Raises LfsPointer.
    """
    start = _start(path)
    refuse_pointer(path, start)
    if start.startswith(GGUF_MAGIC):
        return "gguf"
    if start.startswith(PICKLE_MAGICS):
        return "pickle"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES:
        return "safetensors"
    return SUFFIXES.get(path.suffix)


def refuse_pointer(path: Path, start: bytes | None = None) -> None:
    """Raise LfsPointer if the file `path`, which begins with the bytes `start`, is a pointer of Git LFS.

    A file that cannot be opened is left to its reader.
    """
    start = _start(path) if start is None else start
    if start.startswith(LFS_MAGIC):
        raise LfsPointer(path)


def _start(path: Path) -> bytes:
    """The first bytes of the file; none of what cannot be opened."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(LFS_BYTES)
    return b""
