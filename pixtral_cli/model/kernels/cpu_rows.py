"""Multiplying a few vectors with a matrix on a CPU, straight from the bytes that a file has, by the library in C.

Nothing is copied or put into another order, so a matrix may lie in a mapped file. x in bfloat16 is multiplied exactly
and summed in float32, x in float32 with the decoded weights. A row of y has the same bits whatever rows of x stand
beside its own, and however many threads compute. Letters: N rows of x, C columns, R rows of a weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from pixtral_cli.model.kernels import native
from weights_cache.codecs.nf4 import NF4
from weights_cache.encodings import ENCODINGS
from weights_cache.packed import PackedRows, PackedWeight

ENCODED = ("q4_0", "q8_0", "q4_k", "q5_k", "q6_k")
FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
NF4_NUMBER = 1000  # of `enum encoding` in native.h, which has ggml's numbers for the others
NF4_COLUMNS = 32  # that are read together
MANY = 17
"""Rows of x from which on torch multiplies faster with a matrix of floats."""
AT_ONCE = 64
"""Rows of x that are put into order at a time: they stay in a core's cache."""


class Matrix(ctypes.Structure):
    """`struct matrix` of native/matvec.h."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("magnitudes", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("encoding", ctypes.c_int32),
        ("block", ctypes.c_int32),
    )


class CpuRowsKernel:
    """W [R, C] in one of ENCODED, in nf4, bfloat16 or float32, on a CPU; x in bfloat16 or float32."""

    def __init__(self, weight: Tensor | PackedWeight, device: torch.device) -> None:
        self.weight: Tensor | PackedWeight = weight if isinstance(weight, Tensor) else weight.in_rows()
        self.matrix, self._read = _matrix(self.weight)
        self._multiply = Product([self])

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        if isinstance(self.weight, Tensor):
            return {1: self._multiply, MANY: partial(_by_torch, self.weight)}
        return {1: self._multiply}

    @classmethod
    def takes(cls, weight: Tensor | PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        if device.type != "cpu" or dtype not in FLOATS or not native.available():
            return False
        if isinstance(weight, Tensor):
            return weight.dtype == dtype and weight.ndim == 2
        return weight.shape[1] % NF4_COLUMNS == 0 if isinstance(weight, NF4) else weight.encoding in ENCODED


class Product:
    """x [N, C] -> x W^T [N, R] of several matrices, one beside the other, in one call of the library."""

    def __init__(self, kernels: Sequence[CpuRowsKernel]) -> None:
        self.rows = sum(kernel.matrix.rows for kernel in kernels)
        self._columns = kernels[0].matrix.columns
        self._matrices = (Matrix * len(kernels))(*(kernel.matrix for kernel in kernels))
        self._read = [kernel._read for kernel in kernels]  # what the pointers point to
        self._call = partial(_function(), ctypes.addressof(self._matrices), len(kernels))

    def __call__(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self._columns, f"rows of {x.shape[1]} numbers times columns of {self._columns}"
        if len(x) > AT_ONCE:
            return torch.cat([self(part) for part in x.split(AT_ONCE)])
        x = x.contiguous()
        y = x.new_empty(len(x), self.rows)
        number = 30 if x.dtype == torch.bfloat16 else 0
        failed = self._call(x.data_ptr(), number, len(x), y.data_ptr(), native.threads())
        if failed:
            raise MemoryError(f"no memory for {len(x)} rows of {x.shape[1]} numbers")
        return y


def _matrix(weight: Tensor | PackedWeight) -> tuple[Matrix, list[Tensor]]:
    """The weight as the library takes it, and the tensors that it then reads."""
    rows, columns = weight.shape
    if isinstance(weight, NF4):
        codes, magnitudes = weight.codes.contiguous(), weight.magnitudes().contiguous()
        pointers = codes.data_ptr(), magnitudes.data_ptr()
        return Matrix(*pointers, rows, columns, columns // 2, NF4_NUMBER, weight.block), [codes, magnitudes]
    assert isinstance(weight, Tensor | PackedRows), f"no rows of {weight.encoding}"
    encoding = ENCODINGS[FLOATS[weight.dtype] if isinstance(weight, Tensor) else weight.encoding]
    data = (weight if isinstance(weight, Tensor) else weight.rows).contiguous()
    return Matrix(data.data_ptr(), None, rows, columns, encoding.row_bytes(columns), encoding.ggml, 0), [data]


def _by_torch(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight)


@cache
def _function() -> Callable[..., int]:
    arguments = (
        ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int,
    )  # fmt: skip
    return native.function("pixtral_multiply", *arguments, result=ctypes.c_int)
