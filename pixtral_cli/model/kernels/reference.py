"""Linear layers and embeddings whose weights stay packed in memory. Knows codecs, and no checkpoint.

This is the reference path: it decodes a tile of rows into ordinary numbers and multiplies, which every codec and
device can do. What a kernel does instead, where there is one, is in int4.py and nf4.py. Letters: N tokens,
C columns (inputs), R rows (outputs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weights_cache.codecs import Codec

TILE = 2**22  # weights decoded at a time, into the same memory: fresh memory is dear


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed by `codec`: uint8 [R, codec.row_bytes(C)]."""

    def __init__(self, codec: Codec, packed: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.codec = codec
        self.bias = bias
        self.register_buffer("packed", packed)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] -> [N, R]."""
        rows, columns = self.packed.shape[0], x.shape[1]
        y = x.new_empty(x.shape[0], rows)
        tile = x.new_empty(max(1, min(rows, TILE // columns)), columns)
        for part, packed in zip(y.split(len(tile), 1), self.packed.split(len(tile)), strict=True):
            part[:] = x @ self.codec.decode(packed, out=tile[: len(packed)]).T
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.codec.name}, rows={self.packed.shape[0]}"


class PackedEmbedding(nn.Module):
    """Rows of a packed table [V, codec.row_bytes(C)], decoded into `dtype` as they are looked up."""

    def __init__(self, codec: Codec, packed: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.codec = codec
        self.dtype = dtype
        self.register_buffer("packed", packed)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [N] -> [N, C]."""
        unique, places = token_ids.unique(return_inverse=True)
        return self.codec.decode(self.packed[unique], self.dtype)[places]

    def extra_repr(self) -> str:
        return f"{self.codec.name}, rows={self.packed.shape[0]}"
