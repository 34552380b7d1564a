"""Random weights in every encoding that the library in C reads: any bytes, with scales that are told apart from codes.

Letters: R rows, C columns.
"""

import math

import torch

from weights_cache.codecs.fp8 import FP8
from weights_cache.codecs.nf4 import NF4
from weights_cache.encodings import ENCODINGS
from weights_cache.packed import PackedRows

SCALES = {"q4_0": [0], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "q8_0": [0]}
"""Where the float16 numbers of a block are."""
PACKED = (*SCALES, "nf4", "fp8")
BLOCKS = {name: ENCODINGS[name].block for name in SCALES} | {"nf4": 32, "fp8": 32}
"""The narrowest rows."""


def weight(encoding, rows, columns, *, at=0, scale=None, seed=0):
    """[R, C], whose bytes begin `at` bytes after a line of memory. Scales are 2^-14 to 2^-2, or all of them `scale`."""
    generator = torch.Generator().manual_seed(seed)
    if encoding in ("bfloat16", "float32"):
        return torch.randn(rows, columns, generator=generator).to(getattr(torch, encoding))
    if encoding == "nf4":
        return nf4(rows, columns, generator, scale)
    if encoding == "fp8":
        return fp8(rows, columns, generator, scale, at=at)
    kind = ENCODINGS[encoding]
    blocks = torch.randint(
        0, 256, (rows, columns // kind.block, kind.block_bytes), dtype=torch.uint8, generator=generator
    )
    for place in SCALES[encoding]:
        drawn = 2.0 ** -torch.randint(2, 15, blocks.shape[:2], generator=generator) * 1.25
        chosen = (drawn if scale is None else torch.full_like(drawn, scale)).half()
        blocks[..., place : place + 2] = chosen[..., None].view(torch.uint8)
    return PackedRows(encoding, moved(blocks.flatten(1), at))


def nf4(rows, columns, generator, scale=None, block=64):
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    magnitudes = torch.rand(math.ceil(rows * columns / block), generator=generator) + 0.1
    return NF4(codes, magnitudes if scale is None else torch.full_like(magnitudes, scale))


def fp8(rows, columns, generator, scale=None, scales=1, at=0):
    """Every code but those that are no number; scales as `weight` has them."""
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    codes -= (codes & 127).eq(127).byte()
    drawn = 2.0 ** -torch.randint(2, 15, (rows, scales), generator=generator) * 1.25
    return FP8(moved(codes, at), drawn if scale is None else torch.full_like(drawn, scale))


def moved(rows, at):
    """The same bytes, `at` bytes after a line."""
    memory = torch.empty(rows.numel() + at + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + at
    memory[start : start + rows.numel()] = rows.flatten()
    return memory[start : start + rows.numel()].view(rows.shape)
