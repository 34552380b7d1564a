"""Reads weights files whose matrices are e4m3 codes with scales beside them: each matrix is one tensor. Imports torch.

A `Reader` over all files of a folder, since a matrix and its scale may lie in different ones.

Beside `X.weight`, F8_E4M3, stands `X.weight_scale_inv` (Mistral's and DeepSeek's; despite its name it multiplies),
`X.qscale_weight` (Mistral's own form) or `X.weight_scale` (compressed-tensors): one number, one for each row, or a grid
of blocks. The ranges of activations that stand there too are of no use for weights alone. Sources: transformers'
`integrations/finegrained_fp8.py`, vLLM's `models/pixtral.py`, compressed-tensors' `naive_quantized`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from weights_cache.codecs import fp8
from weights_cache.codecs.fp8 import FP8
from weights_cache.errors import CheckpointCorrupt
from weights_cache.packed import PackedWeight, plain

from .reader import Reader, TensorInfo, merged
from .safetensors import E4M3

ENCODING = "fp8"
SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")  # float32 has each of their numbers
OF_ACTIVATIONS = (".activation_scale", ".input_scale", ".qscale_act", ".k_scale", ".v_scale")


class Fp8Files:
    """`files`, opened, as one. A matrix without a scale, or with one that does not fit it, is CheckpointCorrupt when
    `tensors` is first asked for; a scale that is not finite and positive, when a weight is."""

    def __init__(self, files: Sequence[Reader]) -> None:
        self._of = merged(files)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The files' own names -> TensorInfo; of a matrix the bytes of its scales too, as they are kept."""
        beside = {name for name in self._of if name.endswith(OF_ACTIVATIONS)} | set(self._matrices.values())
        others = {name: file.tensors[name] for name, file in self._of.items() if name not in beside}
        return others | {name: self._matrix_info(name) for name in self._matrices}

    def weight(self, name: str) -> Tensor | PackedWeight:
        """As in the file, memory-mapped: of a matrix the codes, with a scale for each row or each block of its columns.
        Raises CheckpointCorrupt when one of the codes is no number."""
        stored = self._of[name].weight(name)
        if name not in self._matrices:
            return stored
        scales = self._scales[name]  # all of them are checked before one matrix is read
        codes = plain(stored).view(torch.uint8)
        if fp8.has_nan(codes):
            raise CheckpointCorrupt(self._info(name).file, f"tensor {name!r} has weights that are not a number")
        rows = codes.shape[0]
        block = fp8.block_of(rows, scales.shape[0])
        assert block is not None, name
        return FP8(codes, scales.repeat_interleave(block, 0)[:rows])

    def release(self, name: str) -> None:
        self._of[name].release(name)

    def _info(self, name: str) -> TensorInfo:
        return self._of[name].tensors[name]

    @cached_property
    def _matrices(self) -> Mapping[str, str]:
        """The names of matrices -> those of their scales."""
        return {name: self._scale_of(name) for name in self._of if self._info(name).dtype == E4M3}

    def _scale_of(self, name: str) -> str:
        """The scale of the tensor `name`, which must be a matrix that it fits."""
        info, module = self._info(name), name.removesuffix("weight")
        found = [module + scale for scale in SCALES if module != name and module + scale in self._of]
        if not found:
            raise CheckpointCorrupt(info.file, f"tensor {name!r} is {E4M3}, and no scale of it stands beside it")
        scale = self._info(found[0])
        shape = _grid(scale.shape)
        fits = len(info.shape) == 2 and shape is not None and all(map(fp8.block_of, info.shape, shape))
        if not fits or scale.dtype not in SCALE_DTYPES:
            reason = f"{scale.name!r}, {scale.dtype} {list(scale.shape)}, is no scale of {name!r}, {list(info.shape)}"
            raise CheckpointCorrupt(scale.file, reason)
        return found[0]

    def _matrix_info(self, name: str) -> TensorInfo:
        info, scale = self._info(name), self._info(self._matrices[name])
        rows, columns = info.shape
        _, groups = _grid(scale.shape) or (0, 0)
        return replace(info, nbytes=rows * (columns + 4 * groups), encoding=ENCODING)

    @cached_property
    def _scales(self) -> Mapping[str, Tensor]:
        """The scales of each matrix, float32 [rows or blocks of them, blocks of columns]."""
        return {name: self._checked_scale(scale) for name, scale in self._matrices.items()}

    def _checked_scale(self, name: str) -> Tensor:
        scale = plain(self._of[name].weight(name)).float()
        if not ((scale * fp8.LARGEST).isfinite() & (scale > 0)).all():  # nor may a weight be infinite
            raise CheckpointCorrupt(self._info(name).file, f"{name!r} has a scale that is not finite and positive")
        grid = _grid(tuple(scale.shape))
        assert grid is not None, name
        return scale.reshape(grid)


def _grid(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """A scale's shape as that of a matrix: one number, one for each row, or a grid. None for what is neither."""
    if len(shape) > 2:
        return None
    rows, columns = (*shape, 1, 1)[:2]
    return rows, columns
