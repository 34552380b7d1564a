"""Super-blocks of 256 weights, in groups whose small integer scales share a float16: q2_k to q6_k. Knows layouts.

Group g has an integer scale s (and, in q2_k, q4_k and q5_k, an integer offset o); q is a weight's code.

    q2_k  16 x 16   84 bytes  (d s) q - (e o)   16 bytes (low nibble s, high o), 64 of 2-bit codes, d, e
    q3_k  16 x 16  110        (d (s - 32)) q    32 of third bits, 64 of 2-bit codes, 12 of 6-bit s, d
    q4_k   8 x 32  144        (d s) q - (e o)   d, e, 12 of 6-bit s and o, 128 of nibbles
    q5_k   8 x 32  176        (d s) q - (e o)   d, e, 12 of 6-bit s and o, 32 of fifth bits, 128 of nibbles
    q6_k  16 x 16  210        (d s) (q - 32)    128 of nibbles, 64 of upper two bits, 16 of int8 s, d

Codes of b bits lie in planes: of a run of bytes, the lowest b bits are the run's first weights, in order, the next b
bits the weights after those. Runs are 32 bytes; 64 for q6_k's nibbles. In q3_k a third bit that is NOT set takes 4 off.

The 12 bytes of q4_k and q5_k: bytes 0..3 hold s of groups 0..3 in their low six bits, bytes 4..7 likewise o; bytes
8..11 hold the low four bits of s (low nibble) and o (high nibble) of groups 4..7, whose two upper bits are the top
bits of bytes 0..3 and of 4..7. The 12 bytes of q3_k: the low four bits of s 0..7 are the low nibbles of bytes 0..7,
those of s 8..15 the high ones; the two upper bits of s 4k + i are bits 2k, 2k + 1 of byte 8 + i.

Worked, q4_k: d = 0.5 and e = 0.25 with first scale byte 0x83 and ninth 0x21: s of group 0 is 3; s of group 4 is
1 + 16 * 2 = 33, since the low nibble of byte 8 is 1 and the top bits of byte 0 are 2. A code 7 in group 0, whose
offset is 4, is (0.5 * 3) * 7 - 0.25 * 4 = 9.5.
Source: ggml's ggml-common.h (block_q2_K and its neighbours) and the classes of gguf-py's quants.py.
"""

import torch
from torch import Tensor

from weights_cache.encodings import ENCODINGS

from . import bits, search
from .bits import Scratch
from .codec import BlockCodec, Codec

SUPER = 256
RUN = 32  # bytes of a run of codes
Q6_RUN = 64


def six_bit_words(first: Tensor, second: Tensor, third: Tensor) -> list[Tensor]:
    """The fields 0..63 of q4_k's and q5_k's 12 bytes, from int32 words of these: s of groups 0..3, a byte each, of
    4..7, then o likewise."""
    return [
        first & 0x3F3F3F3F,
        third & 0x0F0F0F0F | first >> 2 & 0x30303030,
        second & 0x3F3F3F3F,
        third >> 4 & 0x0F0F0F0F | second >> 2 & 0x30303030,
    ]


def _six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """q4_k and q5_k: d and e, each times the 8 integers 0..63 that the 12 bytes after them hold."""
    packed = torch.stack(six_bit_words(*blocks[:, 4:16].view(torch.int32).unbind(1)), dim=1)
    scales, offsets = packed.view(torch.uint8).float().view(-1, 2, 8).unbind(1)
    scale, offset = bits.halves(blocks, 0, 2)
    return scales.mul_(scale), offsets.mul_(offset)


