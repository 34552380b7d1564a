"""How a model with a CLIP tower wants its images: each one square of one side, cropped out of the middle or padded.

The steps are those of transformers' processors with PIL (`image_processing_pil_llava.py`, `image_transforms.py`): pad
to a square, resize, crop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pixtral_cli.prompt.image import Detail, ImageSpec, Recipe
from pixtral_cli.prompt.side_file import SideFile

if TYPE_CHECKING:
    from PIL import Image

BICUBIC = 3
"""PIL's number of it; the highest is 5."""
WHOLE_PIXELS = 2**24
"""Of an image that is larger after resizing, as a narrow strip is, only what is left after cropping is resized: the
same but for rounding."""
PADDED_SIDE = 8192
"""A larger square, of which nearly all is colour, is padded around a smaller image."""


@dataclass(frozen=True)
class CroppedSpec(ImageSpec):
    """`longest_side` is that of the square. `own_tokens` stand for the whole image, beside those of patches."""

    own_tokens: int = 0
    edges: tuple[int, ...] | None = None
    """To what an image is resized: (shortest edge,), (width, height), or () for not at all; None is the square's side
    as the shortest edge."""
    padding: tuple[int, ...] | None = None
    """The colour that makes an image a square before it is resized; None makes it none."""
    resample: int = BICUBIC
    """PIL's number of the filter."""

    has_rows = False

    def features(self, rows: int, columns: int) -> int:
        return rows * columns + self.own_tokens

    def planned(self, width: int, height: int, recipe: Recipe) -> tuple[int, int]:
        return self.longest_side, self.longest_side

    def at(self, detail: Detail) -> CroppedSpec:
        """The same: the tower sees one size."""
        return self

    def after_resizing(self) -> CroppedSpec:
        return replace(self, edges=(), padding=None)

    def resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        from PIL.Image import Resampling

        if self.padding is not None:
            image = _padded(image, self.padding)
        full_width, full_height = self._resized_size(*image.size)
        left, top = (full_width - width) // 2, (full_height - height) // 2  # below 0 where there is black around it
        if full_width * full_height <= WHOLE_PIXELS:
            if (full_width, full_height) != image.size:
                image = image.resize((full_width, full_height), Resampling(self.resample))
            return image.crop((left, top, left + width, top + height))
        inner = max(left, 0), max(top, 0), min(left + width, full_width), min(top + height, full_height)
        across, down = image.width / full_width, image.height / full_height
        box = inner[0] * across, inner[1] * down, inner[2] * across, inner[3] * down
        size = inner[2] - inner[0], inner[3] - inner[1]
        part = image.resize(size, Resampling(self.resample), box=box)
        left, top = min(left, 0), min(top, 0)
        return part.crop((left, top, left + width, top + height))

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) before cropping."""
        edges = (self.longest_side,) if self.edges is None else self.edges
        if len(edges) != 1:
            return (edges[0], edges[1]) if edges else (width, height)
        short = edges[0]
        return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)

    def with_preprocessor(self, config: SideFile) -> CroppedSpec:
        """This, changed by a preprocessor_config.json.

        Raises:
            SideFileUnreadable: a value is not what it should be, or makes no square of the side that the tower sees.
        """
        edges, square = self._edges(config), (self.longest_side, self.longest_side)
        if not config.flag("do_center_crop", True):
            if (self.edges if edges is None else edges) != square:
                raise config.wrong("size", f"height and width {square[0]}, the side that the model sees")
        elif _square(config, "crop_size", square) != square:
            raise config.wrong("crop_size", f"{square[0]}, the side that the model sees")
        return replace(
            self.with_colours(config),
            edges=edges,
            padding=self._padding(config),
            resample=config.checked("resample", self.resample, _is_filter, "a number from 0 to 5"),
        )

    def _edges(self, config: SideFile) -> tuple[int, ...] | None:
        if not config.flag("do_resize", True):
            return ()
        if "size" not in config:
            return self.edges
        if not isinstance(config.get("size"), dict):
            return (config.length("size"),)
        size = config.section("size")
        if "shortest_edge" in size:
            return (size.length("shortest_edge"),)
        return size.length("width"), size.length("height")

    def _padding(self, config: SideFile) -> tuple[int, ...] | None:
        """The mean colour. `do_pad` of a CLIP processor means images of one batch, which are of one size here."""
        of_clip = config.text("image_processor_type", "").startswith("CLIP")
        if of_clip or not config.flag("do_pad", self.padding is not None):
            return None
        if self.padding is not None and "image_mean" not in config:
            return self.padding
        return tuple(int(value * 255) for value in config.three("image_mean", self.mean))


def _square(config: SideFile, key: str, default: tuple[int, int]) -> tuple[int, int]:
    """(width, height) under `key`, a number or an object."""
    if isinstance(config.get(key), dict):
        size = config.section(key)
        return size.length("width"), size.length("height")
    side = config.length(key, default[0])
    return side, side


def _padded(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square; of an odd pixel the larger part follows it."""
    from PIL import Image
    from PIL.Image import Resampling

    longest = max(image.size)
    if longest > PADDED_SIDE:
        width, height = (max(1, round(side * PADDED_SIDE / longest)) for side in image.size)
        image, longest = image.resize((width, height), Resampling.BICUBIC), PADDED_SIDE
    if image.width == image.height:
        return image
    square = Image.new("RGB", (longest, longest), colour)
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return square


def _is_filter(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 5
