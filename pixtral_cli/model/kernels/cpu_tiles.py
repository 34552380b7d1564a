"""Many rows of x times a weight on a CPU: a tile of rows of the weight after the other is decoded and multiplied.

Where the processor multiplies pairs of bfloat16 the library in C does it in one pass, while a tile is in a core's cache
(native/tiles.c); else it decodes a tile for torch. Letters: N rows of x, C columns, R rows of the weight.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pixtral_cli.model.kernels import native, native_matrix
from pixtral_cli.model.kernels.native_matrix import Matrix

TILE = 2**21  # weights that are decoded at a time for torch


def multiply(matrix: Matrix, x: Tensor, out: Tensor | None = None) -> Tensor:
    """x [N, C] in bfloat16 or float32 -> x W^T [N, R].

    With x in bfloat16 the weights are rounded to it, products summed in float32, and the sums rounded once; a row of x
    gives the same bits whatever rows stand beside it. `out` may be some columns of a wider matrix.
    """
    out = x.new_empty(len(x), matrix.rows) if out is None else out
    assert x.shape[1] == matrix.columns and out.shape == (len(x), matrix.rows) and out.dtype == x.dtype
    if x.dtype != torch.bfloat16 or native.instructions() != "avx512bf16":
        return _by_torch(matrix, x, out)
    x = x if x.stride(1) == 1 else x.contiguous()
    assert out.stride(1) == 1
    _function()(matrix, x.data_ptr(), x.stride(0), len(x), out.data_ptr(), out.stride(0), native.threads())
    return out


def _by_torch(matrix: Matrix, x: Tensor, out: Tensor) -> Tensor:
    """In float32: processors without instructions for bfloat16 need no less time for that."""
    if x.dtype == matrix.kept[0].dtype == torch.float32:
        return out.copy_(x @ matrix.kept[0].T)
    x = x.float()
    rows = min(matrix.rows, max(1, TILE // matrix.columns))
    tile = _tile(rows * matrix.columns).view(rows, matrix.columns)
    for first in range(0, matrix.rows, rows):
        part = out[:, first : first + rows]
        part.copy_(x @ native_matrix.decode(matrix, first, tile[: part.shape[1]]).T)
    return out


_of_thread = threading.local()


def _tile(size: int) -> Tensor:
    """float32 [size] of the thread, used again: fresh memory is dear."""
    if not hasattr(_of_thread, "tile") or _of_thread.tile.numel() < size:
        _of_thread.tile = torch.empty(size)
    return _of_thread.tile[:size]


@cache
def _function() -> Any:
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    return native.function(
        "pixtral_multiply_tiles", ctypes.POINTER(Matrix), address, size, size, address, size, number, result=number
    )
