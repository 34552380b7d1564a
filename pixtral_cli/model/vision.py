"""Pixels in, one feature an image token out: what a tower is, the Pixtral tower, and projectors behind a tower. Knows
no text and no files.

Patches of all images come flattened; `attend` keeps each image to itself. Letters: N patches, M image tokens, C
hidden_size, T that of the decoder, H heads, D head_dim, P patch_size in pixels, B images of L patches each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, scaled_dot_product_attention

from pixtral_cli.model.attention import attend_within
from pixtral_cli.model.config import ModelConfig, TowerConfig, VisionConfig
from pixtral_cli.model.fused import add_norm
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.layers import Attend, GatedFeedForward, SelfAttention
from pixtral_cli.model.pass_sizes import PATCHES
from pixtral_cli.model.rotary import Rotary, cos_sin, grid_angles

Grid = tuple[int, int]  # rows, columns of one image's patches
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of attention on a card, the first that takes the numbers. cuDNN's is half as fast again on an H100, but plans anew
for each size of image, for 60 ms: as long as it saves on thirty images."""


class VisionLanguageModel(LanguageModel):
    """The decoder, and the tower and projector that give it an image's features."""

    def __init__(self, config: ModelConfig, tower: Tower, projector: Projector) -> None:
        super().__init__(config)
        self.vision_tower = tower
        self.unread = tuple(f"vision_tower.{name}" for name in tower.unread)
        self.multi_modal_projector = projector

    def encode_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Pixels [channels, height, width] each, sides multiples of a token's -> a feature a token [M, T] each.

        A card computes several in one pass; a CPU one after the other, so that nobody's last bits depend on others.
        """
        grids = [self._grid(pixels) for pixels in images]
        found: dict[int, Tensor] = {}
        for chosen in self._passes([rows * columns for rows, columns in grids]):
            patches = torch.cat([self._patches(images[index], grids[index]) for index in chosen])
            there = [grids[index] for index in chosen]
            features = self.multi_modal_projector(self.vision_tower(patches, there), there)
            found |= zip(chosen, features.split([self._tokens(images[index]) for index in chosen]), strict=True)
        return [found[index] for index in range(len(images))]

    def _tokens(self, pixels: Tensor) -> int:
        assert self.config.image_layout is not None, self.config.architecture
        return self.config.image_layout.tokens(*pixels.shape[:0:-1])

    def _passes(self, lengths: list[int]) -> Iterator[list[int]]:
        """Which images go through the tower together, by their patches: equal ones beside each other, for attention."""
        if self.device.type == "cpu":
            yield from ([index] for index in range(len(lengths)))
            return
        chosen: list[int] = []
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            if chosen and sum(lengths[other] for other in chosen) + lengths[index] > PATCHES:
                yield chosen
                chosen = []
            chosen.append(index)
        if chosen:
            yield chosen

    def _grid(self, pixels: Tensor) -> Grid:
        patch = self.vision_tower.config.patch_size
        _, height, width = pixels.shape
        assert height % patch == width % patch == 0, (height, width, patch)
        return height // patch, width // patch

    def _patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        """Pixels [channels, height, width] -> [rows * columns, channels * P * P], on the tower's device."""
        patch = self.vision_tower.config.patch_size
        pixels = _sent(pixels, self.language_model.norm.weight)
        tiles = pixels.view(len(pixels), grid[0], patch, grid[1], patch)
        return tiles.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


def _sent(pixels: Tensor, like: Tensor) -> Tensor:
    """Pixels in the dtype and on the device of `like`. They go to a card without anyone waiting for it."""
    if like.is_cuda and not pixels.is_cuda:
        pinned = torch.empty(pixels.shape, dtype=like.dtype, pin_memory=True)
        return pinned.copy_(pixels).to(like.device, non_blocking=True)
    return pixels.to(like)


class AttendWithinImages:
    """A card's attention without order: each patch sees those of its image. Images beside each other that are of one
    length take one call."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._groups = [(length, len(list(same))) for length, same in groupby(lengths)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [N, H, D] -> [N, H, D]."""
        sizes = [length * count for length, count in self._groups]
        mixed = []
        with sdpa_kernel(BACKENDS):
            for (length, _), *parts in zip(self._groups, *(x.split(sizes) for x in (q, k, v)), strict=True):
                batched = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in parts)  # [B, H, L, D]
                mixed.append(scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1))
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


