"""The keys and values of many sequences, in pages of one store, and the attention that reads and extends them.

A sequence's token number t lies in slot `pages[t // PAGE] * PAGE + t % PAGE`. Which page belongs to whom is for others
to know. Letters: N tokens of one forward pass, S layers, T slots, K key-value heads, D head_dim, L tokens to attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.layers import causal_attention, causal_mask

PAGE = 16  # tokens: what two prompts share is found in steps of this


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


class KVCache:
    """Room for `pages` pages of keys and values, [2, S, T, K, D].

    On a CPU memory is taken as pages are first written, not before. With Pixtral-12B in bfloat16 (40 layers, 8 heads
    of 128) a token takes 160 KiB and a page 2.5 MiB.
    """

    def __init__(self, config: TextConfig, dtype: torch.dtype, device: torch.device, pages: int) -> None:
        shape = (2, config.num_layers, pages * PAGE, config.num_kv_heads, config.head_dim)
        self._store = torch.empty(shape, dtype=dtype, device=device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [N, K, D] into `slots` [N]."""
        self._store[0, layer].index_copy_(0, slots, k)
        self._store[1, layer].index_copy_(0, slots, v)

    def read(self, layer: int, where: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [K, L, D] of the L slots `where`: views of a slice, copies of others."""
        keys, values = (
            each[where] if isinstance(where, slice) else each.index_select(0, where) for each in self._store[:, layer]
        )
        return keys.transpose(0, 1), values.transpose(0, 1)


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
