"""Multiplying with q4_k or q4_0 by torch's 4-bit kernel for the CPU. Knows no checkpoint.

Letters: N rows of x, C columns, R rows of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from weights_cache.codecs.int4 import GROUP, LAYOUTS, ROWS, Int4
from weights_cache.encodings import ENCODINGS
from weights_cache.packed import PackedRows, PackedWeight

DECODED_FROM = 48  # rows of x, for which decoding the weights once is quicker than the kernel for few rows
TILE = 16  # times 64 rows decoded at a time
AT_ONCE = 128  # columns of a tile decoded at a time: they stay in a core's cache


@cache
def supported() -> bool:
    """Whether torch has the kernel, and on this processor takes the codes in the order that we put them into."""
    convert = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    if convert is None or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return False
    layout = LAYOUTS["q4_0"]
    rows = torch.arange(ROWS * layout.encoding.block_bytes).mul(37).to(torch.uint8).view(ROWS, -1)
    nibbles = rows[:, layout.header :]
    expected = convert(torch.cat([nibbles & 0xF, nibbles >> 4], 1).int(), 1)
    return torch.equal(expected.flatten(), Int4.from_rows("q4_0", rows).codes.flatten())


class Int4Kernel:
    """W [R, C] in q4_k or q4_0 and whole 64 rows, x in bfloat16, on the CPU.

    The scales are rounded to bfloat16, once, for the kernel, which has them beside the exact ones: a bit a weight.
    """

    def __init__(self, weight: Tensor | PackedWeight, device: torch.device) -> None:
        assert isinstance(weight, PackedRows | Int4)
        self.weight = weight if isinstance(weight, Int4) else Int4.from_rows(weight.encoding, weight.rows)
        self._codes = self.weight.codes.view(self.weight.shape[0], -1)
        self._scales_and_zeros = self.weight.scales_and_zeros()

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {1: self._fused, DECODED_FROM: self._decoded}

    @classmethod
    def takes(cls, weight: Tensor | PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        if not isinstance(weight, PackedRows | Int4):
            return False
        ordered = ENCODINGS[weight.encoding].has_kernel_order(weight.shape[0])
        return ordered and dtype == torch.bfloat16 and device.type == "cpu" and supported()

    def _fused(self, x: Tensor) -> Tensor:
        narrow = x.to(torch.bfloat16).contiguous()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, self._codes, GROUP, self._scales_and_zeros).to(
            x.dtype
        )

    def _decoded(self, x: Tensor) -> Tensor:
        """Tile by tile of rows, each decoded once for all rows of x."""
        rows, columns = self.weight.shape
        y, narrow = x.new_empty(len(x), rows), x.to(torch.bfloat16)
        tile = narrow.new_empty(columns, min(rows, TILE * ROWS))
        products = y.split(tile.shape[1], 1)
        scales = self._scales_and_zeros.split(tile.shape[1], 1)
        for product, codes, units in zip(products, self.weight.codes.split(TILE), scales, strict=True):
            weights = tile if product.shape[1] == tile.shape[1] else tile.new_empty(columns, product.shape[1])
            _decode(codes, units, weights)
            product[:] = narrow @ weights
        return y


def _decode(codes: Tensor, scales_and_zeros: Tensor, weights: Tensor) -> None:
    """The weights of n times 64 rows, transposed: uint8 [n, C, 32] and bfloat16 [C/32, 64 n, 2] into [C, 64 n]."""
    scales, zeros = (part.contiguous() for part in scales_and_zeros.float().unbind(2))
    zeros.sub_(scales, alpha=8)
    half = codes.new_empty(len(codes), AT_ONCE, ROWS // 2)
    exact = torch.empty(AT_ONCE, weights.shape[1])
    groups = AT_ONCE // GROUP
    parts = zip(codes.split(AT_ONCE, 1), scales.split(groups), zeros.split(groups), weights.split(AT_ONCE), strict=True)
    for some, scale, zero, found in parts:
        part, buffer = exact[: len(found)], half[:, : len(found)]
        low, high = part.unflatten(1, (-1, 2, ROWS // 2)).permute(2, 1, 0, 3)  # [n, columns, 32]
        low.copy_(torch.bitwise_and(some, 0xF, out=buffer))
        high.copy_(torch.bitwise_right_shift(some, 4, out=buffer))
        grouped = part.unflatten(0, (-1, GROUP))
        torch.addcmul(zero.unsqueeze(1), grouped, scale.unsqueeze(1), out=grouped)
        found.copy_(part)
