"""Queries, keys and values in, mixed values out. Knows no weights, no cache and no positions.

Letters: N new tokens, L tokens to attend to, H query heads, K key-value heads, G = H / K, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MakeMask = Callable[[int, int, int | None, torch.device], Tensor]


class Attend(Protocol):
    """How the flattened tokens of one forward pass see each other: the caller's choice, layer by layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, D], k and v [N, K, D], rotated -> [N, H, D]."""
        ...


class AttendWithin:
    """Attention without order inside each segment: a picture's patches see their own picture only."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([_bidirectional(*part) for part in parts])


def _bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, N, D]
    return scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, mask_of: MakeMask) -> Tensor:
    """The last N of L tokens look back: q [N, H, D], k and v [K, L, D] -> [N, H, D].

    `window` counts the tokens that one token sees, itself included; None is all of them. `mask_of` is `causal_mask`,
    or remembers what it made.
    """
    if q.shape[0] == 1:
        return _one_query(q, k, v, window)
    n, length = q.shape[0], k.shape[1]
    if window is not None and length > n + window - 1:  # keys that no query of ours can see
        k, v = k[:, -(n + window - 1) :], v[:, -(n + window - 1) :]
        length = k.shape[1]
    q, k, v = q.transpose(0, 1)[None], k[None], v[None]  # [1, H, N, D], [1, K, L, D]
    whole = n == length and (window is None or length <= window)
    mask = None if whole else mask_of(n, length, window, q.device)
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=True)
    return mixed[0].transpose(0, 1)


def _one_query(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One token: the G heads that share a key head become G rows of one query, 7 to 13 times cheaper."""
    if window is not None:
        k, v = k[:, -window:], v[:, -window:]
    kv_heads, _, dim = k.shape
    folded = q.view(1, kv_heads, -1, dim)  # [1, K, G, D]
    return scaled_dot_product_attention(folded, k[None], v[None]).view(1, -1, dim)


def causal_mask(n: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [N, L], True where query i (token L - N + i) sees key j."""
    query = torch.arange(length - n, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