class Tower(nn.Module):
    """What gives features of images. `unread`: as `LanguageModel.unread`, of its own names."""

    config: TowerConfig
    unread: tuple[str, ...] = ()

    def forward(self, patches: Tensor, grids: Sequence[Grid], attend: Attend | None = None) -> Tensor:
        """patches [N, channels * P * P] of all images in raster order, and their grids -> features for the projector,
        an image after the other."""
        raise NotImplementedError


class VisionTower(Tower):
    """Pixtral's."""

    config: VisionConfig

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_conv = PatchEmbedding(config)
        self.ln_pre = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))

    def forward(self, patches: Tensor, grids: Sequence[Grid], attend: Attend | None = None) -> Tensor:
        """patches [N, channels * P * P] of all images in raster order, and their grids -> features [N, C]."""
        config = self.config
        angles = {grid: grid_angles(*grid, config.head_dim, config.rope_theta, patches.device) for grid in set(grids)}
        rotary = cos_sin(torch.cat([angles[grid] for grid in grids]), patches.dtype)
        attend = attend or attend_within_images([rows * columns for rows, columns in grids], patches.device)
        x, delta = add_norm(self.patch_conv(patches), None, self.ln_pre)[1], None
        for index, layer in enumerate(self.layers[: config.feature_layer]):
            x, delta = layer(x, delta, rotary, attend, index)
        return x if delta is None else x + delta


def attend_within_images(lengths: list[int], device: torch.device) -> Attend:
    """How the tokens of images of these lengths, one after the other, see those of their image."""
    return AttendWithinImages(lengths) if device.type == "cuda" else partial(attend_within, lengths)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, so one matrix over flattened patches; weight [C, channels, P, P]."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        shape = config.hidden_size, config.num_channels, config.patch_size, config.patch_size
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, patches: Tensor) -> Tensor:
        return patches @ self.weight.flatten(1).T


class VisionLayer(nn.Module):
    """Takes and gives the residual and what is to be added to it, as `language_model.DecoderLayer`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = SelfAttention(config.hidden_size, config.num_heads, config.num_heads, config.head_dim)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = GatedFeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, delta: Tensor | None, rotary: Rotary, attend: Attend, index: int
    ) -> tuple[Tensor, Tensor]:
        x, normed = add_norm(x, delta, self.attention_norm)
        delta = self.attention(normed, rotary, attend, index)
        x, normed = add_norm(x, delta, self.ffn_norm)
        return x, self.feed_forward(normed)


class Projector(nn.Module):
    """From the tower's width to the decoder's, a patch a token: Linear, exact GELU, Linear."""

    def __init__(self, vision_size: int, text_size: int, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size, bias=bias)
        self.linear_2 = nn.Linear(text_size, text_size, bias=bias)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features of patches [N, C], and the grids in which they lie -> of tokens [M, T]."""
        return self.linear_2(gelu(self.linear_1(x)))


class MergingProjector(Projector):
    """As Projector, a square of patches a token: each patch is normed, and those of a square become one before."""

    def __init__(self, vision_size: int, text_size: int, bias: bool, merge: int, eps: float) -> None:
        super().__init__(vision_size, text_size, bias)
        self.norm = nn.RMSNorm(vision_size, eps=eps)
        self.patch_merger = PatchMerger(vision_size, merge)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        return super().forward(self.patch_merger(add_norm(x, None, self.norm)[1], grids), grids)


class PatchMerger(nn.Module):
    """merge x merge patches -> one of the same width, by a matrix [C, C * merge * merge]."""

    def __init__(self, hidden_size: int, merge: int) -> None:
        super().__init__()
        self.merge = merge
        self.merging_layer = nn.Linear(hidden_size * merge**2, hidden_size, bias=False)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        images = x.split([rows * columns for rows, columns in grids])
        return self.merging_layer(torch.cat([self._squares(*each) for each in zip(images, grids, strict=True)]))

    def _squares(self, x: Tensor, grid: Grid) -> Tensor:
        """One image's patches [rows * columns, C] -> its squares in raster order [M, C * merge * merge].

        A feature of all patches of the square stands together, row by row: as torch's `unfold` has them, of which the
        matrix was trained (transformers `modeling_mistral3.py`).
        """
        rows, columns = (side // self.merge for side in grid)
        tiles = x.view(rows, self.merge, columns, self.merge, -1)
        return tiles.permute(0, 2, 4, 1, 3).flatten(0, 1).flatten(1)
