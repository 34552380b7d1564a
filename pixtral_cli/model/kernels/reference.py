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
from weights_cache.packed import PackedRows, PackedWeight

TILE = 2**22  # weights decoded at a time, into the same memory: fresh memory is dear


class ReferenceKernel:
    """Rows are decoded tile by tile; what is no `PackedRows` is decoded whole."""

    def __init__(self, weight: Tensor | PackedWeight, device: torch.device) -> None:
        assert not isinstance(weight, Tensor)
        self.weight = weight.to(device)
        self._matrix = native_matrix.matrix_of(self.weight)

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        weight = self.weight
        if self._matrix is not None:
            return {1: partial(cpu_tiles.multiply, self._matrix)}
        return {1: partial(_tiled, weight) if isinstance(weight, PackedRows) else partial(_whole, weight)}

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
        assert isinstance(self._rows, PackedRows), f"nothing looks rows up in {self.weight.encoding}"
        codec, rows = codecs.get(self._rows.encoding), self._rows.rows
        if rows.is_cuda:
            return codec.decode(rows[token_ids], self.dtype)
        unique, places = token_ids.unique(return_inverse=True)
        return codec.decode(rows[unique], self.dtype)[places]

    def extra_repr(self) -> str:
        weight = self.kernel or self._rows
        assert weight is not None
        return f"{weight.encoding}, shape={weight.shape}"
