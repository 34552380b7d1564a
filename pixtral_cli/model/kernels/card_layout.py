"""Packed rows as codecs have them in, the same in the units that packed_matmul.cu reads out, and back, exactly.

Torch operations alone, on whatever device the bytes are. What lies where in a unit, and why, is said in
packed_matmul.cu. Letters: R rows, C columns, T = R / 16 tiles of rows, S = C / 256 units in each; of a row's place in
its tile h = row // 8 and g = row % 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pixtral_cli.model.card_bits import UNIT, UNIT_BYTES
from weights_cache.codecs.k_quants import pack_scales_and_offsets, six_bit_words

ROWS, COLUMNS = UNIT
PLANE = 2048  # bytes of a unit's codes of 4 bits
AT_ONCE = 2**23  # weights

# Columns of a unit are four times 64, two words of a lane twice: of 32 columns a lane t has 8 t to 8 t + 7, in q6_k
# 4 t to 4 t + 3 of each 16. A word has two pairs, and a pair two columns. So the axes of codes in order of rows are
EIGHT = (2, 8, -1, 4, 2, 4, 2, 2, 2)  # T by [h, g, S, quarter, half, t, word, pair, column]
# and those of a unit's bytes [T, S, quarter, g, t, half, word] and then
NIBBLES_EIGHT = (0, 3, 4, 2, 6, 5, 7, 9, 8, 1)  # [column, pair, h]
NF4_EIGHT = (0, 3, 4, 2, 6, 5, 7, 8, 1, 9)  # [pair, h, column]
BYTES_EIGHT = (0, 3, 4, 5, 2, 6, 7, 8, 9, 1)  # q8_0: [T, S, quarter, half, g, t, word, pair, column, h]
# For q5_k its words begin as [T, S, quarter, g, t, column], and then come the registers: [half, word, pair, h]
FIVE_ORDER = (0, 3, 4, 2, 6, 9, 5, 7, 8, 1)
# q6_k: quarters are two and two. T by [h, g, S, Q, q, half, group, t, pair, column], and
SIX = (2, 8, -1, 2, 2, 2, 2, 4, 2, 2)
SIX_ORDER = (0, 3, 4, 2, 8, 10, 5, 6, 7, 9, 1)  # [T, S, Q, g, t, column, q, half] and then [group, pair, h]


class Packing(NamedTuple):
    """`pack` takes uint8 [16 T, bytes of a row] to uint8 [T, S, bytes of a unit], `unpack` goes back."""

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


def _ordered(codes: Tensor, axes: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """[R, C] with its axes in the order of a unit."""
    return codes.reshape(len(codes) // ROWS, *axes).permute(order)


def _in_rows(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse: [R, C]."""
    back = sorted(range(len(order)), key=order.__getitem__)
    codes = codes.permute(back)
    return codes.reshape(codes.shape[0] * ROWS, -1)


def _sizes(axes: tuple[int, ...], order: tuple[int, ...], units: Tensor) -> tuple[int, ...]:
    """The sizes of a unit's axes for units [T, S, ...]."""
    every = (units.shape[0], *(units.shape[1] if size == -1 else size for size in axes))
    return tuple(every[axis] for axis in order)


def _halves(codes: Tensor) -> Tensor:
    """Codes [..., 2] -> bytes [...]: the first in the low half."""
    return codes[..., 0] | codes[..., 1] << 4


