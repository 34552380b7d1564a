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
FOUR = (2, 8, -1, 4, 2, 2, 4, 2, 2)  # T by [h, g, S, quarter, half, word, t, pair, column]
# and those of a unit's bytes [T, S, quarter, g, t, half, word] and then
NIBBLES_EIGHT = (0, 3, 4, 2, 6, 5, 7, 9, 8, 1)  # [column, pair, h]
NIBBLES_FOUR = (0, 3, 4, 2, 7, 5, 6, 9, 8, 1)
NF4_EIGHT = (0, 3, 4, 2, 6, 5, 7, 8, 1, 9)  # [pair, h, column]
# The upper bits of q6_k: quarters are two and two, and a word is of 32 columns.
UPPER = (2, 8, -1, 2, 2, 2, 2, 4, 2, 2)  # T by [h, g, S, Q, q, half, word, t, pair, column]
UPPER_ORDER = (0, 3, 4, 2, 8, 5, 6, 10, 7, 9, 1)  # [T, S, Q, g, t, q, half, column, word, pair, h]


class Layout(NamedTuple):
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


def _nibbles(codes: Tensor, four: bool = False) -> Tensor:
    """uint8 0..15 [R, C] -> a plane, uint8 [T, S, 2048]."""
    axes, order = (FOUR, NIBBLES_FOUR) if four else (EIGHT, NIBBLES_EIGHT)
    return _halves(_ordered(codes, axes, order)).flatten(2)


def _codes(plane: Tensor, four: bool = False) -> Tensor:
    axes, order = (FOUR, NIBBLES_FOUR) if four else (EIGHT, NIBBLES_EIGHT)
    return _in_rows(_both(plane.reshape(_sizes(axes, order, plane)[:-1])), order)


def _by_row(values: Tensor, units: int) -> Tensor:
    """[R, S, ...] -> [T, S, g, h, ...], as bytes [T, S, 16 rows' bytes]."""
    tiles = values.reshape(-1, 2, 8, units, *values.shape[2:]).transpose(1, 3)
    return tiles.contiguous().view(torch.uint8).flatten(2)


def _rows_of(data: Tensor, *each: int) -> Tensor:
    """The inverse: bytes [T, S, 16 rows' bytes] -> uint8 [R, S, *each]."""
    tiles, units = data.shape[:2]
    return data.reshape(tiles, units, 8, 2, *each).transpose(1, 3).reshape(tiles * ROWS, units, *each)


