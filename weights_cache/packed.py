"""What a weight is that stays in its encoding: the protocol, and the plain kind, rows of blocks. Knows no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from . import codecs
from .encodings import ENCODINGS


@runtime_checkable
class PackedWeight(Protocol):
    """A matrix [out, in] that is kept in an encoding and decoded when it is used.

    A kernel is chosen by its type and `encoding`; any of them can be decoded. Nothing here copies what a file maps.
    """

    @property
    def encoding(self) -> str:
        """The encoding's name ("q4_k", "nf4"), as in `encodings.py`."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""

    def tensors(self) -> dict[str, Tensor]:
        """Its parts, as they are stored; the first of them goes by the weight's own name in a file."""

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in]: exact in float32, rounded once in a narrower dtype."""

    def in_rows(self) -> PackedWeight:
        """The same weight in the order of its codec, whatever kernel it was put in order for."""

    def to(self, device: torch.device) -> PackedWeight:
        """The same weight with all parts on `device`."""


@dataclass(frozen=True, eq=False)
class PackedRows:
    """A matrix [out, in] in any encoding of `codecs`: `rows` are its bytes as GGUF has them, uint8 [out, row_bytes]."""

    encoding: str
    rows: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), ENCODINGS[self.encoding].columns(self.rows.shape[1])

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return codecs.get(self.encoding).decode(self.rows, dtype)

    def in_rows(self) -> PackedRows:
        return self

    def to(self, device: torch.device) -> PackedRows:
        return PackedRows(self.encoding, self.rows.to(device))
