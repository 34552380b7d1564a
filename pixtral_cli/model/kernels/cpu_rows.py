"""Multiplying with a matrix on a CPU, by the library in C: a few vectors straight from the bytes that a file has.

Nothing is copied or put into another order, so a matrix may lie in a mapped file. x in bfloat16 is multiplied exactly
and summed in float32, x in float32 with the decoded weights. Below MANY rows a row of y has the same bits whatever rows
of x stand beside its own, and however many threads compute. Letters: N rows of x, C columns, R rows of a weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from pixtral_cli.model.kernels import cpu_tiles, native
from pixtral_cli.model.kernels.native_matrix import NUMBERS, Matrix, matrix_of
from weights_cache.packed import PackedWeight

NARROW = {torch.float32: NUMBERS["float32"], torch.bfloat16: NUMBERS["bfloat16"]}
MANY = 17
"""Rows of x from which on decoding the weights once for all of them is faster."""
MOST = 4  # matrices in a call


class CpuRowsKernel:
    """W [R, C] in an encoding that the library reads, on a CPU; x in bfloat16 or float32."""

    def __init__(self, weight: Tensor | PackedWeight, device: torch.device) -> None:
        matrix = matrix_of(weight)
        assert matrix is not None, native.why_not()
        self.weight = weight
        self.matrix = matrix

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        many = partial(_by_torch, self.weight) if isinstance(self.weight, Tensor) else partial(_tiles, self.matrix)
        return {1: Product([self.matrix]), MANY: many}

    @classmethod
    def takes(cls, weight: Tensor | PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        if device.type != "cpu" or dtype not in NARROW or (isinstance(weight, Tensor) and weight.dtype != dtype):
            return False
        return matrix_of(weight) is not None


class Product:
    """x [N, C] -> x W^T [N, R] of up to MOST matrices, one beside the other, in one call of the library.

    The matrices may be in different encodings; they have the same columns.
    """

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        assert 0 < len(matrices) <= MOST and len({matrix.columns for matrix in matrices}) == 1
        self.rows = sum(matrix.rows for matrix in matrices)
        self._columns = matrices[0].columns
        self._kept = matrices  # with what they point to
        self._matrices = (Matrix * len(matrices))(*matrices)
        self._multiply = partial(_function(), ctypes.addressof(self._matrices), len(matrices))

    def __call__(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self._columns, f"rows of {x.shape[1]} numbers, times matrices of {self._columns} columns"
        x = x.contiguous()
        y = x.new_empty(len(x), self.rows)
        failed = self._multiply(x.data_ptr(), NARROW[x.dtype], len(x), y.data_ptr(), native.threads())
        assert not failed, f"the library does not multiply with encoding {[each.encoding for each in self._matrices]}"
        return y


def _tiles(matrix: Matrix, x: Tensor) -> Tensor:
    return cpu_tiles.multiply(matrix, x)


def _by_torch(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight)


@cache
def _function() -> Callable[..., int]:
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    arguments = address, number, address, number, size, address, number
    return native.function("pixtral_multiply", *arguments, result=number)
