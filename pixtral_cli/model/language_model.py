"""Token ids in, logits out: Mistral's decoder, its table of embeddings and its head. Knows no cache, no batch and no
images but their features.

Parameter names are ours (weights_cache.names maps every checkpoint's to them). Tokens of all sequences come flattened;
`attend` decides who sees whom. Letters: N tokens, M image tokens among them, C hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pixtral_cli.model.config import ModelConfig, TextConfig
from pixtral_cli.model.fused import add_norm
from pixtral_cli.model.kernels import KernelLinear
from pixtral_cli.model.kernels.cpu_rows import CpuRowsKernel
from pixtral_cli.model.layers import Attend, Embedding, GatedFeedForward, SelfAttention
from pixtral_cli.model.rotary import Rotary, text_rotary

Layers = Callable[[Tensor, Rotary, Attend], tuple[Tensor, Tensor] | None]
"""Rows x [N, C] -> the residual and what is to be added to it after all layers; None for what it does not take."""


class LanguageModel(nn.Module):
    """A model of text; `families` has those that see.

    `unread` are beginnings of names of tensors that a checkpoint may hold, and that nothing here computes with.
    """

    unread: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = Decoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        matrices = (layer for layer in self.language_model.modules() if isinstance(layer, nn.Linear))
        self.multiplications_per_token = sum(matrix.weight.numel() for matrix in matrices)  # without the head's

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.norm.weight.device

    @property
    def rows_stand_alone(self) -> bool:
        """Whether the bits of a token's numbers do not depend on the tokens beside it in a pass of few: where the
        library in C multiplies with every matrix. Of torch's products they may."""
        parts = (*self.language_model.modules(), self.lm_head)
        layers = (part for part in parts if isinstance(part, nn.Linear | KernelLinear))
        return all(isinstance(layer, KernelLinear) and isinstance(layer.kernel, CpuRowsKernel) for layer in layers)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """One image, normalised pixels [channels, height, width] -> features [M, C] for its image tokens."""
        return self.encode_images([pixels])[0]

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images as `encode_image` takes them -> the features of each. On a CPU they do not depend on each other."""
        raise NotImplementedError("a text model has no vision tower")

    def embed(self, token_ids: Tensor, features: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """token_ids [N] -> [N, C]; `features` [M, C] replace the M image tokens among them, in order.

        Only [IMG] takes a feature; [IMG_BREAK] and [IMG_END] keep their embeddings. `places`, integers [M] on the
        device of the tokens, say where the image tokens are; without it they are looked for, and the card waited for.
        """
        x = self.language_model.embed_tokens(token_ids)
        if features is None:
            return x
        assert self.config.image_token_id is not None, self.config.architecture
        if places is None:
            places = token_ids.eq(self.config.image_token_id).nonzero()[:, 0]
        assert len(places) == len(features), (len(places), len(features))
        return x.index_copy_(0, places, features.to(x.dtype))

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embedded tokens [N, C] at positions [N] -> hidden states [N, C]."""
        return self.language_model(x, positions, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, C] -> float32 logits [N, V]."""
        return self.lm_head(hidden).float()


class Decoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.native: Layers | None = None
        """The layers in one call, for passes of a few rows on a CPU (`native_decoder`)."""

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """x [N, C] and integer positions [N], each within its own sequence -> normed hidden states [N, C]."""
        rotary = text_rotary(positions, self.config, x.dtype)
        done = None if self.native is None else self.native(x, rotary, attend)
        x, delta = self._layer_by_layer(x, rotary, attend) if done is None else done
        return add_norm(x, delta, self.norm)[1]

    def _layer_by_layer(self, x: Tensor, rotary: Rotary, attend: Attend) -> tuple[Tensor, Tensor | None]:
        delta = None
        for index, layer in enumerate(self.layers):
            x, delta = layer(x, delta, rotary, attend, index)
        return x, delta


class DecoderLayer(nn.Module):
    """Takes and gives the residual and what is to be added to it: whoever adds norms in the same pass over memory."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedFeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, delta: Tensor | None, rotary: Rotary, attend: Attend, index: int
    ) -> tuple[Tensor, Tensor]:
        """x and delta [N, C] -> those of the layer after: their sum is the hidden state."""
        x, normed = add_norm(x, delta, self.input_layernorm)
        delta = self.self_attn(normed, rotary, attend, index)
        x, normed = add_norm(x, delta, self.post_attention_layernorm)
        return x, self.mlp(normed)
