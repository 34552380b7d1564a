"""A GGUF file in; its metadata and its tensors out, mapped or decoded. Knows no model and no names' meaning."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .gguf_header import LEAST_BYTES, Header, Metadata
from .reader import TensorInfo, map_file, mapped_tensor, packed_shape

if TYPE_CHECKING:
    import torch

PLAIN = ("float32", "float16", "bfloat16")
"""Encodings that are torch's own dtypes of the same name."""


class GgufFile:
    """One file, mapped into memory at once and read only where it is touched.

    Raises CheckpointCorrupt when the header contradicts itself or the file's length, and NotYetSupported for a
    version or a tensor type that cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._buffer = map_file(path, LEAST_BYTES, "GGUF")
        self._header = Header(path, self._buffer)

    @property
    def metadata(self) -> Metadata:
        """The file's keys -> numbers, texts and lists."""
        return self._header.metadata

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The file's own names -> TensorInfo, in the order of the header."""
        return {name: entry.info for name, entry in self._header.entries.items()}

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor `name`: shares the file's mapping if it is a plain one, else decoded to float32."""
        import torch

        entry = self._header.entries[name]
        info = entry.info
        if info.encoding in PLAIN:
            return mapped_tensor(self._buffer, entry.begin, getattr(torch, info.encoding), info.shape)
        from . import codecs

        return codecs.get(info.encoding).decode(self.packed(name)).view(info.shape)

    def packed(self, name: str) -> "torch.Tensor":
        """The bytes of the tensor `name`, sharing the file's mapping: uint8 [rows, bytes of a row]."""
        import torch

        entry = self._header.entries[name]
        return mapped_tensor(self._buffer, entry.begin, torch.uint8, packed_shape(entry.info))