def pack_scales_and_offsets(scales: Tensor, offsets: Tensor) -> Tensor:
    """The inverse: two of uint8 [n, 8] into uint8 [n, 12]."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = offsets[:, :4] | (offsets[:, 4:] >> 4 << 6)
    third = (scales[:, 4:] & 15) | (offsets[:, 4:] << 4)
    return torch.cat([first, second, third], dim=1)


def _q2_k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scales, offsets = bits.fields(blocks[:, :16], 4, 16)[:, 0].unbind(1)
    scale, offset = bits.halves(blocks, 80, 82)
    return scales * scale, offsets * offset


def _q2_k_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    codes.copy_(bits.fields(blocks[:, 16:80], 2, RUN).view(-1, SUPER))


def _q3_k_scales(blocks: Tensor) -> tuple[Tensor, None]:
    lower = bits.fields(blocks[:, 96:104], 4, 8).view(-1, 16)
    upper = bits.fields(blocks[:, 104:108], 2, 4).view(-1, 16)
    scales = (lower | (upper << 4)).float().sub_(32)
    return scales.mul_(bits.half(blocks, 108)), None


def _q3_k_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    third = bits.fields(blocks[:, :32], 1, RUN).view(-1, SUPER)
    lower = bits.fields(blocks[:, 32:96], 2, RUN).view(-1, SUPER)
    codes.copy_(lower).sub_(third ^ 1, alpha=4)


def _q4_k_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    bits.nibbles(blocks[:, 16:], RUN, codes, scratch)


def _q5_k_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    bits.nibbles(blocks[:, 48:], RUN, codes, scratch)
    codes.add_(bits.fields(blocks[:, 16:48], 1, RUN).view(-1, SUPER), alpha=16)


def _q6_k_scales(blocks: Tensor) -> tuple[Tensor, None]:
    return blocks[:, 192:208].view(torch.int8) * bits.half(blocks, 208), None


def _q6_k_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    """Each half of 128 weights is four times 32: the low nibbles of two runs of bytes, then their high nibbles, all
    of them under the four pairs of upper bits of one run."""
    halves = (len(blocks), 2, RUN)
    lower, pairs, code, upper = (
        scratch.array(name, count, *halves, dtype=torch.uint8)
        for name, count in (("lower", 2), ("pairs", 1), ("code", 4), ("upper", 4))
    )
    lower.copy_(blocks[:, :128].unflatten(1, (2, 2, RUN)).permute(2, 0, 1, 3))
    pairs.copy_(blocks[:, 128:192].unflatten(1, (2, RUN)))
    torch.bitwise_and(lower, 15, out=code[:2])
    torch.bitwise_right_shift(lower, 4, out=code[2:])
    for index, part in enumerate(upper):
        torch.bitwise_right_shift(pairs[0], 2 * index, out=part)
    code.bitwise_or_(upper.bitwise_and_(3).bitwise_left_shift_(4)).sub_(32)
    codes.view(-1, 2, 4, RUN).copy_(code.view(torch.int8).permute(1, 2, 0, 3))


def _pack_q4_k(weights: Tensor, scratch: Scratch) -> Tensor:
    found, x = search.offset_nibbles(weights, scratch)
    return torch.cat([
        bits.half_bytes(found.scale_step),
        bits.half_bytes(found.offset_step),
        pack_scales_and_offsets(found.scales.to(torch.uint8), found.offsets.to(torch.uint8)),
        bits.join(x.rows(SUPER), 4, RUN),
    ], dim=1)  # fmt: skip


def _pack_q6_k(weights: Tensor, scratch: Scratch) -> Tensor:
    found, x = search.signed_six_bits(weights, scratch)
    codes = x.rows(SUPER, offset=32)
    return torch.cat([
        bits.join(codes & 15, 4, Q6_RUN),
        bits.join(codes >> 4, 2, RUN),
        found.scales.to(torch.int8).view(torch.uint8),
        bits.half_bytes(found.step),
    ], dim=1)  # fmt: skip


CODECS: tuple[Codec, ...] = (
    BlockCodec(ENCODINGS["q2_k"], _q2_k_scales, _q2_k_codes),
    BlockCodec(ENCODINGS["q3_k"], _q3_k_scales, _q3_k_codes),
    BlockCodec(ENCODINGS["q4_k"], _six_bit_scales, _q4_k_codes, _pack_q4_k),
    BlockCodec(ENCODINGS["q5_k"], _six_bit_scales, _q5_k_codes),
    BlockCodec(ENCODINGS["q6_k"], _q6_k_scales, _q6_k_codes, _pack_q6_k),
)
