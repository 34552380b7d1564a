"""A bfloat16 matrix times one vector or a few, in Triton: it reads the weight once, as fast as memory gives it.

Import it after `triton_support.available`. Letters: N rows of x, C columns, R rows of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixtral_cli.model.triton_support import chains


class Tile(NamedTuple):
    """What a program holds of the weight at a time. A number of `stages` above 1 is copied ahead into shared memory;
    with 1 the next tile is loaded into registers while one is multiplied."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


def tile_of(height: int, width: int) -> Tile:
    """What was fastest on an H200 for the matrices of a 12 B model, by their shape [R, C]."""
    if width >= 8192:
        return Tile(8, 512, 8)
    return Tile(4, 1024, 4) if height >= 16384 else Tile(2, 1024, 4)


@triton.jit
def _products(
    x, weight, y, height, width,
    n: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, stages: tl.constexpr, chained: tl.constexpr,
):  # fmt: skip
    """y [N, R] = x [N, C] W^T: a program goes through all columns of `rows` rows, and adds up at their end."""
    row, column = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, columns)
    tile = weight + tl.minimum(row, height - 1).to(tl.int64)[:, None] * width + column[None]
    sums = (tl.zeros((rows, columns), tl.float32),) * n
    if chained:
        tl.extra.cuda.gdc_launch_dependents()
    if stages == 1:
        here = tl.load(tile, mask=(column < width)[None], other=0, eviction_policy="evict_first")
        if chained:  # the first tile is on its way while the kernel before ends
            tl.extra.cuda.gdc_wait()
        for start in range(0, width, columns):
            tile += columns
            after = tl.load(tile, mask=(column < width - start - columns)[None], other=0, eviction_policy="evict_first")
            sums = _added(sums, here, x + start + column, column < width - start, width, n)
            here = after
    else:
        if chained:
            tl.extra.cuda.gdc_wait()
        for start in tl.range(0, width, columns, num_stages=stages):
            inside = column < width - start
            here = tl.load(tile + start, mask=inside[None], other=0, eviction_policy="evict_first")
            sums = _added(sums, here, x + start + column, inside, width, n)
    for index in tl.static_range(n):
        tl.store(y + index * height + row, tl.sum(sums[index], 1), mask=row < height)


@triton.jit
def _added(sums, here, x, inside, width, n: tl.constexpr):
    """The sums, and the products of a tile with each vector."""
    exact = here.to(tl.float32)
    found = sums[:0]
    for index in tl.static_range(n):
        part = tl.load(x + index * width, mask=inside, other=0, eviction_policy="evict_last").to(tl.float32)
        found = found + (sums[index] + exact * part[None],)  # noqa: RUF005  Triton's tuples
    return found


@triton.jit
def _dots(
    x, weight, y, n, height, width,
    rows: tl.constexpr, columns: tl.constexpr, stages: tl.constexpr, chained: tl.constexpr,
):  # fmt: skip
    """The same by matrix units, which take 16 vectors at the least; C is whole tiles."""
    row, column, token = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, columns), tl.arange(0, 16)
    tile = weight + tl.minimum(row, height - 1).to(tl.int64)[:, None] * width + column[None]
    part = x + tl.minimum(token, n - 1)[None] * width + column[:, None]
    if chained:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((rows, 16), tl.float32)
    for start in tl.range(0, width, columns, num_stages=stages):
        here = tl.load(tile + start, eviction_policy="evict_first")
        sums = tl.dot(here, tl.load(part + start, eviction_policy="evict_last"), sums, input_precision="ieee")
    place = y + token[None] * height + row[:, None]
    tl.store(place, sums, mask=(token < n)[None] & (row < height)[:, None])


def dots(x: Tensor, weight: Tensor, tile: Tile, chained: bool | None = None) -> Tensor:
    """x [N, C] W^T -> [N, R], of contiguous matrices, for up to 16 rows of x."""
    (n, width), height = x.shape, weight.shape[0]
    y = torch.empty(n, height, dtype=x.dtype, device=x.device)
    chained = chains(x.device) if chained is None else chained
    _dots[(triton.cdiv(height, tile.rows),)](
        x, weight, y, n, height, width, tile.rows, tile.columns, tile.stages, chained,
        num_warps=tile.warps, launch_pdl=chained,
    )  # fmt: skip
    return y


def products(x: Tensor, weight: Tensor, tile: Tile, chained: bool | None = None) -> Tensor:
    """x [N, C] W^T -> [N, R], of contiguous matrices; each N is compiled for itself."""
    (n, width), height = x.shape, weight.shape[0]
    y = torch.empty(n, height, dtype=x.dtype, device=x.device)
    chained = chains(x.device) if chained is None else chained
    _products[(triton.cdiv(height, tile.rows),)](
        x, weight, y, height, width, n, tile.rows, tile.columns, tile.stages, chained,
        num_warps=tile.warps, launch_pdl=chained,
    )  # fmt: skip
    return y
