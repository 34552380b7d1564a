"""Pixels in, one feature an image token out: the tower of CLIP (Radford et al. 2021, a ViT), without the pooling after
it. Knows no text and no files; parameters have the names of transformers' `modeling_clip.py`.

Letters: B images, L patches of an image and its class token, N all of them, C hidden_size, P patch_size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from pixtral_cli.model.config import ClipConfig
from pixtral_cli.model.layers import Attend, Embedding
from pixtral_cli.model.vision import Grid, PatchEmbedding, Tower, attend_within_images


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), which OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class ClipTower(Tower):
    """The layers after the last whose output is a feature are not made."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config: ClipConfig = config
        run = max(config.feature_layers)
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.encoder = ClipEncoder(config, run)
        self.unread = ("post_layernorm.", *(f"encoder.layers.{index}." for index in range(run, config.num_layers)))

    def forward(self, patches: Tensor, grids: Sequence[Grid], attend: Attend | None = None) -> Tensor:
        """patches [N, channels * P * P] of all images in raster order -> features, those of the chosen layers side by
        side [N, C * len(feature_layers)]; the class token's, where it is kept, before those of its image."""
        x = self.pre_layrnorm(self.embeddings(patches, len(grids)))  # [B, L, C]
        images, length, _ = x.shape
        x, kept = x.flatten(0, 1), [x]
        attend = attend or attend_within_images([length] * images, x.device)
        for index, layer in enumerate(self.encoder.layers):
            x = layer(x, attend, index)
            kept.append(x.unflatten(0, (images, length)))
        features = torch.cat([kept[layer] for layer in self.config.feature_layers], dim=-1)
        return features[:, 0 if self.config.keeps_class else 1 :].flatten(0, 1)


class ClipEmbeddings(nn.Module):
    """Patches, and the class token before those of each image; each has its place's vector added."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = Embedding((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)

    def forward(self, patches: Tensor, images: int) -> Tensor:
        """patches [N, channels * P * P] -> [B, L, C]."""
        x = self.patch_embedding(patches).unflatten(0, (images, -1))
        x = torch.cat([self.class_embedding.expand(images, 1, -1), x], dim=1)
        return x + self.position_embedding.weight


class ClipEncoder(nn.Module):
    """The first `run` layers."""

    def __init__(self, config: ClipConfig, run: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(run))


class ClipLayer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = ClipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = ClipFeedForward(config)

    def forward(self, x: Tensor, attend: Attend, index: int) -> Tensor:
        """x [N, C] -> [N, C]."""
        x = x + self.self_attn(self.layer_norm1(x), attend, index)
        return x + self.mlp(self.layer_norm2(x))


class ClipAttention(nn.Module):
    """With biases, and without rotary positions."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, attend: Attend, index: int) -> Tensor:
        """x [N, C] -> what attention adds to it [N, C]."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(index, q, k, v).flatten(1))


class ClipFeedForward(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] -> what the feed-forward layer adds to it [N, C]."""
        return self.fc2(self.activation(self.fc1(x)))
