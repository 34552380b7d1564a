"""A config in, a serialized model of random weights out, made tensor by tensor: the bytes are random, and nothing is
encoded.

Codes take every value; scales and floats are such that weights have a deviation of about STD, as in a trained model, so
that no number on the way overflows or becomes subnormal. The same names and shapes give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from pixtral_cli.model import load
from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.kernels import Weight
from pixtral_cli.model.placement import place
from pixtral_cli.source import Source
from weights_cache.checkpoint import Checkpoint
from weights_cache.codecs.fp8 import FP8
from weights_cache.codecs.nf4 import NF4
from weights_cache.encodings import ENCODINGS
from weights_cache.formats.reader import TensorInfo
from weights_cache.names import HEAD
from weights_cache.packed import PackedRows
from weights_cache.progress import Progress

STD = 0.02
SCALES: Mapping[str, Mapping[int, float]] = {
    "q4_0": {0: STD / 4.6},
    "q8_0": {0: STD / 74},
    "q4_k": {0: STD / 300, 2: STD / 40},
    "q5_k": {0: STD / 600, 2: STD / 40},
    "q6_k": {208: STD / (74 * 18)},
}
"""Where a block's float16 scales are, and what they are on average: STD over the spread of what they multiply."""
FP8_SPREAD = 107.0
"""Of e4m3 codes."""
BITS = {"bfloat16": (torch.int16, -0x7F01, 0x3C00), "float32": (torch.int32, -0x7F000001, 0x3C000000)}
"""Of a random integer, what becomes a float's sign and fraction and the last bit of its exponent (a mask), and the
other bits of the exponent: magnitudes from 2^-7 to 2^-5."""


class RandomCheckpoint(Checkpoint):
    """A checkpoint that no file holds, with the built-in model's tokenizer."""

    def __init__(self, config: Mapping[str, Any], sizes: ModelConfig, encoding: str) -> None:
        from pixtral_cli.tiny import FOLDER

        super().__init__(FOLDER, dict(config))
        shapes = {name: tuple(parameter.shape) for name, parameter in load.empty(sizes).named_parameters()}
        if sizes.text.tied_embeddings:
            del shapes[HEAD]
        plain = {name: _info(name, shape, "bfloat16") for name, shape in shapes.items()}
        self.placement = place(plain, ENCODINGS[encoding])
        self.random_tensors = {
            name: _info(name, shape, self.placement.encodings[name]) for name, shape in shapes.items()
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.random_tensors

    def weight(self, name: str) -> Weight:
        return random_weight(self.tensors[name])

    def release(self, name: str) -> None:
        """Nothing is mapped."""


def _info(name: str, shape: tuple[int, ...], encoding: str) -> TensorInfo:
    kind = ENCODINGS[encoding]
    return TensorInfo(name, kind.word, shape, kind.nbytes(shape), Path("random"), encoding)


def random_weight(info: TensorInfo) -> Weight:
    """The weight of that name, shape and encoding: norms of 1, biases of 0, else random."""
    if len(info.shape) == 1:
        return torch.full(info.shape, float(not info.name.endswith("bias")), dtype=load.DTYPES[info.encoding])
    chance = torch.Generator().manual_seed(crc32(info.name.encode()))
    if info.encoding in BITS:
        return _floats(info, chance)
    rows, columns = info.shape
    if info.encoding == "nf4":
        codes = _integers(chance, torch.uint8, rows, columns // 2)
        return NF4(codes, _units(chance, rows * columns // 64, 2 * STD))
    if info.encoding == "fp8":
        codes = _integers(chance, torch.uint8, rows, columns)
        codes -= (codes & 127).eq(127).byte()  # those are no numbers
        return FP8(codes, _units(chance, rows, STD / FP8_SPREAD)[:, None])
    encoding = ENCODINGS[info.encoding]
    blocks = _integers(chance, torch.uint8, rows, columns // encoding.block, encoding.block_bytes)
    for at, middle in SCALES[info.encoding].items():
        units = _units(chance, prod(blocks.shape[:2]), middle).half().view(torch.uint8)
        blocks[..., at : at + 2] = units.view(*blocks.shape[:2], 2)
    return PackedRows(info.encoding, blocks.flatten(1))


def _floats(info: TensorInfo, chance: torch.Generator) -> Tensor:
    kind, kept, added = BITS[info.encoding]
    numbers = _integers(chance, kind, *info.shape).bitwise_and_(kept).bitwise_or_(added)
    return numbers.view(load.DTYPES[info.encoding])


def _integers(chance: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bits; torch makes eight bytes as fast as one."""
    nbytes = prod(shape) * dtype.itemsize
    words = torch.empty(-(-nbytes // 8), dtype=torch.int64).random_(-(2**63), None, generator=chance)
    return words.view(torch.uint8)[:nbytes].view(dtype).view(shape)


def _units(chance: torch.Generator, count: int, middle: float) -> Tensor:
    """Scales around `middle`."""
    return torch.rand(count, generator=chance).add_(0.5).mul_(middle)


def write(config: Mapping[str, Any], encoding: str, path: Path, progress: Progress | None = None) -> None:
    """Write a serialized model of that config, its text part in `encoding`.

    `encoding` is one of shapes.ENCODINGS. Raises weights_cache.errors.DiskFull and WriteFailed.
    """
    from pixtral_cli.model.families import read_config

    opened = RandomCheckpoint(config, read_config(config), encoding)
    source = Source("random", opened)
    source.save(path, opened.placement, opened.weight, progress)
