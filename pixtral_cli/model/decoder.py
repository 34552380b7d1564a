"""Embedded tokens in, hidden states out: the Mistral decoder. Knows no cache and no batch.

Tokens of all sequences come flattened; `attend` decides who sees whom. Letters: N tokens, C hidden_size,
H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from pixtral_cli.model.attention import Attend
from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.layers import Embedding, GatedFeedForward, SelfAttention
from pixtral_cli.model.rope import rotation, text_angles


class Decoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """x [N, C] and integer positions [N], each within its own sequence -> normed hidden states [N, C]."""
        turn = rotation(text_angles(positions, self.config.head_dim, self.config.rope_theta), x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, attend, index)
        return self.norm(x)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedFeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend, index: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, attend, index)
        return x + self.mlp(self.post_attention_layernorm(x))
