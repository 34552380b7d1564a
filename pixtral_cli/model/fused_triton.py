"""Triton's forms of `fused`: computed in float32 and rounded once. Import it after `triton_support.available`.

Letters: N tokens, C hidden_size, H query heads, K key-value heads, D head_dim, F intermediate_size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixtral_cli.model.triton_chaining import begin
from pixtral_cli.model.triton_support import chains

HEADS = 8  # of one token, that a program rotates
COLUMNS = 1024  # of one token, that a program gates


@triton.jit
def _add_norm(
    x, delta, weight, total, normed, width, epsilon, adds: tl.constexpr, columns: tl.constexpr, chained: tl.constexpr
):
    column = tl.arange(0, columns)
    inside = column < width
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    begin(chained)
    here = tl.program_id(0).to(tl.int64) * width + column
    value = tl.load(x + here, mask=inside, other=0).to(tl.float32)
    if adds:
        rounded = (value + tl.load(delta + here, mask=inside, other=0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + here, rounded, mask=inside)
        value = rounded.to(tl.float32)
    size = tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    tl.store(normed + here, value * size * scale, mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x and delta [N, C] -> (x + delta, rounded; RMSNorm of that), each [N, C]; without `delta` of x itself."""
    x, adds = x.contiguous(), delta is not None
    delta = x if delta is None else delta.contiguous()
    total, normed = (torch.empty_like(x) if adds else x), torch.empty_like(x)
    rows, width = x.shape
    if rows:
        columns, chained = triton.next_power_of_2(width), chains(x.device)
        warps = max(1, min(16, columns // 256))
        _add_norm[(rows,)](
            x, delta, weight, total, normed, width, epsilon, adds, columns, chained,
            num_warps=warps, launch_pdl=chained,
        )  # fmt: skip
    return total, normed


@triton.jit
def _rotate(
    q, k, cos, sin, scales, q_token, q_head, k_token, k_head, q_heads, k_heads, half,
    scaled: tl.constexpr, heads: tl.constexpr, columns: tl.constexpr, chained: tl.constexpr,
):  # fmt: skip
    begin(chained)
    token, part, q_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.cdiv(q_heads, heads)
    of_q = part < q_parts
    base = tl.where(of_q, q + token * q_token, k + token * k_token)
    head = tl.where(of_q, part, part - q_parts) * heads + tl.arange(0, heads)
    count, stride, column = tl.where(of_q, q_heads, k_heads), tl.where(of_q, q_head, k_head), tl.arange(0, columns)
    inside = (head < count)[:, None] & (column < half)[None]
    place = base + head[:, None] * stride + column[None]
    left, right = tl.load(place, mask=inside).to(tl.float32), tl.load(place + half, mask=inside).to(tl.float32)
    angle = token * 2 * half + column
    c = tl.load(cos + angle, mask=column < half).to(tl.float32)[None]
    s = tl.load(sin + angle, mask=column < half).to(tl.float32)[None]
    left, right = left * c - right * s, right * c + left * s
    if scaled:
        scale = tl.where(of_q, tl.load(scales + token).to(tl.float32), 1.0)
        left, right = left * scale, right * scale
    tl.store(place, left, mask=inside)
    tl.store(place + half, right, mask=inside)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [N, H, D] and k [N, K, D], in place, by (cos, sin) [N, 1, D], whose halves are alike, and q times `scales`
    [N, 1, 1]; heads may be strided."""
    assert q.stride(2) == k.stride(2) == 1 and cos.is_contiguous() and sin.is_contiguous()
    assert scales is None or scales.is_contiguous()
    (rows, q_heads, dim), k_heads = q.shape, k.shape[1]
    if rows:
        parts, chained = triton.cdiv(q_heads, HEADS) + triton.cdiv(k_heads, HEADS), chains(q.device)
        _rotate[rows, parts](
            q, k, cos, sin, cos if scales is None else scales, *q.stride()[:2], *k.stride()[:2], q_heads, k_heads,
            dim // 2, scales is not None, HEADS, triton.next_power_of_2(dim // 2), chained,
            num_warps=2, launch_pdl=chained,
        )  # fmt: skip
    return q, k


@triton.jit
def _silu_mul(gate_up, out, width, columns: tl.constexpr, chained: tl.constexpr):
    begin(chained)
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * columns + tl.arange(0, columns)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside).to(tl.float32)
    tl.store(out + row * width + column, gate / (1 + tl.exp(-gate)) * up, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up of [N, 2 F] -> [N, F]."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        chained = chains(out.device)
        _silu_mul[rows, triton.cdiv(width, COLUMNS)](gate_up, out, width, COLUMNS, chained, launch_pdl=chained)
    return out
