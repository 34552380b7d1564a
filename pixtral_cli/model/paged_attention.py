"""Attention over pages on a card, in Triton: q and new k, v in, mixed values out, keys and values written on the way.

`write` puts the new tokens of prompts into the store. `prefill` lets them look back (FlashAttention-2, Dao 2023).
`decode` does both for sequences with one new token, in one kernel and a short one that joins what several programs
have shared. All read the store through the page table, and the lengths on the card: a launch depends on shapes alone,
so a captured graph can be replayed with other lengths. Kernels are chained (`triton_chaining`): each waits, before it
reads or writes anything, until the one before has ended.

Letters: N new tokens, B of them decoding, M of S prompts; H query heads, K key heads, G = H / K, D head_dim, T slots;
BP, DP, KP: the next power of two. Scores are in units of log 2: weights are 2^(score - peak).
"""

# ruff: noqa: N803 - what is constant in a kernel is written in capitals

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixtral_cli.model.kv_cache import HIGHEST_EXPONENT, LOWEST_EXPONENT, PAGE, KVCache, Layout
from pixtral_cli.model.triton_chaining import begin as begin_kernel
from pixtral_cli.model.triton_support import chains

LOG2_E = 1.4426950408889634
NOTHING = tl.constexpr(-1e30)  # the peak of no scores: finite, so that a block without visible keys makes no NaN
PAGE_TOKENS = tl.constexpr(PAGE)
PAGE_BITS = tl.constexpr(PAGE.bit_length() - 1)
LOWEST = tl.constexpr(LOWEST_EXPONENT)
HIGHEST = tl.constexpr(HIGHEST_EXPONENT)
PROGRAMS_PER_PROCESSOR = 2  # of `decode`
LEAST_BLOCKS = 2
"""Blocks of keys that are not worth a program more."""
WHERE = ["page_table", "rows", "positions", "before", "starts"]
"""May begin anywhere in a tensor; a kernel is not compiled anew for that."""


class Blocks(NamedTuple):
    """How one kernel cuts its work: query rows and keys of one step of its loop, warps, Triton's stages.

    With n stages the keys and values of n - 1 later steps are under way.
    """

    rows: int
    keys: int
    warps: int
    stages: int


class Card(NamedTuple):
    """What the kernels ask of a device."""

    programs: int
    """of `decode`: as many as run at one time"""
    shared: int
    """bytes of shared memory for one program"""
    native_e4m3: bool
    """whether it converts e4m3 by itself"""


@cache
def card(device: torch.device) -> Card:
    if device.type == "cpu":  # Triton's interpreter
        return Card(programs=5, shared=2**20, native_e4m3=False)
    found = torch.cuda.get_device_properties(device)
    return Card(
        programs=PROGRAMS_PER_PROCESSOR * found.multi_processor_count,
        shared=getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
        native_e4m3=(found.major, found.minor) >= (8, 9),
    )


# ---- what the kernels share -------------------------------------------------------------------------------------


