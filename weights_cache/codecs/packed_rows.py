"""A matrix that stays packed, in any encoding of this package, row by row as GGUF has it. Knows no file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weights_cache import codecs
from weights_cache.encodings import ENCODINGS


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

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> PackedRows:
        """The same with other rows, which `change` makes of these."""
        return PackedRows(self.encoding, change(self.rows))

    def to(self, device: torch.device) -> PackedRows:
        return PackedRows(self.encoding, self.rows.to(device))
