"""Linear layers in q4_k or q4_0 on torch's 4-bit kernel for the CPU: weights in its order in, products out.

Knows no checkpoint. Letters: N tokens, C columns (inputs), R rows (outputs).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from weights_cache.codecs import Codec, get
from weights_cache.codecs.int4 import GROUP, LAYOUTS, ROWS, Int4, fits

FUSED_TOKENS = 48  # tokens from which on decoding the weights once is quicker than the kernel for few tokens
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


def takes(encoding: str, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel can multiply with such a matrix: it computes in bfloat16, on the CPU."""
    return device.type == "cpu" and dtype == torch.bfloat16 and fits(encoding, rows) and supported()


class Int4Linear(nn.Module):
    """y = x W^T + b with W [R, C] in q4_k or q4_0, computed in bfloat16.

    The scales are rounded to bfloat16, once, for the kernel, which has them beside the exact ones: a bit a weight.
    """

    def __init__(self, weight: Int4, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.register_buffer("scales_and_zeros", weight.scales_and_zeros())

    @property
    def codec(self) -> Codec:
        return get(self.weight.encoding)

    @property
    def packed(self) -> Tensor:
        """The exact bytes as the codec has them, made for this call: uint8 [R, bytes of a row]."""
        return self.weight.rows()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] -> [N, R]."""
        product = self._product if len(x) < FUSED_TOKENS else self._decoded_product
        y = product(x.to(torch.bfloat16).contiguous()).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        codes = self.weight.codes.view(self.weight.shape[0], -1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP, self.scales_and_zeros)

    def _decoded_product(self, x: Tensor) -> Tensor:
        """Tile by tile of rows, each decoded once for all tokens."""
        rows, columns = self.weight.shape
        y = x.new_empty(len(x), rows)
        tile = x.new_empty(columns, min(rows, TILE * ROWS))
        products = y.split(tile.shape[1], 1)
        scales = self.scales_and_zeros.split(tile.shape[1], 1)
        for product, codes, units in zip(products, self.weight.codes.split(TILE), scales, strict=True):
            weights = tile if product.shape[1] == tile.shape[1] else tile.new_empty(columns, product.shape[1])
            _decode(codes, units, weights)
            product[:] = x @ weights
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.encoding}, rows={self.weight.shape[0]}, columns={self.weight.shape[1]}"


def _decode(codes: Tensor, scales_and_zeros: Tensor, weights: Tensor) -> None:
    """The weights of n times 64 rows, upright: uint8 [n, C, 32] and bfloat16 [C/32, 64 n, 2] into [C, 64 n]."""
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
