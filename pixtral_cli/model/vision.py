"""Pixels in, one feature a patch out: the Pixtral tower and its projector. Knows no text and no files.

Patches of all images come flattened; `attend` keeps each image to itself. Letters: N patches, C hidden_size,
H heads, D head_dim, P patch_size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from pixtral_cli.model.attention import attend_within
from pixtral_cli.model.config import ModelConfig, VisionConfig
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.layers import (
    Attend,
    GatedFeedForward,
    Rotary,
    SelfAttention,
    cos_sin,
    grid_angles,
)

Grid = tuple[int, int]  # rows, columns of one image's patches


class PixtralModel(LanguageModel):
    """The decoder, and what gives it an image's features."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.vision is not None, config.architecture
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(
            config.vision.hidden_size, config.text.hidden_size, config.projector_bias
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels [channels, height, width], sides multiples of P -> a feature a patch [rows * columns, C]."""
        patch = self.vision_tower.config.patch_size
        channels, height, width = pixels.shape
        assert height % patch == width % patch == 0, (height, width, patch)
        grid = height // patch, width // patch
        tiles = pixels.to(self.vision_tower.patch_conv.weight).view(channels, grid[0], patch, grid[1], patch)
        patches = tiles.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)  # [rows * columns, channels * P * P]
        return self.multi_modal_projector(self.vision_tower(patches, [grid]))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_conv = PatchEmbedding(config)
        self.ln_pre = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))

    def forward(self, patches: Tensor, grids: Sequence[Grid], attend: Attend | None = None) -> Tensor:
        """patches [N, channels * P * P] of all images in raster order, and their grids -> features [N, C]."""
        config = self.config
        angles = [grid_angles(*grid, config.head_dim, config.rope_theta, patches.device) for grid in grids]
        rotary = cos_sin(torch.cat(angles), patches.dtype)
        attend = attend or partial(attend_within, [rows * columns for rows, columns in grids])
        x = self.ln_pre(self.patch_conv(patches))
        for index, layer in enumerate(self.layers[: config.feature_layer]):
            x = layer(x, rotary, attend, index)
        return x


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, so one matrix over flattened patches; weight [C, channels, P, P]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        shape = config.hidden_size, config.num_channels, config.patch_size, config.patch_size
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, patches: Tensor) -> Tensor:
        return patches @ self.weight.flatten(1).T


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = SelfAttention(config.hidden_size, config.num_heads, config.num_heads, config.head_dim)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = GatedFeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, index: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, attend, index)
        return x + self.feed_forward(self.ffn_norm(x))


class Projector(nn.Module):
    """From the tower's width to the decoder's: Linear, exact GELU, Linear."""

    def __init__(self, vision_size: int, text_size: int, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size, bias=bias)
        self.linear_2 = nn.Linear(text_size, text_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(gelu(self.linear_1(x)))
