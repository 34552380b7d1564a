"""Multiplying a bfloat16 matrix with one vector or a few on a card, faster than cuBLAS does. Knows no checkpoint.

Letters: N rows of x, C columns, R rows of the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from pixtral_cli.model import triton_support
from weights_cache.packed import PackedWeight

FEW = 2
"""Rows of x up to which the kernel multiplies: more cuBLAS multiplies as fast, on its matrix units."""
SMALL = 2**20  # weights, of which a product takes as long as its launch
ALIGNED = 16  # columns: rows begin at multiples of 32 bytes, and are read 16 bytes at a time


class GemvKernel:
    """W [R, C] in bfloat16 on a card, in the order that everyone has it."""

    def __init__(self, weight: Tensor | PackedWeight, device: torch.device) -> None:
        assert isinstance(weight, Tensor)
        self.weight = weight.to(device).contiguous()

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {1: self._few, FEW + 1: self._many}

    @classmethod
    def takes(cls, weight: Tensor | PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        return (
            isinstance(weight, Tensor)
            and weight.dtype == dtype == torch.bfloat16
            and weight.numel() >= SMALL
            and weight.shape[1] % ALIGNED == 0
            and triton_support.available(device)
        )

    def _few(self, x: Tensor) -> Tensor:
        from pixtral_cli.model.kernels import gemv_triton

        return gemv_triton.products(x.contiguous(), self.weight)

    def _many(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
