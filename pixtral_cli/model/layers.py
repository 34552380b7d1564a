"""The layers that decoder and vision tower are made of. Flattened tokens in and out.

Letters: N tokens or patches, C hidden_size, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from pixtral_cli.model.attention import Attend, Rotary, rotate


class SelfAttention(nn.Module):
    """Grouped-query attention; head_dim is its own number, not hidden_size / heads (5120 / 32 in NeMo)."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, index: int) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))  # [N, H or K, D]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attend(index, rotate(q, *rotary), rotate(k, *rotary), v)
        return self.o_proj(mixed.flatten(1))


class GatedFeedForward(nn.Module):
    """down(SiLU(gate(x)) * up(x)), Shazeer 2020."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Embedding(nn.Module):
    """A table [V, C]. torch's own fills itself at random even without memory, which imports its compiler (1 s)."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [N] -> [N, C]."""
        return embedding(token_ids, self.weight)
