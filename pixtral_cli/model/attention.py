"""Attention: how the flattened tokens of one pass see each other. q, k, v in, mixed values out; knows no weights.

Letters: N new tokens or patches, L tokens to attend to, H query heads, K key-value heads, G = H / K, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pixtral_cli.model import native_ops
from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.kv_cache import PAGE, KVCache, Layout, pages_for
from pixtral_cli.model.native_ops import PagesOf

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


class Ends(NamedTuple):
    """What the library needs of a pass of tokens that are each the last of a sequence as it grows."""

    slots: Tensor
    """int64 [tokens]: where their keys and values go"""
    pages: PagesOf
    store: tuple[int, int, int]
    """As `KVCache.addresses`."""


class AttendPaged:
    """Attention for the flattened new tokens of several sequences: one Span each, in order.

    A span of one token gets the same bits whatever other spans are there.
    """

    def __init__(self, config: TextConfig, kv_cache: KVCache, spans: Sequence[Span], device: torch.device) -> None:
        self._windows = config.sliding_windows
        self._kv_cache = kv_cache
        self._new = torch.tensor([slot for span in spans for slot in span.new_slots], device=device)
        self._runs = list(_runs(spans))
        self._mask = cache(causal_mask)  # the same for all layers

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, D], k and v [N, K, D] -> [N, H, D]. Rows of q beyond the spans' tokens are padding: zeros."""
        tokens = self._new.shape[0]
        if tokens < q.shape[0]:
            k, v = k[:tokens], v[:tokens]
        self._kv_cache.write(layer, self._new, k, v)
        mixed = q.new_empty(q.shape)
        if tokens < q.shape[0]:
            mixed[tokens:] = 0
        store, window = self._kv_cache.layer(layer), self._windows[layer]
        natively = store.key_exponents is None and native_ops.take(q, store.keys) and native_ops.attends(*q.shape[1:])
        for run in self._runs:
            queries, out = (x if run.end == run.first + x.shape[0] else x[run.first : run.end] for x in (q, mixed))
            if natively and run.single:
                native_ops.attend_one(queries, store.keys, store.values, out, run.pages, window)
            elif natively and native_ops.takes_blocks(q):
                native_ops.attend_block(queries, store.keys, store.values, out, run.pages, run.spans[0].before, window)
            else:
                self._attend_each(layer, run, queries, out)
        return mixed

    @property
    def ends(self) -> Ends | None:
        """Of a pass in which every span is one token, on a CPU with keys and values as they are; else None."""
        store = self._kv_cache.addresses
        if store is None or len(self._runs) != 1 or not self._runs[0].single:
            return None
        return Ends(self._new, self._runs[0].pages, store)

    def _attend_each(self, layer: int, run: _Run, q: Tensor, out: Tensor) -> None:
        """Span by span, by torch; the keys and values of pages that lie apart are copied."""
        lengths = [span.tokens for span in run.spans]
        for span, queries, mixed in zip(run.spans, q.split(lengths), out.split(lengths), strict=True):
            keys, values = self._kv_cache.read(layer, span.all_slots(q.device))
            mixed.copy_(causal_attention(queries, keys, values, self._windows[layer], self._mask))


@dataclass(frozen=True)
class _Run:
    """Spans beside each other that are computed in one call: those of one token together, any other by itself."""

    spans: Sequence[Span]
    first: int
    """The row of their first token."""

    @property
    def single(self) -> bool:
        return self.spans[0].tokens == 1

    @cached_property
    def end(self) -> int:
        return self.first + sum(span.tokens for span in self.spans)

    @cached_property
    def pages(self) -> PagesOf:
        return PagesOf([(span.pages, span.before + span.tokens) for span in self.spans])


def _runs(spans: Sequence[Span]) -> Iterator[_Run]:
    row = 0
    for single, group in groupby(spans, lambda span: span.tokens == 1):
        together = list(group)
        for each in [together] if single else [[span] for span in together]:
            run = _Run(each, row)
            yield run
            row = run.end


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
    mixed = q.new_empty(q.shape)
    natively = native_ops.take(q, k, v) and native_ops.takes_blocks(q)
    for queries, keys, values, out in zip(*(x.split(lengths) for x in (q, k, v, mixed)), strict=True):
        if natively:
            native_ops.attend_block(queries, keys, values, out, causal=False)
        else:
            batched = (x.transpose(0, 1)[None] for x in (queries, keys, values))  # [1, H, N, D]
            out.copy_(scaled_dot_product_attention(*batched)[0].transpose(0, 1))
    return mixed


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
