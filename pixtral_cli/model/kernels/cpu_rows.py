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
        self._transposed = weight.detach().T if isinstance(weight, Tensor) else None  # for torch's product

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        together = Together([self])
        return {1: together.few, MANY: together.many}

    @classmethod
    def takes(cls, weight: Tensor | PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        if device.type != "cpu" or dtype not in NARROW or (isinstance(weight, Tensor) and weight.dtype != dtype):
            return False
        return matrix_of(weight) is not None

    def many(self, x: Tensor, out: Tensor) -> None:
        """x [N, C] -> x W^T, into `out` [N, R], which may be some columns of a wider matrix."""
        if self._transposed is not None:
            torch.mm(x, self._transposed, out=out)
        else:
            cpu_tiles.multiply(self.matrix, x, out)


class Together:
    """x [N, C] -> x W^T [N, R] of up to MOST matrices of C columns, one beside the other, R the rows of all.

    They may be in different encodings, and stay where they are.
    """

    def __init__(self, kernels: Sequence[CpuRowsKernel]) -> None:
        matrices = [kernel.matrix for kernel in kernels]
        assert 0 < len(matrices) <= MOST and len({matrix.columns for matrix in matrices}) == 1
        self._kernels = kernels  # which keep what the pointers point to
        self._rows = [matrix.rows for matrix in matrices]
        self._columns = matrices[0].columns
        self._matrices = (Matrix * len(matrices))(*matrices)
        self._multiply = partial(_function(), ctypes.addressof(self._matrices), len(matrices))

    def few(self, x: Tensor) -> Tensor:
        """In one call of the library."""
        x, y = x.contiguous(), self._room(x)
        failed = self._multiply(x.data_ptr(), NARROW[x.dtype], len(x), y.data_ptr(), native.threads())
        assert not failed, f"the library reads none of {[each.encoding for each in self._matrices]}"
        return y

    def many(self, x: Tensor) -> Tensor:
        y = self._room(x)
        for kernel, part in zip(self._kernels, y.split(self._rows, 1), strict=True):
            kernel.many(x, part)
        return y

    def _room(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self._columns, f"rows of {x.shape[1]} numbers, times matrices of {self._columns} columns"
        return x.new_empty(len(x), sum(self._rows))


@cache
def _function() -> Callable[..., int]:
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    arguments = address, number, address, number, size, address, number
    return native.function("pixtral_multiply", *arguments, result=number)
