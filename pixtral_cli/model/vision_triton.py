"""Attention within images on a card, in Triton: each patch sees the patches of its image (FlashAttention-2, Dao 2023).

One launch for images of any sizes: nothing is planned or compiled anew for a size that was not there before. Import it
after `triton_support.available`. Letters: N patches of all images, H heads, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixtral_cli.model.fused_triton import begin
from pixtral_cli.model.triton_support import chains

LOG2_E = 1.4426950408889634
DIMS = (16, 32, 64, 128)
"""Of a head, that the kernel takes."""


class Blocks(NamedTuple):
    """Patches that one program mixes for, and those that it looks at in a step of its loop."""

    rows: int = 128
    keys: int = 64
    warps: int = 4
    stages: int = 3


@triton.jit
def _step(queries, k, v, left, best, total, mixed, scale, keys: tl.constexpr, last: tl.constexpr):
    """Look at `keys` patches, of which only the `last` step's may be fewer: `left`."""
    if last:
        inside = tl.arange(0, keys) < left
        scores = tl.dot(queries, tl.load(k, mask=inside[None], other=0), input_precision="ieee")
        scores = tl.where(inside[None], scores, float("-inf"))
        values = tl.load(v, mask=inside[:, None], other=0)
    else:
        scores = tl.dot(queries, tl.load(k), input_precision="ieee")
        values = tl.load(v)
    higher = tl.maximum(best, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(best - higher)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, 1), mixed


@triton.jit
def _within(
    q, k, v, out, starts, q_token, k_token, v_token, q_head, k_head, v_head, scale,
    heads: tl.constexpr, dim: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr, stages: tl.constexpr,
    chained: tl.constexpr,
):  # fmt: skip
    """A program mixes for `rows` patches of one image and head; those beyond the image have nothing to do."""
    begin(chained)
    first, head, image = tl.program_id(0) * rows, tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + image).to(tl.int64)
    length = (tl.load(starts + image + 1) - start).to(tl.int32)
    if first < length:
        row, key, column = tl.arange(0, rows), tl.arange(0, keys), tl.arange(0, dim)
        inside = (first + row < length)[:, None]
        mine = q + (start + first) * q_token + head * q_head
        queries = tl.load(mine + row[:, None] * q_token + column[None], mask=inside, other=0)
        k_place = k + start * k_token + head * k_head + key[None] * k_token + column[:, None]
        v_place = v + start * v_token + head * v_head + key[:, None] * v_token + column[None]
        best, total = tl.full((rows,), float("-inf"), tl.float32), tl.zeros((rows,), tl.float32)
        mixed = tl.zeros((rows, dim), tl.float32)
        whole = length // keys
        for _ in tl.range(0, whole, num_stages=stages):
            best, total, mixed = _step(queries, k_place, v_place, keys, best, total, mixed, scale, keys, False)
            k_place += keys * k_token
            v_place += keys * v_token
        left = length - whole * keys
        if left > 0:
            best, total, mixed = _step(queries, k_place, v_place, left, best, total, mixed, scale, keys, True)
        place = out + ((start + first + row[:, None]) * heads + head) * dim + column[None]
        tl.store(place, mixed / total[:, None], mask=inside)


def attend_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    blocks: Blocks = Blocks(),  # noqa: B008
) -> Tensor:
    """q, k, v [N, H, D], heads may be strided -> [N, H, D].

    `starts`, integers on the card, tell where each image begins and where the last one ends; `longest` is the most
    patches of an image.
    """
    _, heads, dim = q.shape
    assert dim in DIMS and q.stride(2) == k.stride(2) == v.stride(2) == 1, (dim, q.stride(), k.stride(), v.stride())
    out, chained = torch.empty(q.shape, dtype=q.dtype, device=q.device), chains(q.device)
    if longest:
        _within[triton.cdiv(longest, blocks.rows), heads, len(starts) - 1](
            q, k, v, out, starts, q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1),
            dim**-0.5 * LOG2_E, heads, dim, blocks.rows, blocks.keys, blocks.stages, chained,
            num_warps=blocks.warps, launch_pdl=chained,
        )  # fmt: skip
    return out
