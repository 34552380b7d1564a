"""The smallest kernel, to see whether Triton works on a card. Only `triton_support` imports it, and late."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 32


@triton.jit
def _add_one(x, y, size: tl.constexpr):
    place = tl.arange(0, size)
    tl.store(y + place, tl.load(x + place).to(tl.float32) + 1)


def counted(device: torch.device) -> Tensor:
    """1, 2, 3 … SIZE in bfloat16, by a kernel that adds one."""
    before = torch.arange(SIZE, device=device).bfloat16()
    after = torch.zeros_like(before)
    _add_one[(1,)](before, after, SIZE)
    return after
