"""A decoded PIL image in, its 8-bit RGB, its grid of tokens and (on demand) its pixels out.

Knows no files, tokens or templates. Two recipes exist in the world and give different pixels: `hf` (transformers,
`image_processing_pixtral.py`) and `native` (mistral-common, `tokens/tokenizers/image.py`). Both divide the image by
the longest side allowed, then round its sides up to whole tokens: a patch each, or a square of patches.
H, W: height and width in pixels after resizing, multiples of a token's. h, w: those of the image as it came.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pixtral_cli.prompt.side_file import SideFile

if TYPE_CHECKING:
    import torch
    from PIL import Image

Recipe = Literal["hf", "native"]
RECIPES: tuple[Recipe, ...] = ("hf", "native")
Detail = Literal["auto", "low", "high"]
"""How closely to look at an image (OpenAI's `detail`): "auto" and "high" as the model is made for."""
LOW_DETAIL = 512
"""Pixels of the longest side of an image in low detail."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CUBIC_A = -0.75
"""The `a` of OpenCV's INTER_CUBIC."""
PIL_PIXEL_BYTES, FLOAT_PIXEL_BYTES = 4, 12
"""Of one pixel: in PIL, and as three float32 numbers."""
STRIP_PIXELS = 2**20

EXIF_ORIENTATION = 0x0112
TRANSPOSITIONS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation -> the PIL transposition that undoes it."""
INTEGER_RANGES = (0xFF, 0xFFFF, 0x7FFFFFFF)
"""The highest value of 8, 16 and (signed) 32 bits."""
TIFF_HIGHEST_VALUE = (281, 341)
"""Tags MaxSampleValue and SMaxSampleValue."""


@dataclass(frozen=True)
class ImageSpec:
    """How a model wants its images; the defaults are Pixtral's. Lengths are in pixels, that of a token is its side."""

    token_size: int = 16
    longest_side: int = 1024
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    rescale_factor: float = 1 / 255

    has_rows: ClassVar[bool] = True
    """Whether rows of image tokens end in tokens of text."""

    def features(self, rows: int, columns: int) -> int:
        """Image tokens of so many rows and columns, without those of text."""
        return rows * columns

    def planned(self, width: int, height: int, recipe: Recipe) -> tuple[int, int]:
        """The (width, height) in which an image of that size is seen."""
        return plan_size(width, height, recipe, self)

    def resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """The RGB image in its planned size, by the recipe `hf`."""
        return _resized_hf(image, width, height)

    def after_resizing(self) -> ImageSpec:
        """This spec, for what `resized` gave."""
        return self

    def at(self, detail: Detail) -> ImageSpec:
        """This spec for an image that is to be seen in that detail."""
        return replace(self, longest_side=min(self.longest_side, LOW_DETAIL)) if detail == "low" else self

    def with_preprocessor(self, config: SideFile) -> ImageSpec:
        """This, changed by a preprocessor_config.json.

        `do_resize: false` is not followed: without it an image would not be a whole number of tokens.

        Raises:
            SideFileUnreadable: a value is not what it should be.
        """
        if isinstance(config.get("size"), dict):
            size = config.section("size")
            side = next((size.length(key) for key in ("longest_edge", "height") if key in size), self.longest_side)
        else:
            side = config.length("size", self.longest_side)
        return replace(self.with_colours(config), longest_side=side)

    def with_colours(self, config: SideFile) -> Self:
        """This, with what a preprocessor_config.json says of colours. Raises SideFileUnreadable."""
        normalizes = config.flag("do_normalize", True)
        rescale = config.positive("rescale_factor", 1 / 255)
        return replace(
            self,
            mean=config.three("image_mean", self.mean) if normalizes else (0.0,) * 3,
            std=config.three("image_std", self.std, positive=True) if normalizes else (1.0,) * 3,
            rescale_factor=rescale if config.flag("do_rescale", True) else 1.0,
        )


@dataclass(frozen=True)
class PreparedImage:
    """An image with its place in the prompt decided; pixels are computed when asked for."""

    source: Image.Image | None
    """The RGB image of which pixels are made; None where they are made already, or nobody will ask for them."""
    original_size: tuple[int, int]
    """(w, h), after the EXIF orientation is undone."""
    recipe: Recipe
    spec: ImageSpec
    width: int
    height: int
    """Pixels after resizing."""
    made: torch.Tensor | None = None
    """What `pixels` gives, where that takes less memory than `source`."""

    @property
    def rows(self) -> int:
        return self.height // self.spec.token_size

    @property
    def columns(self) -> int:
        return self.width // self.spec.token_size

    @property
    def features(self) -> int:
        """Image tokens, those that a feature replaces."""
        return self.spec.features(self.rows, self.columns)

    @property
    def tokens(self) -> int:
        """Prompt tokens: the image tokens, and for each row a break (or, at last, the end) where there are rows."""
        return self.features + self.rows * self.spec.has_rows

    @property
    def is_scaled_down(self) -> bool:
        """Whether the image came larger than the model, or a low detail, has it."""
        return max(self.original_size) > self.spec.longest_side

    @cached_property
    def key(self) -> bytes:
        """SHA-256 of all that `pixels` depends on: two images with one key are the same to a model."""
        digest = hashlib.sha256(repr((self.recipe, self.spec, self.width, self.height)).encode())
        if self.made is not None:
            digest.update(b"pixels")
            digest.update((ctypes.c_char * self.made.nbytes).from_address(self.made.data_ptr()))
        else:
            assert self.source is not None
            digest.update(repr(self.source.size).encode())
            for _, strip in _strips(self.source):
                digest.update(strip.tobytes())
        return digest.digest()

    def compact(self) -> PreparedImage:
        """The same, with the resized image or its pixels in place of the image where that takes less memory."""
        assert self.source is not None
        given, resized = self.source.width * self.source.height, self.width * self.height
        if self.recipe == "hf" and resized < given:
            resized_image = self.spec.resized(self.source, self.width, self.height)
            return replace(self, source=resized_image, spec=self.spec.after_resizing())
        if self.recipe == "native" and resized * FLOAT_PIXEL_BYTES < given * PIL_PIXEL_BYTES:
            return replace(self, source=None, made=self.pixels())
        return self

    def pixels(self) -> torch.Tensor:
        """Normalised float32 [3, H, W] on the CPU."""
        import torch

        if self.made is not None:
            return self.made
        assert self.source is not None
        if self.recipe == "hf":
            pixels = _uint8(self.spec.resized(self.source, self.width, self.height)).float()
        else:
            pixels = _resized_native(self.source, self.width, self.height)
        mean, std = torch.tensor(self.spec.mean), torch.tensor(self.spec.std)
        return ((pixels * self.spec.rescale_factor - mean) / std).permute(2, 0, 1).contiguous()


def prepare(image: Image.Image, recipe: Recipe, spec: ImageSpec) -> PreparedImage:
    """Decide the size of an RGB image."""
    width, height = spec.planned(*image.size, recipe)
    return PreparedImage(image, image.size, recipe, spec, width, height)


def plan_size(width: int, height: int, recipe: Recipe, spec: ImageSpec) -> tuple[int, int]:
    """The (width, height) that an image is resized to: multiples of `spec.token_size`.

    A side longer than `spec.longest_side` shrinks to it, the other in proportion: `hf` rounds down and `native` to
    the nearest even. A side that would vanish keeps one pixel, and so one token, where transformers fails.

    >>> plan_size(3015, 332, "hf", ImageSpec()), plan_size(3015, 332, "native", ImageSpec())
    ((1024, 112), (1024, 128))
    """
    ratio = max(width / spec.longest_side, height / spec.longest_side)
    if ratio > 1:
        shorten = math.floor if recipe == "hf" else round
        width, height = max(1, shorten(width / ratio)), max(1, shorten(height / ratio))
    return math.ceil(width / spec.token_size) * spec.token_size, math.ceil(height / spec.token_size) * spec.token_size


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB as people see the image.

    The first frame, transparency on white, greys of more than 8 bits scaled, turned as its EXIF says.
    """
    from PIL import Image

    image.load()
    transposition = TRANSPOSITIONS.get(_orientation(image))
    if image.mode == "RGB" and "transparency" not in image.info and transposition is None:
        return image
    rgb = _on_white(_eight_bit(image))
    if transposition is not None:
        rgb = rgb.transpose(Image.Transpose[transposition])
    rgb.info = {}  # an orientation left in it would turn the image again when it is loaded again
    return rgb


def _orientation(image: Image.Image) -> int:
    """1 to 8; a damaged EXIF block does not spoil the image."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  PIL raises nearly anything
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Sixteen-bit, integer and float greys scaled to 8 bits, where PIL's own conversion would clip them."""
    if not (image.mode == "F" or image.mode.startswith("I")):
        return image
    extrema: list[Any] = [strip.convert("F").getextrema() for _, strip in _strips(image)]
    scale = 255 / _white(image, min(low for low, _ in extrema), max(high for _, high in extrema))
    return _by_strips("L", image, lambda strip: strip.convert("F").point(lambda value: value * scale + 0.5))


def _white(image: Image.Image, low: float, high: float) -> float:
    """The value that is white, of a grey image whose values go from `low` to `high`.

    ``I;16`` says that it is 65535. Mode ``I`` only says that values are kept in 32 bits, which programs do with
    masks of 8 bits and scans of 16 as well: it is the smallest of these ranges that holds every value, and the
    highest that a TIFF states. Floats are 0 to 1 if all of them are, else 0 to 255.
    """
    if image.mode == "F":
        return 1.0 if low >= 0 and high <= 1 else 255.0
    if image.mode != "I":
        return INTEGER_RANGES[1]
    tags = getattr(image, "tag_v2", {})
    for stated in (tags.get(tag, 0) for tag in TIFF_HIGHEST_VALUE):
        high = max(high, float(stated[0] if isinstance(stated, tuple) else stated))
    return next((top for top in INTEGER_RANGES if high <= top), INTEGER_RANGES[-1])


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, what is transparent composited on white the way mistral-common does it."""
    from PIL import Image

    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")

    def composited(strip: Image.Image) -> Image.Image:
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        white.paste(strip, (0, 0), strip)
        return white

    return _by_strips("RGB", image, composited)


def _by_strips(mode: str, image: Image.Image, work: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`work` done strip by strip: of a large image there is never a third copy."""
    from PIL import Image

    result = Image.new(mode, image.size)
    for top, strip in _strips(image):
        result.paste(work(strip).convert(mode), (0, top))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(top row, the rows from there on), so that of a large image there is never a whole second copy."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _uint8(image: Image.Image) -> torch.Tensor:
    """RGB -> uint8 [h, w, 3]."""
    import torch

    pixels = torch.empty(image.height, image.width, 3, dtype=torch.uint8)
    for top, strip in _strips(image):
        raw = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8)
        pixels[top : top + strip.height] = raw.view(strip.height, strip.width, 3)
    return pixels


