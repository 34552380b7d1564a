"""The keys and values of many sequences, in pages of one store.

A sequence's token number t lies in slot `pages[t // PAGE] * PAGE + t % PAGE`. Which page belongs to whom is for others
to know. Letters: N tokens of one forward pass, S layers, T slots, K key-value heads, D head_dim, L tokens to read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixtral_cli.model.config import TextConfig

PAGE = 16  # tokens: what two prompts share is found in steps of this


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


class KVCache:
    """Room for `pages` pages of keys and values, [2, S, T, K, D].

    On a CPU memory is taken as pages are first written, not before. With Pixtral-12B in bfloat16 (40 layers, 8 heads
    of 128) a token takes 160 KiB and a page 2.5 MiB.
    """

    def __init__(
        self, config: TextConfig, dtype: torch.dtype, device: torch.device, pages: int, kv_cache_dtype: str = "auto"
    ) -> None:
        if kv_cache_dtype != "auto":
            raise NotImplementedError(kv_cache_dtype)
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
