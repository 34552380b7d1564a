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

from weights_cache.encodings import ENCODINGS

from . import bits, search
from .bits import Scratch
from .codec import BlockCodec, Codec

BLOCK = 32
RUN = 16  # bytes of nibbles


def _scale(blocks: Tensor) -> tuple[Tensor, None]:
    return bits.half(blocks, 0), None


def _scale_and_offset(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale, offset = bits.halves(blocks, 0, 2)
    return scale, -offset


def _five_bits(high: Tensor, low: Tensor, codes: Tensor, scratch: Scratch) -> Tensor:
    """The codes 0..31 of 4 bytes of fifth bits and 16 bytes of nibbles."""
    bits.nibbles(low, RUN, codes, scratch)
    return codes.add_(bits.fields(high, 1, 1).view(-1, BLOCK), alpha=16)


def _q8_0_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    codes.copy_(blocks[:, 2:].view(torch.int8))


def _q4_0_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    together = scratch.array("together", len(blocks), RUN, dtype=torch.uint8)
    bits.nibbles(together.copy_(blocks[:, 2:]), RUN, codes, scratch)
    codes.sub_(8)


def _q4_1_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    bits.nibbles(blocks[:, 4:], RUN, codes, scratch)


def _q5_0_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    _five_bits(blocks[:, 2:6], blocks[:, 6:], codes, scratch).sub_(16)


def _q5_1_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    _five_bits(blocks[:, 4:8], blocks[:, 8:], codes, scratch)


def _pack_q8_0(weights: Tensor, scratch: Scratch) -> Tensor:
    scale, x = search.signed_bytes(weights, scratch)  # 128 on top and the top bit turned: two's complement
    return torch.cat([bits.half_bytes(scale), x.rows(BLOCK, offset=128) ^ 128], dim=1)


def _pack_q4_0(weights: Tensor, scratch: Scratch) -> Tensor:
    scale, x = search.signed_nibbles(weights, scratch)
    return torch.cat([bits.half_bytes(scale), bits.join(x.rows(BLOCK, offset=8), 4, RUN)], dim=1)


CODECS: tuple[Codec, ...] = (
    BlockCodec(ENCODINGS["q8_0"], _scale, _q8_0_codes, _pack_q8_0),
    BlockCodec(ENCODINGS["q4_0"], _scale, _q4_0_codes, _pack_q4_0),
    BlockCodec(ENCODINGS["q4_1"], _scale_and_offset, _q4_1_codes),
    BlockCodec(ENCODINGS["q5_0"], _scale, _q5_0_codes),
    BlockCodec(ENCODINGS["q5_1"], _scale_and_offset, _q5_1_codes),
)