def _by_group(values: Tensor, units: int) -> Tensor:
    """[R, S * groups, bytes] -> bytes [T, S, g, group, h]."""
    tiles = values.reshape(-1, 2, 8, units, values.shape[1] // units, values.shape[2])
    return tiles.permute(0, 3, 2, 4, 1, 5).flatten(2)


def _groups_of(data: Tensor, groups: int, width: int) -> Tensor:
    """The inverse: uint8 [R, S * groups, width]."""
    tiles, units = data.shape[:2]
    found = data.reshape(tiles, units, 8, groups, 2, width).permute(0, 4, 2, 1, 3, 5)
    return found.reshape(tiles * ROWS, units * groups, width)


def _pack_q4_0(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(1, (-1, 18))
    data = blocks[..., 2:]
    codes = torch.cat([data & 15, data >> 4], -1).flatten(1)
    return torch.cat([_nibbles(codes), _by_group(blocks[..., :2], codes.shape[1] // COLUMNS)], -1)


def _unpack_q4_0(units: Tensor) -> Tensor:
    codes = _codes(units[..., :PLANE]).unflatten(1, (-1, 2, 16))
    return torch.cat([_groups_of(units[..., PLANE:], 8, 2), codes[:, :, 0] | codes[:, :, 1] << 4], -1).flatten(1)


def _pack_q4_k(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(1, (-1, 144))
    factors, packed, data = blocks.split([4, 12, 128], 2)
    runs = data.unflatten(2, (4, 32))
    codes = torch.stack([runs & 15, runs >> 4], 3).flatten(1)
    words = six_bit_words(*packed.contiguous().view(torch.int32).unbind(2))
    scales = torch.stack(words, 2).view(torch.uint8).unflatten(2, (2, 8))
    small = (scales[:, :, 0], scales[:, :, 1], factors)
    return torch.cat([_nibbles(codes), *(_by_row(part, blocks.shape[1]) for part in small)], -1)


def _unpack_q4_k(units: Tensor) -> Tensor:
    plane, scales, offsets, factors = units.split([PLANE, 128, 128, 64], 2)
    runs = _codes(plane).unflatten(1, (-1, 4, 2, 32))
    both = (_rows_of(part, 8).flatten(0, 1) for part in (scales, offsets))
    packed = pack_scales_and_offsets(*both).view(runs.shape[0], -1, 12)
    data = (runs[:, :, :, 0] | runs[:, :, :, 1] << 4).flatten(2)
    return torch.cat([_rows_of(factors, 4), packed, data], -1).flatten(1)


def _pack_q6_k(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(1, (-1, 210))
    lower, pairs, scales, factor = blocks.split([128, 64, 16, 2], 2)
    halves = lower.unflatten(2, (2, 64))
    low = torch.stack([halves & 15, halves >> 4], 3).flatten(1)  # of 128 weights the low halves of 64 bytes, then high
    runs = pairs.unflatten(2, (2, 32))
    high = torch.stack([runs >> shift & 3 for shift in (0, 2, 4, 6)], 3).flatten(1)
    fields = _ordered(high, UPPER, UPPER_ORDER).flatten(8).roll(2, -1).unflatten(8, (2, 4))
    upper = fields[..., 0] | fields[..., 1] << 2 | fields[..., 2] << 4 | fields[..., 3] << 6
    small = (_by_row(part, blocks.shape[1]) for part in (scales ^ 128, factor))
    return torch.cat([_nibbles(low, four=True), upper.flatten(2), *small], -1)


def _unpack_q6_k(units: Tensor) -> Tensor:
    plane, upper, scales, factor = units.split([PLANE, PLANE // 2, 256, 32], 2)
    halves = _codes(plane, four=True).unflatten(1, (-1, 2, 2, 64))
    sizes = _sizes(UPPER, UPPER_ORDER, units)
    fields = torch.stack([upper >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    fields = fields.reshape(*sizes[:8], 8).roll(-2, -1).reshape(sizes)
    runs = _in_rows(fields, UPPER_ORDER).unflatten(1, (-1, 2, 4, 32))
    pairs = runs[:, :, :, 0] | runs[:, :, :, 1] << 2 | runs[:, :, :, 2] << 4 | runs[:, :, :, 3] << 6
    lower = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).flatten(2)
    return torch.cat([lower, pairs.flatten(2), _rows_of(scales, 16) ^ 128, _rows_of(factor, 2)], -1).flatten(1)


def _pack_q8_0(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(1, (-1, 34))
    codes = (blocks[..., 2:] ^ 128).flatten(1)
    scales = _by_group(blocks[..., :2], codes.shape[1] // COLUMNS)
    return torch.cat([_nibbles(codes & 15), _nibbles(codes >> 4), scales], -1)


def _unpack_q8_0(units: Tensor) -> Tensor:
    low, high, scales = units.split([PLANE, PLANE, 256], 2)
    codes = (_codes(low) | _codes(high) << 4).unflatten(1, (-1, 32)) ^ 128
    return torch.cat([_groups_of(scales, 8, 2), codes], -1).flatten(1)


def pack_nf4(codes: Tensor, magnitudes: Tensor) -> Tensor:
    """`codes` uint8 [R, C/2] as bitsandbytes has them, `magnitudes` float32 [R, C/64] -> uint8 [T, S, 2304]."""
    separate = torch.stack([codes >> 4, codes & 15], -1).flatten(1)
    plane = _halves(_ordered(separate, EIGHT, NF4_EIGHT)).flatten(2)
    data = magnitudes.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    return torch.cat([plane, _by_group(data, separate.shape[1] // COLUMNS)], -1)


def unpack_nf4(units: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: codes [R, C/2] and magnitudes [R, C/64]."""
    plane, data = units.split([PLANE, UNIT_BYTES["nf4"] - PLANE], 2)
    sizes = _sizes(EIGHT, NF4_EIGHT, units)[:-1]
    pairs = _in_rows(_both(plane.reshape(sizes)), NF4_EIGHT).unflatten(1, (-1, 2))
    return pairs[..., 0] << 4 | pairs[..., 1], _groups_of(data, 4, 4).contiguous().view(torch.float32).flatten(1)


LAYOUTS = {
    "q4_0": Layout(_pack_q4_0, _unpack_q4_0),
    "q4_k": Layout(_pack_q4_k, _unpack_q4_k),
    "q6_k": Layout(_pack_q6_k, _unpack_q6_k),
    "q8_0": Layout(_pack_q8_0, _unpack_q8_0),
}


def rows_at_once(columns: int) -> int:
    """Rows, a multiple of 64, to lay out at a time: the memory for that stays within about ten bytes a weight."""
    return max(64, AT_ONCE // columns // 64 * 64)
