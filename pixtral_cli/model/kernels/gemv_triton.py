"""A bfloat16 matrix times one vector or a few, in Triton: it reads the weight once, as fast as memory gives it.

Import it after `triton_support.available`. Letters: N rows of x, C columns, R rows of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixtral_cli.model.triton_chaining import begin
from pixtral_cli.model.triton_support import chains


class Tile(NamedTuple):
    """What a program holds of the weight at a time; with n stages, n - 1 later tiles are on their way."""

    rows: int
    columns: int
    warps: int
    stages: int


def tile_of(n: int, width: int) -> Tile:
    """The quickest on an H100 for n rows of x and a weight of `width` columns, of those in benchmarks/gpu_ops.py."""
    if n > 1:
        return Tile(2, 512, 4, 3)
    return Tile(1, 2048, 4, 5) if width >= 8192 else Tile(1, 1024, 2, 5)


@triton.jit
def _products(
    x, weight, y, height, width,
    n: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, stages: tl.constexpr, chained: tl.constexpr,
):  # fmt: skip
    """y [N, R] = x [N, C] W^T: a program goes through all columns of `rows` rows, and adds up at their end."""
    begin(chained)
    row, column = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, columns)
    tile = weight + tl.minimum(row, height - 1).to(tl.int64)[:, None] * width + column[None]
    sums = (tl.zeros((rows, columns), tl.float32),) * n
    for start in tl.range(0, width, columns, num_stages=stages):
        inside = column < width - start
        here = tl.load(tile + start, mask=inside[None], other=0, eviction_policy="evict_first").to(tl.float32)
        more = sums[:0]
        for index in tl.static_range(n):
            part = tl.load(x + index * width + start + column, mask=inside, other=0, eviction_policy="evict_last")
            more = more + (sums[index] + here * part.to(tl.float32)[None],)  # noqa: RUF005  Triton's tuples
        sums = more
    for index in tl.static_range(n):
        tl.store(y + index * height + row, tl.sum(sums[index], 1), mask=row < height)


def products(x: Tensor, weight: Tensor, tile: Tile | None = None) -> Tensor:
    """x [N, C] W^T -> [N, R], of contiguous matrices; each N is compiled for itself."""
    (n, width), height = x.shape, weight.shape[0]
    tile = tile or tile_of(n, width)
    y, chained = torch.empty(n, height, dtype=x.dtype, device=x.device), chains(x.device)
    _products[(triton.cdiv(height, tile.rows),)](
        x, weight, y, height, width, n, tile.rows, tile.columns, tile.stages, chained,
        num_warps=tile.warps, launch_pdl=chained,
    )  # fmt: skip
    return y