def _both(data: Tensor) -> Tensor:
    return torch.stack([data & 15, data >> 4], -1)


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 0..15 [R, C] -> a plane, uint8 [T, S, 2048]."""
    return _halves(_ordered(codes, EIGHT, NIBBLES_EIGHT)).flatten(2)


def _codes(plane: Tensor) -> Tensor:
    """The inverse."""
    return _in_rows(_both(plane.reshape(_sizes(EIGHT, NIBBLES_EIGHT, plane)[:-1])), NIBBLES_EIGHT)


def _by_group(values: Tensor, units: int, width: int) -> Tensor:
    """uint8 [R, bytes of S units], `width` of them for each group -> bytes [T, S, g, group, h, width]."""
    tiles = values.reshape(len(values) // ROWS, 2, 8, units, -1, width)
    return tiles.permute(0, 3, 2, 4, 1, 5).flatten(2)


def _groups_of(data: Tensor, width: int) -> Tensor:
    """The inverse: uint8 [R, S, bytes]."""
    tiles, units = data.shape[:2]
    found = data.reshape(tiles, units, 8, -1, 2, width).permute(0, 4, 2, 1, 3, 5)
    return found.reshape(tiles * ROWS, units, -1)


def _pack_q4_0(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(1, (-1, 18))
    data = blocks[..., 2:]
    codes = torch.cat([data & 15, data >> 4], -1).flatten(1)
    return torch.cat([_nibbles(codes), _by_group(blocks[..., :2], codes.shape[1] // COLUMNS, 2)], -1)


def _unpack_q4_0(units: Tensor) -> Tensor:
    codes = _codes(units[..., :PLANE]).unflatten(1, (-1, 2, 16))
    scales = _groups_of(units[..., PLANE:], 2).unflatten(2, (-1, 2)).flatten(1, 2)
    return torch.cat([scales, codes[:, :, 0] | codes[:, :, 1] << 4], -1).flatten(1)


def _runs(codes: Tensor) -> Tensor:
    """The inverse of stacking low and high halves of runs of 32 bytes: codes [R, C] -> bytes [R, S, 128]."""
    runs = codes.unflatten(1, (-1, 4, 2, 32))
    return (runs[:, :, :, 0] | runs[:, :, :, 1] << 4).flatten(2)


def _pack_scales(header: Tensor) -> list[Tensor]:
    """The 16 bytes at the head of q4_k's and q5_k's blocks [R, S, 16] -> scales, offsets, factors of units."""
    factors, packed = header.split([4, 12], 2)
    words = six_bit_words(*packed.contiguous().view(torch.int32).unbind(2))
    scales, offsets = torch.stack(words, 2).view(torch.uint8).split(8, 2)
    return [_by_group(part, header.shape[1], width) for part, width in ((scales, 2), (offsets, 2), (factors, 4))]


def _header(scales: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """The inverse."""
    both = (_groups_of(part, 2).flatten(0, 1) for part in (scales, offsets))
    found = _groups_of(factors, 4)
    return torch.cat([found, pack_scales_and_offsets(*both).view(*found.shape[:2], 12)], -1)


def _pack_q4_k(rows: Tensor) -> Tensor:
    header, data = rows.unflatten(1, (-1, 144)).split([16, 128], 2)
    runs = data.unflatten(2, (4, 32))
    codes = torch.stack([runs & 15, runs >> 4], 3).flatten(1)
    return torch.cat([_nibbles(codes), *_pack_scales(header)], -1)


def _unpack_q4_k(units: Tensor) -> Tensor:
    plane, *small = units.split([PLANE, 128, 128, 64], 2)
    return torch.cat([_header(*small), _runs(_codes(plane))], -1).flatten(1)


def _pack_q5_k(rows: Tensor) -> Tensor:
    header, fifth, data = rows.unflatten(1, (-1, 176)).split([16, 32, 128], 2)
    runs = data.unflatten(2, (4, 32))
    codes = torch.stack([runs & 15, runs >> 4], 3).flatten(1)
    upper = torch.stack([fifth >> shift & 1 for shift in range(8)], 2).flatten(1)
    return torch.cat([*_five_bits(codes | upper << 4), *_pack_scales(header)], -1)


def _five_bits(codes: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 0..31 [R, C] -> uint8 [T, S, 2048] and [T, S, 512]: sixteen codes are five words of 16 bits."""
    separate = _ordered(codes, EIGHT, FIVE_ORDER).flatten(6).to(torch.int16)
    threes = separate[..., :15].unflatten(6, (5, 3))
    bits = torch.stack([separate[..., 15] >> bit & 1 for bit in range(5)], -1)
    words = threes[..., 0] | threes[..., 1] << 5 | threes[..., 2] << 10 | bits << 15  # [T, S, quarter, g, t, column, 5]
    four, fifth = words[..., :4].transpose(5, 6), words[..., 4].permute(0, 1, 3, 4, 2, 5)
    return four.contiguous().view(torch.uint8).flatten(2), fifth.contiguous().view(torch.uint8).flatten(2)


