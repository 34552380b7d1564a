"""Codes in e4m3 and their float32 scales in, weights out, exactly; and weights in, such codes out. Knows no file.

A code is a float of 8 bits: a sign, 4 bits of an exponent with the bias 7, 3 bits of a fraction. It has no infinities;
0x7F and 0xFF are no number, and 448 is the largest (Micikevicius et al., FP8 Formats for Deep Learning, 2022; torch's
float8_e4m3fn). A weight is its code times a scale. Letters: R rows, C columns, G scales in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weights_cache.errors import NotEncodable

BLOCK = 128
"""Rows and columns that share a scale, where not a whole matrix or row does."""
LARGEST = 448.0
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
CHUNK = 2**19  # weights at a time: their floats stay in a core's cache


@dataclass(frozen=True, eq=False)
class FP8:
    """A matrix [R, C]: `codes` uint8 [R, C], and `scales` float32 [R, G], each of `block` columns of its row."""

    codes: Tensor
    scales: Tensor

    @property
    def encoding(self) -> str:
        return "fp8"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def block(self) -> int:
        """Columns that share a scale; the last block of a row may be cut off."""
        block = block_of(self.codes.shape[1], self.scales.shape[1])
        assert block is not None, f"{self.scales.shape[1]} scales for {self.codes.shape[1]} columns"
        return block

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    @torch.no_grad()
    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [R, C]: products in float32, rounded once in a narrower dtype."""
        (rows, columns), block = self.shape, self.block
        weights = torch.empty(rows, columns, dtype=dtype, device=self.codes.device)
        step = max(1, CHUNK // max(1, columns))
        for some, codes, scales in zip(*(each.split(step) for each in (weights, self.codes, self.scales)), strict=True):
            units = scales if block >= columns else scales.repeat_interleave(block, 1)[:, :columns]
            some.copy_(codes.view(torch.float8_e4m3fn).float().mul_(units))
        return weights

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> FP8:
        """The same with other rows, which `change` makes of those of each part."""
        return FP8(change(self.codes), change(self.scales))

    def to(self, device: torch.device) -> FP8:
        return FP8(self.codes.to(device), self.scales.to(device))


def block_of(size: int, scales: int) -> int | None:
    """Of so many rows or columns those that share one of `scales`: BLOCK if that is their number, else equal parts.
    None if there are none."""
    if scales > 1 and -(-size // BLOCK) == scales:
        return BLOCK
    return size // scales if scales and size % scales == 0 else None


def beside(rows: int, columns: int, scales: int = 1) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of what stands beside the codes of a matrix with so many scales in a row."""
    return {"scales": (torch.float32, (rows, scales))}


def scales_in(nbytes: int, rows: int, columns: int) -> int:
    """How many scales a row has in a matrix of `nbytes` bytes."""
    return (nbytes // rows - columns) // torch.float32.itemsize


def has_nan(codes: Tensor) -> bool:
    """Whether one of the codes, uint8, is no number. As fast as they can be read."""
    return codes.numel() > 0 and (int(codes.amax()) == 0xFF or int(codes.view(torch.int8).amax()) == 0x7F)


@torch.no_grad()
def encode(weight: Tensor) -> FP8:
    """`weight`, floats [R, C], with a scale for each row, by which its largest magnitude becomes LARGEST; codes are the
    nearest, and of two the even one. Raises NotEncodable for weights that are infinite or no number."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(weight), 1, device=weight.device)
    step = max(1, CHUNK // max(1, weight.shape[1]))
    for some, found, units in zip(*(each.split(step) for each in (weight, codes, scales)), strict=True):
        exact = some.float()
        largest = exact.abs().amax(1, keepdim=True)
        if not largest.isfinite().all():
            raise NotEncodable("fp8", "some of them are infinite or not a number")
        units.copy_((largest / LARGEST).clamp_(min=SMALLEST_SCALE))
        found.copy_((exact / units).to(torch.float8_e4m3fn).view(torch.uint8))
    return FP8(codes, scales)
