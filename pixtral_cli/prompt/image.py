"""An RGB picture in, its grid of patches and (on demand) its pixels out; knows no files, tokens or templates.

Two recipes exist in the world and give different pixels: `hf` (transformers, `image_processing_pixtral.py`) and
`native` (mistral-common, `tokens/tokenizers/image.py`). Both divide the picture by the longest side allowed,
then round its sides up to whole patches. H, W: height and width in pixels, multiples of the patch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from pixtral_cli.prompt.settings import Settings

if TYPE_CHECKING:
    import torch
    from PIL import Image

Recipe = Literal["hf", "native"]
Detail = Literal["auto", "low", "high"]
"""How closely to look at a picture (OpenAI's `detail`): "auto" and "high" as the model is made for."""
RECIPES: tuple[Recipe, ...] = ("hf", "native")
LOW_DETAIL = 512
"""Pixels of the longest side of a picture in low detail."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
NATIVE_SHARPNESS = -0.75
"""The `a` of OpenCV's INTER_CUBIC."""
STRIP_ROWS = 128
PICTURE_BYTES, PIXEL_BYTES = 4, 12
"""Of one pixel: in PIL, and as three float32 numbers."""


@dataclass(frozen=True)
class ImageSpec:
    """How a model wants its pictures; the defaults are Pixtral's. Lengths are in pixels."""

    patch_size: int = 16
    longest_side: int = 1024
    spatial_merge: int = 1
    """Patches that become one token, along each side."""
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    rescale_factor: float = 1 / 255

    @property
    def cell(self) -> int:
        """Pixels that one token covers, along each side."""
        return self.patch_size * self.spatial_merge

    def at(self, detail: Detail) -> ImageSpec:
        """This spec for a picture that is to be seen in that detail."""
        return replace(self, longest_side=min(self.longest_side, LOW_DETAIL)) if detail == "low" else self

    def with_preprocessor(self, config: Settings) -> ImageSpec:
        """This, changed by a preprocessor_config.json.

        `do_resize: false` is not followed: without it a picture would not be a whole number of patches.

        Raises:
            SettingsUnreadable: a value is not what it should be.
        """
        normalizes = config.flag("do_normalize", True)
        rescale = config.positive("rescale_factor", 1 / 255)
        return replace(
            self,
            longest_side=_longest_side(config) or self.longest_side,
            mean=config.three("image_mean", self.mean) if normalizes else (0.0,) * 3,
            std=config.three("image_std", self.std, positive=True) if normalizes else (1.0,) * 3,
            rescale_factor=rescale if config.flag("do_rescale", True) else 1.0,
        )


def _longest_side(config: Settings) -> int | None:
    """`size` is a number or an object; None where it is neither given nor anything of ours."""
    size = config.section("size") if isinstance(config.get("size"), dict) else config
    sides = ("size",) if size is config else ("longest_edge", "height")
    return next((size.length(side) for side in sides if side in size), None)


def plan_size(width: int, height: int, recipe: Recipe, spec: ImageSpec) -> tuple[int, int]:
    """The (width, height) that a picture is resized to: multiples of `spec.cell`.

    A side longer than `spec.longest_side` shrinks to it, the other in proportion: `hf` rounds down and `native` to
    the nearest even. A side that would vanish keeps one pixel, and so one patch, where transformers fails.

    >>> plan_size(3015, 332, "hf", ImageSpec()), plan_size(3015, 332, "native", ImageSpec())
    ((1024, 112), (1024, 128))
    """
    ratio = max(width / spec.longest_side, height / spec.longest_side)
    if ratio > 1:
        shorten = math.floor if recipe == "hf" else round
        width, height = max(1, shorten(width / ratio)), max(1, shorten(height / ratio))
    return _whole_cells(width, spec.cell), _whole_cells(height, spec.cell)


def _whole_cells(length: int, cell: int) -> int:
    return ((length - 1) // cell + 1) * cell


@dataclass(frozen=True)
class PreparedImage:
    """A picture with its place in the prompt decided; pixels are computed when asked for."""

    content: Image.Image | torch.Tensor | None
    """What the pixels are made of: an RGB picture, or the pixels themselves; None if nobody will ask for them."""
    original_size: tuple[int, int]
    """(width, height) of the picture before resizing, after turning it upright."""
    recipe: Recipe
    spec: ImageSpec
    width: int
    height: int
    """Pixels after resizing."""

    @property
    def rows(self) -> int:
        return self.height // self.spec.cell

    @property
    def columns(self) -> int:
        return self.width // self.spec.cell

    @property
    def tokens(self) -> int:
        """Prompt tokens: a row is its columns and a break (or, at last, the end)."""
        return self.rows * (self.columns + 1)

    @cached_property
    def key(self) -> bytes:
        """SHA-256 of all that `pixels` depends on: two pictures with one key are the same to a model."""
        content = hashlib.sha256(repr((self.recipe, self.spec, self.width, self.height)).encode())
        for part in _parts(self.content):
            content.update(part)
        return content.digest()

    def compact(self) -> PreparedImage:
        """The same, with the resized picture or its pixels in place of the picture where that takes less memory."""
        picture, resized = self.content.width * self.content.height, self.width * self.height
        if self.recipe == "hf" and resized < picture:
            return replace(self, content=_resized_hf(self.content, self.width, self.height))
        if self.recipe == "native" and resized * PIXEL_BYTES < picture * PICTURE_BYTES:
            return replace(self, content=self.pixels())
        return self

    def without_pixels(self) -> PreparedImage:
        """Only the sizes."""
        return replace(self, content=None)

    def pixels(self) -> torch.Tensor:
        """Normalised float32 [3, H, W] on the CPU."""
        import torch

        if isinstance(self.content, torch.Tensor):
            return self.content
        if self.recipe == "hf":
            image = _bytes_of(_resized_hf(self.content, self.width, self.height)).float()
        else:
            image = _resized_native(self.content, self.width, self.height)
        mean, std = torch.tensor(self.spec.mean), torch.tensor(self.spec.std)
        return ((image * self.spec.rescale_factor - mean) / std).permute(2, 0, 1).contiguous()


def prepare(picture: Image.Image, recipe: Recipe, spec: ImageSpec) -> PreparedImage:
    """Decide the size of an RGB picture."""
    width, height = plan_size(*picture.size, recipe, spec)
    return PreparedImage(picture, picture.size, recipe, spec, width, height)


def token_ids(rows: int, columns: int, image: int, end_of_row: int, end: int) -> list[int]:
    """The prompt tokens of one picture.

    >>> token_ids(2, 3, 10, 12, 13)
    [10, 10, 10, 12, 10, 10, 10, 13]
    """
    ids = ([image] * columns + [end_of_row]) * rows
    ids[-1] = end
    return ids


def _strips(picture: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(top row, the rows from there on), so that of a large picture there is never a second copy."""
    for top in range(0, picture.height, STRIP_ROWS):
        yield top, picture.crop((0, top, picture.width, min(top + STRIP_ROWS, picture.height)))


def _parts(content: Image.Image | torch.Tensor) -> Iterator[bytes | bytearray]:
    """The bytes that identify a content."""
    import torch

    if not isinstance(content, torch.Tensor):
        yield repr(content.size).encode()
        yield from (strip.tobytes() for _, strip in _strips(content))
        return
    yield b"pixels"
    for channel in content:
        raw = bytearray(channel.nbytes)
        torch.frombuffer(raw, dtype=channel.dtype).view_as(channel).copy_(channel)
        yield raw


def _bytes_of(picture: Image.Image) -> torch.Tensor:
    """uint8 [height, width, 3]."""
    import torch

    pixels = torch.empty(picture.height, picture.width, 3, dtype=torch.uint8)
    for top, strip in _strips(picture):
        raw = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8)
        pixels[top : top + STRIP_ROWS] = raw.view(strip.height, strip.width, 3)
    return pixels


def _resized_hf(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Antialiased bicubic on bytes.

    PIL's is what transformers uses without torchvision. torch's byte kernel (torchvision's) differs from it by up to
    two levels and, with the copy that it needs, is no faster: 67 ms against 77 for 4000x3000.
    """
    from PIL.Image import Resampling

    return picture.resize((width, height), Resampling.BICUBIC)


def _resized_native(picture: Image.Image, width: int, height: int) -> torch.Tensor:
    """float32 [H, W, 3]: OpenCV's bicubic on floats, neither antialiased nor clamped, so a little beyond 0 to 255.

    Each output pixel sees 4 x 4 input pixels, so only those rows become floats: a huge picture stays bytes.
    """
    return _interpolated(_interpolated(_bytes_of(picture), height, 0), width, 1)


def _interpolated(image: torch.Tensor, target: int, dim: int) -> torch.Tensor:
    """[h, w, 3] of any dtype -> float32, with `target` places along `dim` (0 or 1)."""
    if image.shape[dim] == target:
        return image.float()
    taps, weights = _cubic_taps(image.shape[dim], target)
    shape = (target, 1, 1) if dim == 0 else (1, target, 1)
    result = image.index_select(dim, taps[0]).float().mul_(weights[0].view(shape))
    for tap, weight in zip(taps[1:], weights[1:], strict=True):
        result.addcmul_(image.index_select(dim, tap).float(), weight.view(shape))
    return result


def _cubic_taps(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of `target` places, 4 indices into `source` (edges repeat) and their weights: both [4, target]."""
    import torch

    centre = ((torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5).float()
    left = centre.floor()
    steps = torch.tensor([-1, 0, 1, 2]).unsqueeze(1)
    distance = centre - left - steps
    index = left.long() + steps
    return index.clamp(0, source - 1), _cubic(distance.abs(), NATIVE_SHARPNESS)


def _cubic(x: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' convolution kernel at distances 0 <= x <= 2."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return near.where(x <= 1, far)
