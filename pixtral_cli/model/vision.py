"""Pixels in, one feature a patch out: the Pixtral tower and its projector. Knows no text and no files.

Patches of all pictures come flattened; `attend` keeps each picture to itself. Letters: N patches, C hidden_size,
H heads, D head_dim, P patch_size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from pixtral_cli.model.attention import Attend, AttendWithin
from pixtral_cli.model.config import VisionConfig
from pixtral_cli.model.layers import GatedFeedForward, SelfAttention
from pixtral_cli.model.rope import grid_angles, rotation

Grid = tuple[int, int]  # rows, columns of one picture's patches


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_conv = PatchEmbedding(config)
        self.ln_pre = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))

    def forward(self, patches: Tensor, grids: Sequence[Grid], attend: Attend | None = None) -> Tensor:
        """patches [N, channels * P * P] of all pictures in raster order, and their grids -> features [N, C]."""
        config = self.config
        angles = [grid_angles(*grid, config.head_dim, config.rope_theta, patches.device) for grid in grids]
        turn = rotation(torch.cat(angles), patches.dtype)
        attend = attend or AttendWithin([rows * columns for rows, columns in grids])
        x = self.ln_pre(self.patch_conv(patches))
        for index, layer in enumerate(self.layers[: config.feature_layer]):
            x = layer(x, turn, attend, index)
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

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend, index: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, attend, index)
        return x + self.feed_forward(self.ffn_norm(x))


class Projector(nn.Module):
    """From the tower's width to the decoder's: Linear, exact GELU, Linear."""

    def __init__(self, vision_size: int, text_size: int, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size, bias=bias)
        self.linear_2 = nn.Linear(text_size, text_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(gelu(self.linear_1(x)))


def to_patches(pixels: Tensor, patch_size: int) -> tuple[Tensor, Grid]:
    """One picture [channels, height, width], sides multiples of P -> patches [N, channels * P * P] and its grid."""
    channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    assert (rows * patch_size, columns * patch_size) == (height, width), (height, width, patch_size)
    tiles = pixels.view(channels, rows, patch_size, columns, patch_size)
    return tiles.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1), (rows, columns)
