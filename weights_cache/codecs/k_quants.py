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

from . import bits, fit
from .codec import BlockCodec, Codec
from .groups import Scratch

SUPER = 256
RUN = 32  # bytes of a run of codes
Q6_RUN = 64
SIX_BITS = 12  # bytes of packed 6-bit scales


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [n, 256]: integer codes [n, ...] times their group's scale, float32 [n, groups]."""
    grouped = codes.reshape(*scales.shape, -1).float()
    return grouped.mul_(scales.unsqueeze(2)).view(-1, SUPER)


def _lowered(weights: Tensor, offsets: Tensor) -> Tensor:
    """float32 [n, 256] less their group's offset, float32 [n, groups]; in place."""
    return weights.view(*offsets.shape, -1).sub_(offsets.unsqueeze(2)).view(-1, SUPER)


def _scales_and_offsets(data: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 offsets 0..63 in 12 bytes: two of uint8 [n, 8]."""
    first, second, third = data.view(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, (third & 15) | (first >> 2 & 48)], dim=1)
    offsets = torch.cat([second & 63, (third >> 4) | (second >> 2 & 48)], dim=1)
    return scales, offsets


def _pack_scales_and_offsets(scales: Tensor, offsets: Tensor) -> Tensor:
    """The inverse: two of uint8 [n, 8] into uint8 [n, 12]."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = offsets[:, :4] | (offsets[:, 4:] >> 4 << 6)
    third = (scales[:, 4:] & 15) | (offsets[:, 4:] << 4)
    return torch.cat([first, second, third], dim=1)


def _unpack_q2_k(blocks: Tensor) -> Tensor:
    scales, offsets = bits.fields(blocks[:, :16], 4, 16).unbind(2)
    weights = _scaled(bits.fields(blocks[:, 16:80], 2, RUN), scales[:, 0] * bits.half(blocks, 80))
    return _lowered(weights, offsets[:, 0] * bits.half(blocks, 82))


def _unpack_q3_k(blocks: Tensor) -> Tensor:
    third = bits.fields(blocks[:, :32], 1, RUN).view(-1, SUPER)
    codes = bits.fields(blocks[:, 32:96], 2, RUN).view(-1, SUPER).view(torch.int8) - (third ^ 1).view(torch.int8) * 4
    lower = bits.fields(blocks[:, 96:104], 4, 8).view(-1, 16)
    upper = bits.fields(blocks[:, 104:108], 2, 4).view(-1, 16)
    scales = (lower | (upper << 4)).float().sub_(32)
    return _scaled(codes, scales.mul_(bits.half(blocks, 108)))


def _unpack_q4_k(blocks: Tensor) -> Tensor:
    scales, offsets = _scales_and_offsets(blocks[:, 4:16])
    weights = _scaled(bits.fields(blocks[:, 16:], 4, RUN), scales * bits.half(blocks, 0))
    return _lowered(weights, offsets * bits.half(blocks, 2))


def _unpack_q5_k(blocks: Tensor) -> Tensor:
    scales, offsets = _scales_and_offsets(blocks[:, 4:16])
    fifth = bits.fields(blocks[:, 16:48], 1, RUN).view(-1, SUPER)
    codes = bits.fields(blocks[:, 48:], 4, RUN).view(-1, SUPER) | (fifth << 4)
    return _lowered(_scaled(codes, scales * bits.half(blocks, 0)), offsets * bits.half(blocks, 2))


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    lower = bits.fields(blocks[:, :128], 4, Q6_RUN).view(-1, SUPER)
    upper = bits.fields(blocks[:, 128:192], 2, RUN).view(-1, SUPER)
    codes = (lower | (upper << 4)).view(torch.int8) - 32
    scales = blocks[:, 192:208].view(torch.int8) * bits.half(blocks, 208)
    return _scaled(codes, scales)


def _pack_q4_k(weights: Tensor, scratch: Scratch) -> Tensor:
    found, x = fit.offset_nibbles(weights, scratch)
    return torch.cat([
        bits.half_bytes(found.scale_step),
        bits.half_bytes(found.offset_step),
        _pack_scales_and_offsets(found.scales.to(torch.uint8), found.offsets.to(torch.uint8)),
        bits.join(x.rows(SUPER), 4, RUN),
    ], dim=1)  # fmt: skip


def _pack_q6_k(weights: Tensor, scratch: Scratch) -> Tensor:
    found, x = fit.signed_six_bits(weights, scratch)
    codes = x.rows(SUPER, offset=32)
    return torch.cat([
        bits.join(codes & 15, 4, Q6_RUN),
        bits.join(codes >> 4, 2, RUN),
        found.scales.to(torch.int8).view(torch.uint8),
        bits.half_bytes(found.step),
    ], dim=1)  # fmt: skip


CODECS: tuple[Codec, ...] = (
    BlockCodec("q2_k", SUPER, 84, _unpack_q2_k),
    BlockCodec("q3_k", SUPER, 110, _unpack_q3_k),
    BlockCodec("q4_k", SUPER, 144, _unpack_q4_k, _pack_q4_k),
    BlockCodec("q5_k", SUPER, 176, _unpack_q5_k),
    BlockCodec("q6_k", SUPER, 210, _unpack_q6_k, _pack_q6_k),
)