def _codes_of_five_bits(four: Tensor, fifth: Tensor) -> Tensor:
    """The inverse."""
    tiles, units = four.shape[:2]
    words = four.reshape(tiles, units, 4, 8, 4, 4, 4).view(torch.int16).transpose(5, 6)
    last = fifth.reshape(tiles, units, 8, 4, 4, 4).view(torch.int16).permute(0, 1, 4, 2, 3, 5)
    words = torch.cat([words, last.unsqueeze(6)], 6)
    threes = torch.stack([words >> shift & 31 for shift in (0, 5, 10)], -1).flatten(6)
    bits = [(words[..., bit] >> 15 & 1) << bit for bit in range(5)]
    sixteenth = bits[0] | bits[1] | bits[2] | bits[3] | bits[4]
    separate = torch.cat([threes, sixteenth.unsqueeze(6)], 6).to(torch.uint8)
    return _in_rows(separate.unflatten(6, (2, 2, 2, 2)), FIVE_ORDER)


def _unpack_q5_k(units: Tensor) -> Tensor:
    four, last, *small = units.split([PLANE, PLANE // 4, 128, 128, 64], 2)
    codes = _codes_of_five_bits(four, last)
    runs = (codes >> 4).unflatten(1, (-1, 8, 32))
    fifth = torch.zeros_like(runs[:, :, 0])
    for index in range(8):
        fifth |= runs[:, :, index] << index
    return torch.cat([_header(*small), fifth, _runs(codes & 15)], -1).flatten(1)


def _pack_q6_k(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(1, (-1, 210))
    lower, pairs, scales, factor = blocks.split([128, 64, 16, 2], 2)
    halves = lower.unflatten(2, (2, 64))
    low = torch.stack([halves & 15, halves >> 4], 3).flatten(1)  # of 128 weights the low halves of 64 bytes, then high
    runs = pairs.unflatten(2, (2, 32))
    high = torch.stack([runs >> shift & 3 for shift in (0, 2, 4, 6)], 3).flatten(1)
    small = (_by_group(part, blocks.shape[1], 2) for part in (scales ^ 128, factor))
    return torch.cat([_six_bits(low | high << 4), *small], -1)


def _six_bits(codes: Tensor) -> Tensor:
    """uint8 0..63 [R, C] -> uint8 [T, S, 3072]: eight codes are three words of 16 bits."""
    a, b, c, d, e, f, g, h = _ordered(codes, SIX, SIX_ORDER).flatten(8).to(torch.int16).unbind(-1)
    words = [a | b << 6 | g << 12, c | d << 6 | h << 12, e | f << 6 | g >> 4 << 12 | h >> 4 << 14]
    ordered = torch.stack(words, -1).flatten(6).unflatten(6, (3, 4)).permute(0, 1, 2, 6, 3, 4, 7, 5)
    return ordered.contiguous().view(torch.uint8).flatten(2)


def _codes_of_six_bits(data: Tensor) -> Tensor:
    """The inverse."""
    tiles, units = data.shape[:2]
    ordered = data.reshape(tiles, units, 2, 3, 8, 4, 4, 4).view(torch.int16)  # the last of words, and bytes of columns
    a, b, c = ordered.permute(0, 1, 2, 4, 5, 7, 3, 6).flatten(6).unflatten(6, (2, 2, 3)).unbind(-1)
    upper = (a >> 12 & 15 | c >> 8 & 48, b >> 12 & 15 | c >> 10 & 48)
    codes = [a & 63, a >> 6 & 63, b & 63, b >> 6 & 63, c & 63, c >> 6 & 63, *upper]
    separate = torch.stack(codes, -1).to(torch.uint8)
    return _in_rows(separate.unflatten(8, (2, 2, 2)), SIX_ORDER)


def _unpack_q6_k(units: Tensor) -> Tensor:
    data, scales, factor = units.split([3072, 256, 32], 2)
    codes = _codes_of_six_bits(data)
    halves = (codes & 15).unflatten(1, (-1, 2, 2, 64))
    runs = (codes >> 4).unflatten(1, (-1, 2, 4, 32))
    pairs = runs[:, :, :, 0] | runs[:, :, :, 1] << 2 | runs[:, :, :, 2] << 4 | runs[:, :, :, 3] << 6
    lower = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).flatten(2)
    return torch.cat([lower, pairs.flatten(2), _groups_of(scales, 2) ^ 128, _groups_of(factor, 2)], -1).flatten(1)


def _pack_q8_0(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(1, (-1, 34))
    codes = blocks[..., 2:].flatten(1)
    scales = _by_group(blocks[..., :2], codes.shape[1] // COLUMNS, 2)
    return torch.cat([_ordered(codes, EIGHT, BYTES_EIGHT).flatten(2), scales], -1)


def _unpack_q8_0(units: Tensor) -> Tensor:
    data, scales = units.split([2 * PLANE, 256], 2)
    codes = _in_rows(data.reshape(_sizes(EIGHT, BYTES_EIGHT, units)), BYTES_EIGHT).unflatten(1, (-1, 32))
    return torch.cat([_groups_of(scales, 2).unflatten(2, (-1, 2)).flatten(1, 2), codes], -1).flatten(1)


def pack_fp8(codes: Tensor, scales: Tensor) -> Tensor:
    """`codes` uint8 [R, C], `scales` float32 [R, C/128] -> uint8 [T, S, 4224]."""
    data = scales.contiguous().view(torch.uint8)
    ordered = _ordered(codes, EIGHT, BYTES_EIGHT).flatten(2)
    return torch.cat([ordered, _by_group(data, codes.shape[1] // COLUMNS, 4)], -1)


def unpack_fp8(units: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: codes [R, C] and scales [R, C/128]."""
    data, scales = units.split([2 * PLANE, UNIT_BYTES["fp8"] - 2 * PLANE], 2)
    codes = _in_rows(data.reshape(_sizes(EIGHT, BYTES_EIGHT, units)), BYTES_EIGHT)
    return codes, _groups_of(scales, 4).flatten(1).view(torch.float32)


def pack_nf4(codes: Tensor, magnitudes: Tensor) -> Tensor:
    """`codes` uint8 [R, C/2] as bitsandbytes has them, `magnitudes` float32 [R, C/64] -> uint8 [T, S, 2304]."""
    separate = torch.stack([codes >> 4, codes & 15], -1).flatten(1)
    plane = _halves(_ordered(separate, EIGHT, NF4_EIGHT)).flatten(2)
    data = magnitudes.contiguous().view(torch.uint8)
    return torch.cat([plane, _by_group(data, separate.shape[1] // COLUMNS, 4)], -1)


def unpack_nf4(units: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: codes [R, C/2] and magnitudes [R, C/64]."""
    plane, data = units.split([PLANE, UNIT_BYTES["nf4"] - PLANE], 2)
    sizes = _sizes(EIGHT, NF4_EIGHT, units)[:-1]
    pairs = _in_rows(_both(plane.reshape(sizes)), NF4_EIGHT).unflatten(1, (-1, 2))
    return pairs[..., 0] << 4 | pairs[..., 1], _groups_of(data, 4).flatten(1).view(torch.float32)


PACKINGS = {
    "q4_0": Packing(_pack_q4_0, _unpack_q4_0),
    "q4_k": Packing(_pack_q4_k, _unpack_q4_k),
    "q5_k": Packing(_pack_q5_k, _unpack_q5_k),
    "q6_k": Packing(_pack_q6_k, _unpack_q6_k),
    "q8_0": Packing(_pack_q8_0, _unpack_q8_0),
}


def rows_at_once(columns: int) -> int:
    """Rows, a multiple of 64, to lay out at a time: the memory for that stays within about ten bytes a weight."""
    return max(64, AT_ONCE // columns // 64 * 64)
