"""A decoded picture of any mode in, the upright 8-bit RGB that people see out; knows no files and no sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

Strips = Callable[[], Iterator[tuple[int, "Image.Image"]]]
STRIP_PIXELS = 2**22
ORIENTATION = 0x0112
TURNS = {
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


def upright_rgb(image: Image.Image) -> Image.Image:
    """The first frame, transparency on white, greys of more than 8 bits scaled, turned as its EXIF says."""
    image.load()
    orientation = _orientation(image)
    if image.mode == "RGB" and "transparency" not in image.info and orientation == 1:
        return image
    seen = _upright(_rgb(_eight_bit(image)), orientation)
    seen.info = {}  # an orientation left in it would turn the picture again when it is loaded again
    return seen


def _orientation(image: Image.Image) -> int:
    """1 to 8; a damaged EXIF block does not spoil the picture."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    from PIL import Image

    turn = TURNS.get(orientation)
    return image.transpose(Image.Transpose[turn]) if turn else image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Sixteen-bit, integer and float greys scaled to 8 bits, where PIL's own conversion would clip them."""
    if not (image.mode == "F" or image.mode.startswith("I")):
        return image
    strips = _strips(image)
    extrema = [strip.convert("F").getextrema() for _, strip in strips()]
    scale = 255 / _white(image, min(low for low, _ in extrema), max(high for _, high in extrema))
    return _drawn("L", image, strips, lambda strip: strip.convert("F").point(lambda value: value * scale + 0.5))


def _white(image: Image.Image, low: float, high: float) -> float:
    """The value that is white, of a grey picture whose values go from `low` to `high`.

    ``I;16`` says that it is 65535. Mode ``I`` only says that values are kept in 32 bits, which programs do with
    masks of 8 bits and scans of 16 as well: it is the smallest of these ranges that holds every value, and the
    highest that a TIFF states. Floats are 0 to 1 if all of them are, else 0 to 255.
    """
    if image.mode == "F":
        return 1.0 if low >= 0 and high <= 1 else 255.0
    if image.mode != "I":
        return INTEGER_RANGES[1]
    highest = max(high, _stated_highest(image))
    return next((top for top in INTEGER_RANGES if highest <= top), INTEGER_RANGES[-1])


def _stated_highest(image: Image.Image) -> float:
    """The highest value that a TIFF's header speaks of; 0 where it says nothing."""
    tags = getattr(image, "tag_v2", {})
    stated = (tags.get(tag, 0) for tag in TIFF_HIGHEST_VALUE)
    return max(float(value[0] if isinstance(value, tuple) else value) for value in stated)


def _rgb(image: Image.Image) -> Image.Image:
    """RGB, what is transparent composited on white the way mistral-common does it."""

    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    return _drawn("RGB", image, _strips(image), _on_white)


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.paste(image, (0, 0), image)
    return white


def _drawn(mode: str, image: Image.Image, strips: Strips, work: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`work` done strip by strip: of a large picture there is never a third copy."""
    from PIL import Image

    result = Image.new(mode, image.size)
    for top, strip in strips():
        result.paste(work(strip).convert(mode), (0, top))
    return result


def _strips(image: Image.Image) -> Strips:
    """Gives (top row, that many rows of the picture), again at each call."""
    rows = max(1, STRIP_PIXELS // image.width)
    width, height = image.size
    return lambda: ((top, image.crop((0, top, width, min(top + rows, height)))) for top in range(0, height, rows))