@triton.jit
def _power_of_two(exponents):
    return ((exponents.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3_value(codes, NATIVE: tl.constexpr):
    """uint8 -> the number that it is the e4m3 code of, float16: all of them are."""
    if NATIVE:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:  # sign, exponent and fraction in float16's places: 2^8 too small, as the exponents' offsets are 7 and 15
        wide = codes.to(tl.int16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True) * 256.0
    return value


@triton.jit
def _e4m3_code(x):
    """float32 of magnitude up to 448 -> its e4m3 code, uint8, rounded to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    tiny = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF  # in steps of 2^-9
    return (sign | tl.where(bits < (121 << 23), tiny, normal)).to(tl.uint8)  # below 2^-6 e4m3 is subnormal


@triton.jit
def _encoded(x):
    """float32 [heads, D] -> codes [heads, D] and exponents [heads], as `kv_cache.encode` makes them."""
    peak = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True)
    exponents = (peak >> 23) - 135 + ((peak & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponents = tl.minimum(tl.maximum(exponents, LOWEST), HIGHEST)
    return _e4m3_code(x * _power_of_two(-exponents)[:, None]), exponents.to(tl.int8)


@triton.jit
def _stored(store, exponents, slot, x, heads, dims, there, K: tl.constexpr, D: tl.constexpr, CODES: tl.constexpr):
    """Put x [heads, D] of one token into `slot` where `there`."""
    at = store + slot * (K * D) + heads[:, None] * D + dims[None, :]
    if CODES:
        codes, powers = _encoded(x.to(tl.float32))
        tl.store(at, codes, mask=there[:, None] & (dims < D)[None, :])
        tl.store(exponents + slot * K + heads, powers, mask=there)
    else:
        tl.store(at, x, mask=there[:, None] & (dims < D)[None, :])


@triton.jit
def _as_read(x, CODES: tl.constexpr, NATIVE: tl.constexpr):
    """x [heads, D] -> float32, as it comes back from the store."""
    value = x.to(tl.float32)
    if CODES:
        codes, powers = _encoded(value)
        value = _e4m3_value(codes, NATIVE).to(tl.float32) * _power_of_two(powers)[:, None]
    return value


@triton.jit
def _page_of(page_row, tokens, end):
    """tokens [L] of the sequence whose pages lie at `page_row` -> the page of each; 0 from `end` on.

    Loops ask for those of their next step: Triton lets keys be under way only if their addresses need no waiting.
    """
    return tl.load(page_row + (tokens >> PAGE_BITS), mask=tokens < end, other=0)


@triton.jit
def _slots(pages, tokens):
    return (pages << PAGE_BITS) + (tokens & (PAGE_TOKENS - 1))


@triton.jit
def _powers(
    page_row, pages, tokens, end, key_exponents, value_exponents, head,
    K: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Where there are codes: exponents of keys and values of `tokens`, which lie in `pages`; the next step's pages."""
    key_powers, value_powers, next_pages = 0, 0, 0
    if CODES:
        at = _slots(pages, tokens).to(tl.int64) * K + head
        key_powers = tl.load(key_exponents + at, mask=tokens < end, other=0)
        value_powers = tl.load(value_exponents + at, mask=tokens < end, other=0)
        next_pages = _page_of(page_row, tokens + BLOCK, end)
    return key_powers, value_powers, next_pages


@triton.jit
def _read(
    store, slots, seen, head, dims, dtype: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Keys or values [L, DP] of one head in `slots` [L], still to be scaled where they are codes; zeros if not seen."""
    at = store + (slots.to(tl.int64)[:, None] * (K * D) + head * D + dims[None, :])
    if MASKED or DP != D:  # noqa: SIM108 - Triton decides this as it compiles
        x = tl.load(at, mask=seen[:, None] & (dims < D)[None, :], other=0)
    else:
        x = tl.load(at)
    if CODES:
        x = _e4m3_value(x, NATIVE).to(dtype)
    return x


@triton.jit
def _prepared(q, scale, CODES: tl.constexpr):
    """q [R, DP] -> what keys are multiplied with, and by what that is to be scaled, a number or [R].

    Codes are exact in float16, which spares conversions; q is brought into its range by powers of two.
    """
    if CODES and q.dtype != tl.float32:
        peak = tl.max(tl.abs(q.to(tl.float32)), 1).to(tl.int32, bitcast=True)
        exponents = tl.maximum((peak >> 23) - 126, -100)
        rows = (q.to(tl.float32) * _power_of_two(-exponents)[:, None]).to(tl.float16)
        scales = scale * _power_of_two(exponents)
    else:
        rows = q
        scales = scale
        if CODES:
            scales = scale + tl.zeros([q.shape[0]], tl.float32)
    return rows, scales


@triton.jit
def _mix_block(
    q, pages, tokens, key_powers, value_powers, loaded, seen, peak, total, mixed, scale, keys, values, head, dims,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: q [R, DP] sees those of `tokens` [L], in `pages`, that `seen` [R or 1, L] says.

    peak and total [R]: the highest score until now and the sum of weights; mixed [R, DP]: the sum of weighted values.
    The exponent of coded values is added to their scores, for it is a power of two as their weights are.
    """
    slots = _slots(pages, tokens)
    k = _read(keys, slots, loaded, head, dims, q.dtype, K, D, DP, MASKED, CODES, NATIVE)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CODES:
        scores = scores * scale[:, None] * _power_of_two(key_powers)[None, :]
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    if CODES:
        lifted = scores + value_powers.to(tl.float32)[None, :]
        higher = tl.maximum(peak, tl.max(lifted, 1))
        weights = tl.exp2(lifted - higher[:, None])
        summed = tl.sum(tl.exp2(scores - higher[:, None]), 1)
    else:
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        summed = tl.sum(weights, 1)
    kept = tl.exp2(peak - higher)
    v = _read(values, slots, loaded, head, dims, q.dtype, K, D, DP, MASKED, CODES, NATIVE)
    mixed = tl.dot(weights.to(q.dtype), v, mixed * kept[:, None], input_precision="ieee")
    return higher, total * kept + summed, mixed


# ---- write ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["table_stride", "first"], do_not_specialize_on_alignment=WHERE)
def _write(
    k, v, keys, values, key_exponents, value_exponents, page_table, rows, positions, first,
    k_stride, v_stride, table_stride,
    K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CODES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program a token; those of k and v are number `first` and on of the layout."""
    begin_kernel(CHAINED)
    n = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + first + n)
    page_row = page_table + tl.load(rows + first + n).to(tl.int64) * table_stride
    slot = tl.load(page_row + position // PAGE_TOKENS).to(tl.int64) * PAGE_TOKENS + position % PAGE_TOKENS
    heads, dims = tl.arange(0, KP), tl.arange(0, DP)
    there = heads < K
    inside = there[:, None] & (dims < D)[None, :]
    offsets = heads[:, None] * D + dims[None, :]
    new_k = tl.load(k + n * k_stride + offsets, mask=inside, other=0)
    new_v = tl.load(v + n * v_stride + offsets, mask=inside, other=0)
    _stored(keys, key_exponents, slot, new_k, heads, dims, there, K, D, CODES)
    _stored(values, value_exponents, slot, new_v, heads, dims, there, K, D, CODES)


def write(k: Tensor, v: Tensor, kv_cache: KVCache, layer: int, layout: Layout, first: int) -> None:
    """Put k and v [M, K, D], the new tokens from number `first` on, into the store. Their rows may lie apart."""
    tokens, heads, dim = k.shape
    store, chained = kv_cache.layer(layer), chains(k.device)
    _write[(tokens,)](
        k, v, *store, layout.page_table, layout.rows, layout.positions, first,
        k.stride(0), v.stride(0), layout.page_table.stride(0),
        K=heads, KP=_power(heads), D=dim, DP=_power(dim), CODES=store.key_exponents is not None, CHAINED=chained,
        num_warps=4, launch_pdl=chained,
    )  # fmt: skip


# ---- decode -----------------------------------------------------------------------------------------------------


class Scratch(NamedTuple):
    """What programs of `decode` leave for `_join`; P programs. One layer after the other may use the same."""

    mixed: Tensor
    """float32 [P, 2, G, D]: weighted values of a program's first piece, and of its last"""
    peaks: Tensor
    """float32 [P, 2, G]"""
    totals: Tensor
    """float32 [P, 2, G]"""


def scratch(heads: int, kv_heads: int, dim: int, device: torch.device, programs: int | None = None) -> Scratch:
    """`programs` is for measurements."""
    rows = (programs or card(device).programs) * 2 * (heads // kv_heads)
    parts = torch.empty(rows * (dim + 2), dtype=torch.float32, device=device)
    return Scratch(*parts.split([rows * dim, rows, rows]))


@triton.jit
def _line(
    positions, batch, window, programs, K: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """The blocks of all sequences and key heads in one line, of which each program takes `each`.

    Returns the sequences' positions and blocks [BP], where in the line their blocks end, and `each`.
    """
    ids = tl.arange(0, BP)
    all_positions = tl.load(positions + ids, mask=ids < batch, other=0)
    blocks = tl.cdiv(all_positions, BLOCK)
    if WINDOWED:
        blocks -= tl.maximum(all_positions + 1 - window, 0) // BLOCK
    blocks = tl.where(ids < batch, tl.maximum(blocks, 1), 0)
    each = tl.maximum(tl.cdiv(tl.sum(blocks, 0) * K, programs), LEAST)
    return all_positions, blocks, tl.cumsum(blocks, 0) * K, each


@triton.jit(do_not_specialize=["table_stride", "window", "batch"], do_not_specialize_on_alignment=WHERE)
def _decode(
    q, k, v, out, keys, values, key_exponents, value_exponents, page_table, rows, positions,
    part_mixed, part_peaks, part_totals, scale, window, batch, q_stride, k_stride, v_stride, table_stride,
    K: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BP: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
    WINDOWED: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A piece of the line of blocks.

    A pair (sequence, key head) has its blocks in a row; who computes its first block also writes its new token and
    begins its softmax with it. Of a pair that lies in several pieces `_join` makes one.
    """
    begin_kernel(CHAINED)
    ids = tl.arange(0, BP)
    all_positions, all_blocks, ends, each = _line(
        positions, batch, window, tl.num_programs(0), K, BP, BLOCK, LEAST, WINDOWED
    )
    own = tl.program_id(0) * each
    at = own
    stop = tl.minimum(own + each, tl.sum(all_blocks, 0) * K)
    dims, group = tl.arange(0, DP), tl.arange(0, ROWS)
    one = tl.arange(0, 1)
    while at < stop:
        b = tl.sum((ends <= at).to(tl.int32), 0)
        blocks = tl.sum(tl.where(ids == b, all_blocks, 0), 0)
        position = tl.sum(tl.where(ids == b, all_positions, 0), 0)
        begin = tl.sum(tl.where(ids == b, ends, 0), 0) - blocks * K
        head = (at - begin) // blocks
        pair = begin + head * blocks  # where the pair's blocks begin in the line
        until = tl.minimum(stop, pair + blocks)
        page_row = page_table + tl.load(rows + b).to(tl.int64) * table_stride
        first = 0
        if WINDOWED:
            first = tl.maximum(position + 1 - window, 0) // BLOCK
        tokens = (first + at - pair) * BLOCK + tl.arange(0, BLOCK)
        pages = _page_of(page_row, tokens, position)
        key_powers, value_powers, later = _powers(
            page_row, pages, tokens, position, key_exponents, value_exponents, head, K, BLOCK, CODES
        )
        new_slot = tl.load(page_row + position // PAGE_TOKENS).to(tl.int64) * PAGE_TOKENS + position % PAGE_TOKENS

        inside = (group < G)[:, None] & (dims < D)[None, :]
        queries = tl.load(
            q + b.to(tl.int64) * q_stride + (head * G + group)[:, None] * D + dims[None, :], mask=inside, other=0
        )
        queries, scales = _prepared(queries, scale, CODES)
        begins = one + at == pair
        inside = begins[:, None] & (dims < D)[None, :]
        new_k = tl.load(k + b.to(tl.int64) * k_stride + head * D + dims[None, :], mask=inside, other=0)
        new_v = tl.load(v + b.to(tl.int64) * v_stride + head * D + dims[None, :], mask=inside, other=0)
        _stored(keys, key_exponents, new_slot, new_k, head + one, dims, begins, K, D, CODES)
        _stored(values, value_exponents, new_slot, new_v, head + one, dims, begins, K, D, CODES)

        scores = tl.sum(queries.to(tl.float32) * _as_read(new_k, CODES, NATIVE), 1) * scales
        peak = tl.where(at == pair, scores, NOTHING)
        total = tl.where(at == pair, 1.0, 0.0) + tl.zeros([ROWS], tl.float32)
        mixed = _as_read(new_v, CODES, NATIVE) + tl.zeros([ROWS, DP], tl.float32)
        for block in range(first + at - pair, first + until - pair):
            tokens = block * BLOCK + tl.arange(0, BLOCK)
            next_pages = _page_of(page_row, tokens + BLOCK, position)
            next_key_powers, next_value_powers, last = _powers(
                page_row, later, tokens + BLOCK, position, key_exponents, value_exponents, head, K, BLOCK, CODES
            )
            seen = tokens < position
            if WINDOWED:
                seen = seen & (tokens > position - window)
            peak, total, mixed = _mix_block(
                queries, pages, tokens, key_powers, value_powers, seen, seen[None, :], peak, total, mixed, scales,
                keys, values, head, dims, K, D, DP, True, CODES, NATIVE,
            )  # fmt: skip
            pages, key_powers, value_powers, later = next_pages, next_key_powers, next_value_powers, last

        offsets = group[:, None] * D + dims[None, :]
        inside = (group < G)[:, None] & (dims < D)[None, :]
        if pair // each == (pair + blocks - 1) // each:
            at_out = out + (b * K + head).to(tl.int64) * (G * D)
            tl.store(at_out + offsets, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
        else:
            piece = 2 * tl.program_id(0) + (at != own).to(tl.int32)
            tl.store(part_mixed + piece * (G * D) + offsets, mixed, mask=inside)
            tl.store(part_peaks + piece * G + group, peak, mask=group < G)
            tl.store(part_totals + piece * G + group, total, mask=group < G)
        at = until


@triton.jit(do_not_specialize=["window", "batch", "programs"], do_not_specialize_on_alignment=WHERE)
def _join(
    out, part_mixed, part_peaks, part_totals, positions, window, batch, programs,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BP: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr, WINDOWED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program a sequence and query head: puts the pieces of a pair together, where it lies in several."""
    begin_kernel(CHAINED)
    b, query_head = tl.program_id(0), tl.program_id(1)
    _, all_blocks, ends, each = _line(positions, batch, window, programs, K, BP, BLOCK, LEAST, WINDOWED)
    ids = tl.arange(0, BP)
    blocks = tl.sum(tl.where(ids == b, all_blocks, 0), 0)
    pair = tl.sum(tl.where(ids == b, ends, 0), 0) - blocks * (K - query_head // G)
    from_program = pair // each
    to_program = (pair + blocks - 1) // each
    if from_program < to_program:
        dims = tl.arange(0, DP)
        peak = tl.full([1], NOTHING, tl.float32)
        total = tl.zeros([1], tl.float32)
        mixed = tl.zeros([DP], tl.float32)
        for some in range(from_program, to_program + 1, 32):
            program = some + tl.arange(0, 32)
            there = program <= to_program
            last = (program == from_program) & (pair % each != 0)  # the pair began within that program's piece
            at = (2 * program + last.to(tl.int32)) * G + query_head % G
            peaks = tl.load(part_peaks + at, mask=there, other=NOTHING)
            totals = tl.load(part_totals + at, mask=there, other=0.0)
            parts = tl.load(
                part_mixed + at[:, None] * D + dims[None, :], mask=there[:, None] & (dims < D)[None, :], other=0.0
            )
            higher = tl.maximum(peak, tl.max(peaks, 0))
            weights = tl.exp2(peaks - higher)
            kept = tl.exp2(peak - higher)
            total = total * kept + tl.sum(totals * weights, 0)
            mixed = mixed * kept + tl.sum(parts * weights[:, None], 0)
            peak = higher
        at = out + (b * K * G + query_head).to(tl.int64) * D + dims
        tl.store(at, (mixed / total).to(out.dtype.element_ty), mask=dims < D)


def decode_blocks(dtype: torch.dtype, dim: int, shared: int) -> Blocks:
    most = Blocks(16, 32, 4, 2) if dtype == torch.float32 else Blocks(16, 64, 4, 3)
    return _fitting(most, dtype, dim, shared // PROGRAMS_PER_PROCESSOR)


def decode(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, kv_cache: KVCache, layer: int, layout: Layout, window: int | None,
    scratch: Scratch, blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """q [B, H, D], k and v [B, K, D], one new token of each sequence -> out [B, H, D]; k and v are then in the store.

    `blocks` is for measurements.
    """
    batch, heads, dim = q.shape
    kv_heads, (_, shared, native) = k.shape[1], card(q.device)
    group, store = heads // kv_heads, kv_cache.layer(layer)
    rows, keys, warps, stages = blocks or decode_blocks(q.dtype, dim, shared)
    programs, chained = len(scratch.peaks) // (2 * group), chains(q.device)
    line = {
        "K": kv_heads, "G": group, "D": dim, "DP": _power(dim), "BP": max(64, triton.next_power_of_2(batch)),
        "BLOCK": keys, "LEAST": LEAST_BLOCKS, "WINDOWED": window is not None, "CHAINED": chained,
    }  # fmt: skip
    _decode[(programs,)](
        q, k, v, out, *store, layout.page_table, layout.rows, layout.positions, *scratch,
        LOG2_E / dim**0.5, window or 0, batch, q.stride(0), k.stride(0), v.stride(0), layout.page_table.stride(0),
        ROWS=max(rows, _power(group)), CODES=store.key_exponents is not None, NATIVE=native, **line,
        num_warps=warps, num_stages=stages, launch_pdl=chained,
    )  # fmt: skip
    _join[(batch, heads)](
        out, *scratch, layout.positions, window or 0, batch, programs, **line, num_warps=4, launch_pdl=chained
    )


# ---- prefill ----------------------------------------------------------------------------------------------------


@triton.jit
def _look_back(
    q, page_row, begin, stop, end, positions, window, peak, total, mixed, scale,
    keys, values, key_exponents, value_exponents, head, dims,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The running softmax over the tokens from `begin` up to `stop`, in blocks; none from `end` on exists."""
    tokens = begin + tl.arange(0, BLOCK)
    pages = _page_of(page_row, tokens, end)
    key_powers, value_powers, later = _powers(
        page_row, pages, tokens, end, key_exponents, value_exponents, head, K, BLOCK, CODES
    )
    for at in range(begin, stop, BLOCK):
        tokens = at + tl.arange(0, BLOCK)
        next_pages = _page_of(page_row, tokens + BLOCK, end)
        next_key_powers, next_value_powers, last = _powers(
            page_row, later, tokens + BLOCK, end, key_exponents, value_exponents, head, K, BLOCK, CODES
        )
        seen = tokens[None, :] <= positions[:, None]
        if WINDOWED:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        peak, total, mixed = _mix_block(
            q, pages, tokens, key_powers, value_powers, tokens < end, seen, peak, total, mixed, scale,
            keys, values, head, dims, K, D, DP, MASKED, CODES, NATIVE,
        )  # fmt: skip
        pages, key_powers, value_powers, later = next_pages, next_key_powers, next_value_powers, last
    return peak, total, mixed


@triton.jit(do_not_specialize=["table_stride", "window", "sequences"], do_not_specialize_on_alignment=WHERE)
def _prefill(
    q, out, keys, values, key_exponents, value_exponents, page_table, rows, before, starts, sequences,
    scale, window, q_stride, table_stride,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr, CODES: tl.constexpr, NATIVE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program for ROWS queries of one sequence and key head: row r is query head r % G of new token r // G.

    Tiles of sequence s begin at number starts[s] * G // ROWS + s: no sequence needs more than lie up to the next.
    """
    begin_kernel(CHAINED)
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # those that look back furthest come first
    begun = 0
    for some in range(0, sequences, 128):
        ids = some + tl.arange(0, 128)
        tiles = tl.load(starts + ids, mask=ids < sequences, other=0) * G // ROWS + ids
        begun += tl.sum(((ids < sequences) & (tiles <= tile)).to(tl.int32), 0)
    sequence = begun - 1
    start = tl.load(starts + sequence)
    new = (tl.load(starts + sequence + 1) - start) * G
    row = (tile - (start * G // ROWS + sequence)) * ROWS
    if row < new:
        past = tl.load(before + sequence)
        page_row = page_table + tl.load(rows + sequence).to(tl.int64) * table_stride
        lowest = past + row // G
        highest = past + (tl.minimum(row + ROWS, new) - 1) // G
        end = highest + 1

        own_rows = row + tl.arange(0, ROWS)
        dims = tl.arange(0, DP)
        tokens = own_rows // G
        positions = past + tokens
        heads = head * G + own_rows % G
        inside = (own_rows < new)[:, None] & (dims < D)[None, :]
        token_ids = (start + tokens).to(tl.int64)
        queries = tl.load(q + token_ids[:, None] * q_stride + heads[:, None] * D + dims[None, :], mask=inside, other=0)
        queries, scales = _prepared(queries, scale, CODES)
        peak = tl.full([ROWS], NOTHING, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, DP], tl.float32)

        whole = 0  # blocks from here up to `partly` are seen by all queries
        partly = (lowest + 1) // BLOCK * BLOCK
        if WINDOWED:
            first = tl.maximum(lowest + 1 - window, 0) // BLOCK * BLOCK
            whole = tl.cdiv(tl.maximum(highest + 1 - window, 0), BLOCK) * BLOCK
            peak, total, mixed = _look_back(
                queries, page_row, first, whole, end, positions, window, peak, total, mixed, scales,
                keys, values, key_exponents, value_exponents, head, dims, K, D, DP, BLOCK, True, True, CODES, NATIVE,
            )  # fmt: skip
            partly = tl.maximum(whole, partly)
        peak, total, mixed = _look_back(
            queries, page_row, whole, partly, end, positions, window, peak, total, mixed, scales,
            keys, values, key_exponents, value_exponents, head, dims, K, D, DP, BLOCK, False, WINDOWED, CODES, NATIVE,
        )  # fmt: skip
        peak, total, mixed = _look_back(
            queries, page_row, partly, end, end, positions, window, peak, total, mixed, scales,
            keys, values, key_exponents, value_exponents, head, dims, K, D, DP, BLOCK, True, WINDOWED, CODES, NATIVE,
        )  # fmt: skip
        total = tl.where(own_rows < new, total, 1.0)  # rows beyond the last may have seen nothing
        at = out + token_ids[:, None] * (K * G * D) + heads[:, None] * D + dims[None, :]
        tl.store(at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)


def prefill_blocks(dtype: torch.dtype, dim: int, shared: int) -> Blocks:
    most = Blocks(32, 32, 8, 1) if dtype == torch.float32 else Blocks(128, 64, 8, 3)
    return _fitting(most, dtype, dim, shared)


def prefill(
    q: Tensor, out: Tensor, kv_cache: KVCache, layer: int, layout: Layout, window: int | None,
    blocks: Blocks | None = None,
) -> None:  # fmt: skip
    """q [M, H, D], the new tokens that are not decoding, whose keys and values are in the store -> out [M, H, D].

    Each sees its own sequence up to itself, or the last `window` tokens of that. `blocks` is for measurements.
    """
    assert layout.starts is not None
    tokens, heads, dim = q.shape
    sequences, (_, shared, native) = len(layout.starts) - 1, card(q.device)
    store = kv_cache.layer(layer)
    kv_heads = store.keys.shape[1]
    group = heads // kv_heads
    rows, keys, warps, stages = blocks or prefill_blocks(q.dtype, dim, shared)
    chained = chains(q.device)
    _prefill[(kv_heads, tokens * group // rows + sequences)](
        q, out, *store, layout.page_table, layout.prefill_rows, layout.before, layout.starts, sequences,
        LOG2_E / dim**0.5, window or 0, q.stride(0), layout.page_table.stride(0),
        K=kv_heads, G=group, D=dim, DP=_power(dim), ROWS=rows, BLOCK=keys,
        WINDOWED=window is not None, CODES=store.key_exponents is not None, NATIVE=native, CHAINED=chained,
        num_warps=warps, num_stages=stages, launch_pdl=chained,
    )  # fmt: skip


def _power(size: int) -> int:
    """What `tl.dot` takes for a side of this size: a power of two, from 16 on."""
    return max(16, triton.next_power_of_2(size))


def _fitting(blocks: Blocks, dtype: torch.dtype, dim: int, shared: int) -> Blocks:
    """The same with fewer loads under way, then fewer keys, until one program's tiles fit `shared` bytes."""
    row = _power(dim) * dtype.itemsize
    while row * (blocks.rows + 2 * blocks.keys * blocks.stages) > shared and blocks.keys > 16:
        if blocks.stages > 2:
            blocks = blocks._replace(stages=blocks.stages - 1)
        else:
            blocks = blocks._replace(keys=blocks.keys // 2)
    return blocks
