"""The small operations of native/ops.c and native/attention.c, for tensors on a CPU: computed in float32 and rounded
once. A row's bits do not depend on the rows beside it. Knows no layers; `fused` and `attention` decide who comes here.

Letters: N new tokens or patches, C hidden_size, H query heads, K key-value heads, G = H / K, D head_dim, F
intermediate_size.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pixtral_cli.model.kernels import native

TYPES = {torch.float32: 0, torch.bfloat16: 30}
"""As `enum encoding` in native.h."""
MOST_DIM, MOST_HEADS = 256, 192
"""Of attention, as in ops.h."""
POINTER, NUMBER, FEW, REAL = c_void_p, c_long, c_int, c_float
ARGUMENTS = {
    "add_norm": (FEW, *[POINTER] * 5, *[NUMBER] * 2, REAL, FEW),
    "rotate": (FEW, *[POINTER] * 4, *[NUMBER] * 8, FEW),
    "silu_mul": (FEW, *[POINTER] * 3, *[NUMBER] * 4, FEW),
    "write": (*[POINTER] * 5, *[NUMBER] * 4, FEW),
    "attend_one": (FEW, *[POINTER] * 7, *[NUMBER] * 8, FEW),
    "attend_block": (*[POINTER] * 5, *[NUMBER] * 10, FEW, FEW),
}
"""Of the functions in C, which stand in ops.c and attention.c with their names."""


def take(*tensors: Tensor) -> bool:
    """Whether the library is here, and the tensors are of one dtype that it knows, on a CPU and not being trained."""
    dtype, trained = tensors[0].dtype, torch.is_grad_enabled()
    for x in tensors:  # asked several times a layer: a loop takes half the time of `all`
        if x.dtype != dtype or not x.is_cpu or (trained and x.requires_grad):
            return False
    return dtype in TYPES and native.available()


@cache
def _function(name: str) -> Callable[..., Any]:
    return native.function(f"pixtral_{name}", *ARGUMENTS[name])


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x and delta [N, C] -> (x + delta, rounded; RMSNorm of that), each [N, C]; without `delta` of x itself."""
    x = x.contiguous()
    normed, total, added = torch.empty_like(x), x, None
    if delta is not None:
        total, added = torch.empty_like(x), delta.contiguous()
    _function("add_norm")(
        TYPES[x.dtype], x.data_ptr(), None if added is None else added.data_ptr(), weight.data_ptr(), total.data_ptr(),
        normed.data_ptr(), *x.shape, epsilon, native.threads(),
    )  # fmt: skip
    return total, normed


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [N, H, D] and k [N, K, D], in place, by (cos, sin) [N, 1, D], whose halves are alike; heads may be strided."""
    assert q.stride(2) == k.stride(2) == 1 and cos.is_contiguous() and sin.is_contiguous()
    rows, heads, dim = q.shape
    _function("rotate")(
        TYPES[q.dtype], q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, heads, k.shape[1], dim,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), native.threads(),
    )  # fmt: skip
    return q, k


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up [N, F]; rows may lie apart."""
    assert gate.stride(1) == up.stride(1) == 1
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _function("silu_mul")(
        TYPES[gate.dtype], gate.data_ptr(), up.data_ptr(), out.data_ptr(), *gate.shape, gate.stride(0), up.stride(0),
        native.threads(),
    )  # fmt: skip
    return out


def write(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Put k and v [N, K, D], of any dtype, whose rows may lie apart, into `slots` [N] of keys and values [T, K, D]."""
    assert k.stride()[1:] == v.stride()[1:] == keys.stride()[1:]
    size = k.element_size()
    _function("write")(
        keys.data_ptr(), values.data_ptr(), slots.data_ptr(), k.data_ptr(), v.data_ptr(), k.shape[0],
        keys.stride(0) * size, k.stride(0) * size, v.stride(0) * size, native.threads(),
    )  # fmt: skip


def attends(heads: int, dim: int) -> bool:
    """Whether attention is computed for so many query heads of that size: their scores lie on a thread's stack."""
    return heads <= MOST_HEADS and dim <= MOST_DIM


class PagesOf:
    """Where the tokens of N sequences lie, told to the library: made once for all layers of a pass."""

    def __init__(self, sequences: Sequence[tuple[Sequence[int], int]]) -> None:
        """The pages of each sequence, and how many tokens it has, the new ones among them."""
        pages, starts = array("i"), array("q")
        for of_one, _ in sequences:
            starts.append(len(pages))
            pages.extend(of_one)
        self._arrays = pages, starts, array("q", [length for _, length in sequences])
        self.pages, self.starts, self.lengths = (part.buffer_info()[0] for part in self._arrays)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, pages: PagesOf, window: int | None) -> None:
    """The last token of each of N sequences looks back: q [N, H, D] -> out [N, H, D], keys and values [T, K, D]."""
    rows, heads, dim = q.shape
    kv_heads = keys.shape[1]
    assert attends(heads, dim), (heads, dim)
    assert q.stride(1) == dim and q.stride(2) == keys.stride(2) == 1 and keys.stride() == values.stride()
    assert out.is_contiguous()
    _function("attend_one")(
        TYPES[q.dtype], q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), pages.pages, pages.starts,
        pages.lengths, rows, kv_heads, heads // kv_heads, dim, q.stride(0), keys.stride(0), keys.stride(1), window or 0,
        native.threads(),
    )  # fmt: skip


def takes_blocks(q: Tensor) -> bool:
    """Whether `attend_block` computes with such queries [N, H, D] on this processor."""
    _, heads, dim = q.shape
    return attends(heads, dim) and dim % 2 == 0 and q.dtype == torch.bfloat16 and native.instructions() == "avx512bf16"


def attend_block(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    pages: PagesOf | None = None,
    before: int = 0,
    window: int | None = None,
    causal: bool = True,
) -> None:
    """The last N tokens of a sequence, `before` tokens before them, look back (or, not `causal`, at all of them):
    q [N, H, D] -> out [N, H, D]. Its tokens lie in `pages` of keys and values [T, K, D], or one after the other."""
    tokens, heads, dim = q.shape
    kv_heads = keys.shape[1]
    assert q.stride(2) == keys.stride(2) == 1 and keys.stride() == values.stride() and out.is_contiguous()
    _function("attend_block")(
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), None if pages is None else pages.pages,
        tokens, before, kv_heads, heads // kv_heads, dim, q.stride(0), q.stride(1), keys.stride(0), keys.stride(1),
        window or 0, causal, native.threads(),
    )  # fmt: skip
