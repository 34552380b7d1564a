"""A GGUF file in; its metadata and its tensors out, mapped or decoded. Knows no model and no names' meaning."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from . import layout
from .errors import CheckpointCorrupt
from .gguf_header import LEAST_BYTES, Entry, Header, Metadata
from .reader import TensorInfo, map_file, mapped_tensor, packed_shape, release

if TYPE_CHECKING:
    import torch

PLAIN = ("float32", "float16", "bfloat16")
"""Encodings that are torch's own dtypes of the same name."""


class GgufFile:
    """One GGUF, mapped into memory at once and read only where it is touched.

    One in several files (`name-00001-of-00003.gguf`, as llama.cpp splits them) is opened by the first, with its
    metadata. Raises CheckpointCorrupt when a header contradicts itself or the file's length, or a file is missing,
    and NotYetSupported for a version or a tensor type that cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._parts = [_Part(each) for each in layout.gguf_shards(path)]
        self._part_of: dict[str, _Part] = {}
        for part in self._parts:
            for name in part.entries:
                if name in self._part_of:
                    raise CheckpointCorrupt(
                        part.path, f"tensor {name[:200]!r} is in {self._part_of[name].path} as well"
                    )
                self._part_of[name] = part
        self._check_split()

    @property
    def metadata(self) -> Metadata:
        """The file's keys -> numbers, texts and lists."""
        return self._parts[0].metadata

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The file's own names -> TensorInfo, in the order of the header."""
        return {name: part.entries[name].info for name, part in self._part_of.items()}

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor `name`: shares the file's mapping if it is a plain one, else decoded to float32."""
        import torch

        part = self._part_of[name]
        entry = part.entries[name]
        if entry.info.encoding in PLAIN:
            dtype = getattr(torch, entry.info.encoding)
            return mapped_tensor(part.buffer, entry.begin, dtype, entry.info.shape)
        from . import codecs

        return codecs.get(entry.info.encoding).decode(self.packed(name)).view(entry.info.shape)

    def packed(self, name: str) -> "torch.Tensor":
        """The bytes of the tensor `name`, sharing the file's mapping: uint8 [rows, bytes of a row]."""
        import torch

        part = self._part_of[name]
        entry = part.entries[name]
        return mapped_tensor(part.buffer, entry.begin, torch.uint8, packed_shape(entry.info))

    def release(self, name: str) -> None:
        """Give back the memory that reading the tensor `name` has taken."""
        part = self._part_of[name]
        begin = part.entries[name].begin
        release(part.buffer, begin, begin + part.entries[name].info.nbytes)

    def _check_split(self) -> None:
        """Whether the files are as many, and hold as many tensors, as the first says."""
        files, tensors = (self.metadata.get(f"split.{key}") for key in ("count", "tensors.count"))
        if files not in (None, 0, len(self._parts)):
            raise CheckpointCorrupt(self.path, f"it is one of {files} files, whose names should end in -00001-of-…")
        if len(self._parts) > 1 and tensors not in (None, len(self._part_of)):
            raise CheckpointCorrupt(
                self.path, f"it promises {tensors} tensors, and its files have {len(self._part_of)}"
            )


class _Part:
    """One file on the disk."""

    def __init__(self, path: Path):
        self.path = path
        self.buffer = map_file(path, LEAST_BYTES, "GGUF")
        header = Header(path, self.buffer)
        self.metadata: Metadata = header.metadata
        self.entries: Mapping[str, Entry] = header.entries
