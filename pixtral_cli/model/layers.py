"""The layers that decoder and vision tower are made of. Flattened tokens in and out; how they see each other is an
`Attend`, which the caller brings.

Letters: N new tokens or patches, C hidden_size, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from pixtral_cli.model.fused import gated, rotate, silu_mul
from pixtral_cli.model.rotary import Rotary

ROWS_AT_ONCE = 1024
"""Of a feed-forward layer on a CPU: what is between its matrices then stays in the cache, and in memory that is used
again. Large fresh memory costs an eighth of such a layer."""


class Attend(Protocol):
    """How the flattened tokens of one forward pass see each other: the caller's choice, layer by layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, H, D], k and v [N, K, D], rotated -> [N, H, D]."""
        ...


class SelfAttention(nn.Module):
    """Grouped-query attention; head_dim is its own number, not hidden_size / heads (5120 / 32 in NeMo).

    `qkv_proj` is q_proj, k_proj and v_proj in one matrix, for a card; None where each multiplies by itself.
    """

    qkv_proj: nn.Module | None

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.register_module("qkv_proj", None)
        self._heads = [num_heads, num_kv_heads, num_kv_heads]

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, index: int) -> Tensor:
        """x [N, C] -> what attention adds to it [N, C]."""
        q, k, v = self._project(x)
        q, k = rotate(q, k, *rotary)
        return self.o_proj(attend(index, q, k, v).flatten(1))

    def _project(self, x: Tensor) -> Iterable[Tensor]:
        """x [N, C] -> q [N, H, D], k and v [N, K, D]."""
        if self.qkv_proj is not None:
            return self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(self._heads, dim=1)
        return (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))


class GatedFeedForward(nn.Module):
    """down(SiLU(gate(x)) * up(x)), Shazeer 2020.

    `gate_up_proj` is gate_proj and up_proj in one matrix, for a card; None where each multiplies by itself.
    """

    gate_up_proj: nn.Module | None

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.register_module("gate_up_proj", None)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] -> what the feed-forward layer adds to it [N, C]."""
        if x.is_cpu and x.shape[0] > ROWS_AT_ONCE:
            return torch.cat([self._added(rows) for rows in x.split(ROWS_AT_ONCE)])
        return self._added(x)

    def _added(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is not None:
            return self.down_proj(silu_mul(self.gate_up_proj(x)))
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Embedding(nn.Module):
    """A table [V, C]. torch's own fills itself at random even without memory, which imports its compiler (1 s)."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [N] -> [N, C]."""
        return embedding(token_ids, self.weight)
