"""Linear layers and embeddings whose weights stay packed in memory. Knows codecs, and no checkpoint.

This is the reference path: it decodes a tile of rows into ordinary numbers and multiplies, which every codec and
device can do. Letters: N tokens, C columns (inputs), R rows (outputs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weights_cache.codecs import Codec

TILE = 1024  # rows decoded at a time: fresh memory is dear, and a tile of this size is reused from the cache


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed by `codec`: uint8 [R, codec.row_bytes(C)]."""

    def __init__(self, codec: Codec, packed: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.codec = codec
        self.bias = bias
        self.register_buffer("packed", packed)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] -> [N, R]."""
        rows = self.packed.shape[0]
        y = x.new_empty(x.shape[0], rows)
        for start in range(0, rows, TILE):
            tile = self.codec.decode(self.packed[start : start + TILE], x.dtype)  # [tile, C]
            y[:, start : start + TILE] = x @ tile.T
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
