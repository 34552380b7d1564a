"""Weights of a CPU as the library in C takes them (`struct matrix` in native.h), and their rows decoded by it.

Letters: N rows that are wanted, C columns, R rows of the weight.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pixtral_cli.model.kernels import native
from weights_cache.codecs.fp8 import FP8
from weights_cache.codecs.nf4 import NF4
from weights_cache.encodings import ENCODINGS
from weights_cache.packed import PackedRows, PackedWeight

NUMBERS = {name: ENCODINGS[name].ggml for name in ("float32", "bfloat16", "q4_0", "q8_0", "q4_k", "q5_k", "q6_k")}
NUMBERS |= {"nf4": 1000, "fp8": 1001}
"""`enum encoding`: the encodings that the library reads."""
WHOLE = 32  # columns: rows are multiples of it
SCALED = 64  # columns: blocks with a scale in fp8 are multiples of it, or whole rows


class Matrix(ctypes.Structure):
    """Where the bytes of a weight [R, C] are. It keeps them."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("magnitudes", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("encoding", ctypes.c_int32),
        ("block", ctypes.c_int32),
    )
    rows: int
    columns: int

    def __init__(self, encoding: str, rows: Tensor, columns: int, magnitudes: Tensor | None = None, block: int = 0):
        super().__init__(
            bytes=rows.data_ptr(),
            magnitudes=None if magnitudes is None else magnitudes.data_ptr(),
            rows=len(rows),
            columns=columns,
            row_bytes=rows.stride(0) * rows.element_size(),
            encoding=NUMBERS[encoding],
            block=block,
        )
        self.kept = rows, magnitudes


def matrix_of(weight: Tensor | PackedWeight) -> Matrix | None:
    """The weight for the library; None where it does not compute here, or does not read such a weight."""
    if not native.available() or weight.shape[1] % WHOLE:
        return None
    if isinstance(weight, Tensor):
        name = str(weight.dtype).removeprefix("torch.")
        return Matrix(name, weight.detach(), weight.shape[1]) if name in NUMBERS and _readable(weight) else None
    if isinstance(weight, PackedRows) and weight.encoding in NUMBERS and _readable(weight.rows):
        return Matrix(weight.encoding, weight.rows, weight.shape[1])
    if isinstance(weight, NF4) and _readable(weight.codes):
        return Matrix("nf4", weight.codes, weight.shape[1], weight.magnitudes().contiguous(), weight.block)
    if isinstance(weight, FP8) and _readable(weight.codes):
        block, columns = weight.block, weight.shape[1]
        if block == columns or block % SCALED == 0:
            return Matrix("fp8", weight.codes, columns, weight.scales.contiguous(), block)
    return None


def _readable(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.stride(1) == 1


def look_up(matrix: Matrix, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows `ids`, integers [N]: [N, C] in float32, exactly, or in bfloat16, rounded once. Raises IndexError."""
    out, ids = torch.empty(len(ids), matrix.columns, dtype=dtype), ids.long().contiguous()
    if not _decode(matrix, ids.data_ptr(), 0, out):
        raise IndexError(f"there are rows 0 to {matrix.rows - 1}, not {ids.tolist()}")
    return out


def decode(matrix: Matrix, first: int, out: Tensor) -> Tensor:
    """The rows from `first` on, as many as `out` [N, C] takes, which is contiguous, in its dtype: as `look_up`."""
    assert out.is_contiguous() and out.shape[1] == matrix.columns and 0 <= first <= matrix.rows - len(out)
    _decode(matrix, None, first, out)
    return out


def _decode(matrix: Matrix, ids: int | None, first: int, out: Tensor) -> bool:
    assert out.dtype in (torch.float32, torch.bfloat16), out.dtype
    exact = out.dtype == torch.float32
    return bool(_function()(matrix, ids, first, len(out), out.data_ptr(), exact, native.threads()))


@cache
def _function() -> Any:
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    kinds = (ctypes.POINTER(Matrix), address, size, size, address, number, number)
    return native.function("pixtral_decode", *kinds, result=number)
