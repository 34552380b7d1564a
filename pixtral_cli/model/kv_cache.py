"""The keys and values that a sequence has computed, and the attention that reads and extends them.

Letters: N tokens of one forward pass, S layers, K key-value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pixtral_cli.model.attention import causal_attention, causal_mask
from pixtral_cli.model.config import TextConfig

STEP = 256  # tokens; capacity is a multiple of this


class KVCache:
    """One sequence's keys and values, [2, S, K, capacity, D]; it grows with the sequence, half again each time, up to
    `max_length` tokens.

    With Pixtral-12B in bfloat16 (40 layers, 8 heads of 128) a token takes 160 KiB and the first 256 take 40 MiB.
    """

    def __init__(self, config: TextConfig, dtype: torch.dtype, device: torch.device, max_length: int) -> None:
        self.length = 0
        self.max_length = max_length
        self._store = torch.empty(
            (2, config.num_layers, config.num_kv_heads, 0, config.head_dim), dtype=dtype, device=device
        )

    @property
    def capacity(self) -> int:
        return self._store.shape[3]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more than `length`."""
        need = self.length + tokens
        if need <= self.capacity:
            return
        assert need <= self.max_length, (need, self.max_length)
        capacity = min(rounded_up(max(need, self.capacity * 3 // 2)), self.max_length)
        old, shape = self._store, list(self._store.shape)
        shape[3] = capacity
        self._store = old.new_empty(shape)
        self._store[:, :, :, : self.length] = old[:, :, :, : self.length]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v [N, K, D] behind what is there -> views of all keys and values, [K, length + N, D]."""
        end = self.length + k.shape[0]
        keys, values = self._store[0, layer, :, :end], self._store[1, layer, :, :end]
        keys[:, self.length :] = k.transpose(0, 1)
        values[:, self.length :] = v.transpose(0, 1)
        return keys, values


def rounded_up(tokens: int) -> int:
    """The capacity that a sequence of `tokens` begins with."""
    return -(-tokens // STEP) * STEP


@dataclass
class AttendCached:
    """Attention for flattened pieces of several sequences: (cache, number of new tokens) each, in order."""

    config: TextConfig
    pieces: list[tuple[KVCache, int]]

    def __enter__(self) -> AttendCached:
        self._mask = cache(causal_mask)  # the same for all layers
        for kv, tokens in self.pieces:
            kv.reserve(tokens)
        return self

    def __exit__(self, failure: type | None, *_: object) -> None:
        """The new tokens count only once every layer has written them."""
        if failure is None:
            for kv, tokens in self.pieces:
                kv.length += tokens

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = [tokens for _, tokens in self.pieces]
        window = self.config.sliding_windows[layer]
        mixed = [
            causal_attention(q_piece, *kv.write(layer, k_piece, v_piece), window, self._mask)
            for (kv, _), q_piece, k_piece, v_piece in zip(
                self.pieces, q.split(lengths), k.split(lengths), v.split(lengths), strict=True
            )
        ]
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]
