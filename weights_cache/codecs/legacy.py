"""Blocks of 32 weights with a float16 scale of their own: q8_0, q4_0, q4_1, q5_0, q5_1. Knows layouts, not search.

A block begins with its scale d; q4_1 and q5_1 go on with a float16 offset m; q5_0 and q5_1 with 32 fifth bits, bit i
of the little-endian word being weight i's; then come the codes q: 32 signed bytes in q8_0, else 16 bytes, of which
byte i has weight i in its low and weight i + 16 in its high nibble.

    q8_0  d q            34 bytes, 8.5 bits a weight
    q4_0  d (q - 8)      18 bytes, 4.5
    q4_1  d q + m        20 bytes, 5
    q5_0  d (q - 16)     22 bytes, 5.5
    q5_1  d q + m        24 bytes, 6

Worked: in q4_0 the bytes `00 38` are d = 0.5, and a first code byte 0x2f gives weight 0 the code 15, which is
0.5 * (15 - 8) = 3.5, and weight 16 the code 2, which is 0.5 * (2 - 8) = -3.
Source: ggml's ggml-common.h (block_q4_0 and its neighbours) and the classes of gguf-py's quants.py.
"""

import torch
from torch import Tensor

from . import bits, fit
from .codec import BlockCodec, Codec
from .groups import Scratch

BLOCK = 32


def _nibbles(data: Tensor) -> Tensor:
    """The codes 0..15 of 16 bytes: uint8 [n, 32]."""
    return bits.fields(data, 4, BLOCK // 2).view(-1, BLOCK)


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    """The codes 0..31 of 4 bytes of fifth bits and 16 bytes of nibbles: uint8 [n, 32]."""
    fifth = bits.fields(high, 1, 1).view(-1, BLOCK)
    return _nibbles(low) | (fifth << 4)


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    codes = blocks[:, 2:].contiguous().view(torch.int8).float()
    return codes.mul_(bits.half(blocks, 0))


def _unpack_q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(bits.half(blocks, 0))


def _unpack_q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float().mul_(bits.half(blocks, 0)).add_(bits.half(blocks, 2))


def _unpack_q5_0(blocks: Tensor) -> Tensor:
    return _five_bits(blocks[:, 2:6], blocks[:, 6:]).float().sub_(16).mul_(bits.half(blocks, 0))


def _unpack_q5_1(blocks: Tensor) -> Tensor:
    codes = _five_bits(blocks[:, 4:8], blocks[:, 8:]).float()
    return codes.mul_(bits.half(blocks, 0)).add_(bits.half(blocks, 2))


def _pack_q8_0(weights: Tensor, scratch: Scratch) -> Tensor:
    scale, x = fit.signed_bytes(weights, scratch)  # 128 on top and the top bit turned: two's complement
    return torch.cat([bits.half_bytes(scale), x.rows(BLOCK, offset=128) ^ 128], dim=1)


def _pack_q4_0(weights: Tensor, scratch: Scratch) -> Tensor:
    scale, x = fit.signed_nibbles(weights, scratch)
    return torch.cat([bits.half_bytes(scale), bits.join(x.rows(BLOCK, offset=8), 4, BLOCK // 2)], dim=1)


CODECS: tuple[Codec, ...] = (
    BlockCodec("q8_0", BLOCK, 34, _unpack_q8_0, _pack_q8_0),
    BlockCodec("q4_0", BLOCK, 18, _unpack_q4_0, _pack_q4_0),
    BlockCodec("q4_1", BLOCK, 20, _unpack_q4_1),
    BlockCodec("q5_0", BLOCK, 22, _unpack_q5_0),
    BlockCodec("q5_1", BLOCK, 24, _unpack_q5_1),
)
