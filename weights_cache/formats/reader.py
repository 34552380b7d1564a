"""What every file format offers: tensors by the file's own names, known before a byte of data is read.

Knows no format. Each format's file has a `Reader`; tensors.py chooses it and translates its names. What they share is
here too: a file mapped into memory, and a part of it as a tensor.
"""

import math
import mmap
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from weights_cache import file_kind
from weights_cache.errors import CheckpointCorrupt, Unreadable

if TYPE_CHECKING:
    import torch

    from weights_cache.packed import PackedWeight

_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python's mmap has a name for it from 3.13 on


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor: `dtype` in the format's words ("BF16"), `shape`, `nbytes` in the file.

    `encoding` is the name of the codec that reads it ("bfloat16", "q4_k"); what no codec reads has torch's name of
    its dtype ("uint8").
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    encoding: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A checked tensor of a header: its bytes are [begin, end) of the file."""

    info: TensorInfo
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.info.nbytes


class Reader(Protocol):
    """One opened weights file."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The file's own names -> TensorInfo."""

    def weight(self, name: str) -> "torch.Tensor | PackedWeight":
        """The tensor that the file calls `name`, memory-mapped: a matrix that is packed stays so; other packed tensors
        are decoded to float32."""

    def release(self, name: str) -> None:
        """Give back the memory that reading the tensor has taken; it is read again if it is touched again."""


def merged(files: Sequence[Reader]) -> dict[str, Reader]:
    """The name of every tensor -> the file that has it. Raises CheckpointCorrupt when two of them do."""
    found: dict[str, Reader] = {}
    for file in files:
        for name, info in file.tensors.items():
            if found.setdefault(name, file) is not file:
                first = found[name].tensors[name].file
                raise CheckpointCorrupt(info.file, f"its {name!r} is in {first} too")
    return found


def map_file(path: Path, least: int, kind: str) -> mmap.mmap:
    """The whole file, which as a `kind` must have `least` bytes, as a private mapping: writable (torch wants that),
    yet never written back.

    No swap is reserved for it, so that a file larger than the machine's memory can be mapped. Raises CheckpointCorrupt,
    and LfsPointer for what is none.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            file_kind.refuse_pointer(path, file.read(file_kind.LFS_BYTES))
            if size < least:
                raise CheckpointCorrupt(path, f"it has {size} bytes, and a {kind} file has at least {least}")
            if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise Unreadable(path, error.strerror or str(error)) from error


def mapped_tensor(buffer: mmap.mmap, begin: int, dtype: "torch.dtype", shape: tuple[int, ...]) -> "torch.Tensor":
    """The tensor whose bytes begin at `begin`, sharing the mapping: no copy; writing to it never reaches the file.

    A tensor that does not lie at a multiple of its element size (formats allow it) is copied.
    """
    import torch

    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    if begin % dtype.itemsize:
        raw = torch.frombuffer(buffer, dtype=torch.uint8, count=count * dtype.itemsize, offset=begin)
        return raw.clone().view(dtype).view(shape)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=begin).view(shape)


def release(buffer: mmap.mmap, entry: Entry) -> None:
    """Give back the memory that reading the tensor has taken: who has converted it does not need the original.

    The bytes are read again if they are touched again. Whole pages only; a platform without madvise keeps them.
    """
    first = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        buffer.madvise(mmap.MADV_DONTNEED, first, last - first)
