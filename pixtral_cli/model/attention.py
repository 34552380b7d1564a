"""Attention: how the flattened tokens of one pass see each other. q, k, v in, mixed values out; knows no weights.

Letters: N new tokens or patches, L tokens to attend to, H query heads, K key-value heads, G = H / K, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.kv_cache import PAGE, KVCache, Layout, pages_for

MakeMask = Callable[[int, int, int | None, torch.device], Tensor]


@dataclass(frozen=True)
class Span:
    """Of a sequence that lies in `pages`, `tokens` new tokens after `before` tokens that are in the cache."""

    pages: Sequence[int]
    before: int
    tokens: int

    @property
    def new_slots(self) -> list[int]:
        return [self.pages[t // PAGE] * PAGE + t % PAGE for t in range(self.before, self.before + self.tokens)]

    def all_slots(self, device: torch.device) -> slice | Tensor:
        """Where everything up to the last new token lies: a slice if the pages follow each other."""
        length = self.before + self.tokens
        pages = self.pages[: pages_for(length)]
        first = pages[0] * PAGE
        if all(page == pages[0] + place for place, page in enumerate(pages)):
            return slice(first, first + length)
        starts = torch.tensor(pages, device=device)[:, None] * PAGE
        return (starts + torch.arange(PAGE, device=device)).flatten()[:length]


class AttendPaged:
    """Attention for the flattened new tokens of several sequences: one Span each, in order."""

    def __init__(self, config: TextConfig, kv_cache: KVCache, spans: Sequence[Span], device: torch.device) -> None:
        self._windows = config.sliding_windows
        self._kv_cache = kv_cache
        self._lengths = [span.tokens for span in spans]
        self._new = torch.tensor([slot for span in spans for slot in span.new_slots], device=device)
        self._all = [span.all_slots(device) for span in spans]
        self._mask = cache(causal_mask)  # the same for all layers

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, D], k and v [N, K, D] -> [N, H, D]. Rows of q beyond the spans' tokens are padding: zeros."""
        tokens = len(self._new)
        self._kv_cache.write(layer, self._new, k[:tokens], v[:tokens])
        mixed = [
            causal_attention(queries, *self._kv_cache.read(layer, where), self._windows[layer], self._mask)
            for queries, where in zip(q[:tokens].split(self._lengths), self._all, strict=True)
        ]
        if tokens < len(q):
            mixed.append(q.new_zeros(q[tokens:].shape))
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


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
    return scaled_dot_product_attention(folded, k[None], v[None]).reshape(1, -1, dim)


def causal_mask(n: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [N, L], True where query i (token L - N + i) sees key j."""
    query = torch.arange(length - n, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def attend_within(lengths: list[int], layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without order inside each segment: an image's patches see their own image only. q, k, v [N, H, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, N, D]
    segments = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([scaled_dot_product_attention(*segment)[0].transpose(0, 1) for segment in segments])


class AttendOnCard:
    """Attention for one step's new tokens on a CUDA device, without waiting for it: see `Layout`.

    May be captured in a graph and replayed with other numbers in the layout's tensors. A graph does not keep the
    memory that this has taken before: make this inside the capture, or keep it as long as the graph.
    """

    def __init__(self, config: TextConfig, kv_cache: KVCache, layout: Layout) -> None:
        from pixtral_cli.model import paged_attention  # needs Triton

        self._kernels = paged_attention
        self._windows = config.sliding_windows
        self._kv_cache = kv_cache
        self._layout = layout
        sizes = config.num_heads, config.num_kv_heads, config.head_dim
        self._scratch = paged_attention.scratch(*sizes, layout.positions.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, D], k and v [N, K, D], whose rows may lie apart -> [N, H, D]."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        store, window = (self._kv_cache, layer, self._layout), self._windows[layer]
        (q, new_q), (k, new_k), (v, new_v), (decoded, mixed) = (
            (x[: self._layout.decoding], x[self._layout.decoding :]) for x in (q, k, v, out)
        )
        if len(q):
            if self._layout.successive:  # each sees those before it, which `decode` may write later
                self._kernels.write(k, v, *store, first=0)
            self._kernels.decode(q, k, v, decoded, *store, window, self._scratch)
        if len(new_q):
            self._kernels.write(new_k, new_v, *store, first=self._layout.decoding)
            self._kernels.prefill(new_q, mixed, *store, window)
        return out