def _resized_hf(image: Image.Image, width: int, height: int) -> Image.Image:
    """Antialiased bicubic on bytes.

    PIL's is what transformers uses without torchvision. torch's byte kernel (torchvision's) differs from it by up to
    two levels and, with the copy that it needs, is no faster: 67 ms against 77 for 4000x3000.
    """
    from PIL.Image import Resampling

    return image.resize((width, height), Resampling.BICUBIC)


def _resized_native(image: Image.Image, width: int, height: int) -> torch.Tensor:
    """float32 [H, W, 3]: OpenCV's bicubic on floats, neither antialiased nor clamped, so a little beyond 0 to 255.

    Each output pixel sees 4 x 4 input pixels, so only those rows become floats: a huge image stays bytes.
    """
    return _interpolated(_interpolated(_uint8(image), height, 0), width, 1)


def _interpolated(pixels: torch.Tensor, target: int, dim: int) -> torch.Tensor:
    """[h, w, 3] of any dtype -> float32, with `target` places along `dim` (0 or 1)."""
    if pixels.shape[dim] == target:
        return pixels.float()
    taps, weights = _cubic_taps(pixels.shape[dim], target)
    shape = (target, 1, 1) if dim == 0 else (1, target, 1)
    result = pixels.index_select(dim, taps[0]).float().mul_(weights[0].view(shape))
    for tap, weight in zip(taps[1:], weights[1:], strict=True):
        result.addcmul_(pixels.index_select(dim, tap).float(), weight.view(shape))
    return result


def _cubic_taps(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of `target` places, 4 indices into `source` (edges repeat) and their weights: both [4, target].

    The weights are those of Keys' convolution kernel.
    """
    import torch

    centre = ((torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5).float()
    left = centre.floor()
    steps = torch.tensor([-1, 0, 1, 2]).unsqueeze(1)
    x = (centre - left - steps).abs()
    near = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
    far = CUBIC_A * (((x - 5) * x + 8) * x - 4)
    return (left.long() + steps).clamp(0, source - 1), near.where(x <= 1, far)
