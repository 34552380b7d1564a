"""Multiplying with any packed weight, and looking rows up in one: decoded as they are needed, on every device.

On a CPU the library in C decodes what it reads; the codecs do the rest, and are the definition.

The other kernels are compared with this one, and this one with the codecs. Letters: N rows of x, C columns, R rows of
the weight, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pixtral_cli.model.kernels import cpu_tiles, native_matrix
from pixtral_cli.model.kernels.cuda_packed import CudaPackedKernel
from weights_cache import codecs
from weights_cache.codecs.fp8 import FP8
from weights_cache.packed import PackedRows, PackedWeight, with_rows

TILE = 2**22  # weights decoded at a time, into the same memory: fresh memory is dear


class ReferenceKernel:
    """Rows are decoded tile by tile; of nf4, which has no rows, all at once."""

    def __init__(self, weight: Tensor | PackedWeight, device: torch.device) -> None:
        assert not isinstance(weight, Tensor)
        self.weight = weight.to(device)
        self._matrix = native_matrix.matrix_of(self.weight)

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        weight = self.weight
        if self._matrix is not None:
            return {1: partial(cpu_tiles.multiply, self._matrix)}
        if isinstance(weight, PackedRows):
            return {1: partial(_tiled, weight)}
        return {1: partial(_in_parts, weight) if isinstance(weight, FP8) else partial(_whole, weight)}

    @classmethod
    def takes(cls, weight: Tensor | PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        return not isinstance(weight, Tensor)


def _tiled(weight: PackedRows, x: Tensor) -> Tensor:
    """x [N, C] -> [N, R], a tile of rows of the weight after the other."""
    codec, (rows, columns) = codecs.get(weight.encoding), weight.shape
    y = x.new_empty(len(x), rows)
    tile = x.new_empty(max(1, min(rows, TILE // columns)), columns)
    for part, packed in zip(y.split(len(tile), 1), weight.rows.split(len(tile)), strict=True):
        part[:] = x @ codec.decode(packed, out=tile[: len(packed)]).T
    return y


def _in_parts(weight: FP8, x: Tensor) -> Tensor:
    """The same for scales that stand beside the rows."""
    rows, columns = weight.shape
    y, step = x.new_empty(len(x), rows), max(1, TILE // columns)
    for part, codes, scales in zip(y.split(step, 1), weight.codes.split(step), weight.scales.split(step), strict=True):
        part[:] = _whole(FP8(codes, scales), x)
    return y


def _whole(weight: PackedWeight, x: Tensor) -> Tensor:
    return x @ weight.decoded(x.dtype).T


class PackedEmbedding(nn.Module):
    """Rows of a packed table [V, C], decoded into `dtype` as they are looked up; on a card by its kernel, which has the
    table in its own order."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype = dtype
        self.kernel = CudaPackedKernel(weight, device) if CudaPackedKernel.takes(weight, dtype, device) else None
        self._rows = weight.to(device) if self.kernel is None else None
        self._matrix = native_matrix.matrix_of(self._rows) if self._rows is not None else None

    @property
    def weight(self) -> PackedWeight:
        found = self._rows if self.kernel is None else self.kernel.weight
        assert found is not None
        return found

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [N] -> [N, C]. The codec decodes a token that is there twice once; a card would wait to count
        them, and then its graph could not be captured."""
        if self.kernel is not None:
            return self.kernel.look_up(token_ids.long())
        if self._matrix is not None:
            return native_matrix.look_up(self._matrix, token_ids, self.dtype)
        assert self._rows is not None
        if token_ids.is_cuda:
            return self._decoded(self._rows, token_ids)
        unique, places = token_ids.unique(return_inverse=True)
        return self._decoded(self._rows, unique)[places]

    def _decoded(self, table: PackedWeight, ids: Tensor) -> Tensor:
        rows = with_rows(table, lambda part: part[ids])
        return rows if isinstance(rows, Tensor) else rows.decoded(self.dtype)

    def extra_repr(self) -> str:
        weight = self.kernel or self._rows
        assert weight is not None
        return f"{weight.encoding}, shape={weight.shape}"
