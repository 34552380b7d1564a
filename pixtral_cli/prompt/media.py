"""What a user calls a picture in, an upright RGB PIL image out; knows no sizes, patches or tokens.

Only the formats listed are tried, and the header's size is checked before a pixel is decoded.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from pixtral_cli.prompt.errors import PictureNotFound, PictureTooLarge, PictureUnreadable
from pixtral_cli.prompt.fetch import fetch as fetch_url
from pixtral_cli.prompt.fetch import without_password
from pixtral_cli.prompt.settings import reason_of

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_000_000
MAX_PIPE_BYTES = 256 * 2**20
OTHER_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
STDIN = "-"
FROM_ARRAY = "Of an array, PIL.Image.fromarray makes a picture."
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
Fetch = Callable[[str], bytes]
PIL_SETTINGS = threading.Lock()
"""Held while PIL works: its pixel limit and Python's warning filters belong to the whole process."""
INTEGER_RANGES = (0xFF, 0xFFFF, 0x7FFFFFFF)
"""The highest value of 8, 16 and (signed) 32 bits."""
TIFF_HIGHEST_VALUE = (281, 341)
"""Tags MaxSampleValue and SMaxSampleValue."""


def load(source: Any, *, max_pixels: int = MAX_PIXELS, fetch: Fetch = fetch_url) -> Image.Image:
    """The picture as people see it: first frame, upright, transparency on white, 8-bit RGB.

    Args:
        source: a path ("~" is the home folder), an http(s) or file address, a data: URI, "-" for standard input,
            the bytes of a file, or a PIL.Image; what `load` gave comes back as it is.
        max_pixels: width times height that the header may state.
        fetch: gets an http(s) address; raises PictureFetchFailed.

    Raises:
        PictureError: PictureNotFound, PictureUnreadable, PictureTooLarge or PictureFetchFailed, naming the picture.
    """
    name = name_of(source)
    if hasattr(source, "convert") and hasattr(source, "size"):
        return _guarded(name, lambda: _normalised(source, name, max_pixels))
    with _file(source, name, fetch) as file:
        return _guarded(name, lambda: _normalised(_open(file, name), name, max_pixels))


def name_of(source: Any) -> str:
    """What to call a picture in a sentence."""
    if isinstance(source, (bytes, bytearray)):
        return f"of {len(source)} bytes"
    if not isinstance(source, str):
        return str(source) if hasattr(source, "__fspath__") else f"({type(source).__name__})"
    if source == STDIN:
        return "from standard input"
    source = without_password(source) or '""'
    return source if len(source) <= 120 else f"{source[:40]}…"


def _file(source: Any, name: str, fetch: Fetch) -> BinaryIO:
    if isinstance(source, (bytes, bytearray)):
        return BytesIO(source)
    if not (isinstance(source, str) or hasattr(source, "__fspath__")):
        raise PictureUnreadable(name, "it is no path, address, bytes or PIL.Image", FROM_ARRAY)
    if source == STDIN:
        return _standard_input(name)
    if isinstance(source, str):
        return _named(source, name, fetch)
    return _path(Path(source), name)


def _named(source: str, name: str, fetch: Fetch) -> BinaryIO:
    scheme = source[:8].partition(":")[0].lower()
    if scheme in ("http", "https"):
        return BytesIO(fetch(source))
    if scheme == "data":
        return BytesIO(_data_uri(source, name))
    if scheme == "file":
        return _path(_file_address(source, name), name)
    if source == "":
        raise PictureUnreadable(name, "it has no name")
    path = Path(source)
    if OTHER_ADDRESS.match(source) and not _exists(path):
        raise PictureUnreadable(name, "such an address is not known", "Known are http:, https:, data: and file:.")
    return _path(path if _exists(path) else _from_home(source), name)


def _file_address(source: str, name: str) -> Path:
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise PictureUnreadable(name, "the address is malformed") from error
    if parts.netloc not in ("", "localhost"):
        raise PictureUnreadable(name, f"the file is on another computer, {parts.netloc}", "Copy it to this one.")
    if parts.path in ("", "/"):
        raise PictureUnreadable(name, "the address names no file")
    return Path(unquote(parts.path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that can be none
        return False


def _from_home(source: str) -> Path:
    """`source` with a leading "~" as the home folder. Only what was typed counts: "./~x" is a file here."""
    try:
        return Path(source).expanduser() if source.startswith("~") else Path(source)
    except RuntimeError:  # no such user
        return Path(source)


def _standard_input(name: str) -> BinaryIO:
    if sys.stdin is None:
        raise PictureUnreadable(name, "it is closed", "Send the picture through a pipe, or give its path.")
    return _limited(sys.stdin.buffer, name)


def _limited(pipe: BinaryIO, name: str) -> BinaryIO:
    """All that a pipe holds; one without an end must not fill the memory."""
    data = pipe.read(MAX_PIPE_BYTES + 1)
    if len(data) > MAX_PIPE_BYTES:
        raise PictureTooLarge(name, f"The picture {name} has more than {MAX_PIPE_BYTES // 2**20} MiB.")
    return BytesIO(data)


def _path(path: Path, name: str) -> BinaryIO:
    try:
        return path.open("rb")
    except IsADirectoryError as error:
        raise PictureUnreadable(name, "it is a folder") from error
    except PermissionError as error:
        raise PictureUnreadable(name, "no permission to read it", "Check the file's permissions.") from error
    except (OSError, ValueError) as error:  # missing, a name too long, a NUL
        raise PictureNotFound(name) from error


def _data_uri(uri: str, name: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise PictureUnreadable(name, "a data: URI needs a comma before its data")
    data = unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    try:
        return b64decode(b"".join(data.split()) + b"==", altchars=b"-_" if b"-" in data or b"_" in data else None)
    except ValueError as error:
        raise PictureUnreadable(name, f"its base64 is damaged ({error})") from error


def _guarded(name: str, work: Callable[[], Image.Image]) -> Image.Image:
    """Decoders of damaged files raise nearly anything; all of it means that the picture cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with PIL_SETTINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata: nothing that the user can do anything about
            return work()
    except (PictureUnreadable, PictureTooLarge):
        raise
    except UnidentifiedImageError as error:
        raise PictureUnreadable(name, "it is not a picture of a known format") from error
    except Image.DecompressionBombError as error:
        raise PictureTooLarge(name, f"The picture {name} is larger than it says.") from error
    except Exception as error:
        reason = reason_of(error)
        raise PictureUnreadable(name, f"it is damaged or cut short ({reason})", "Download or copy it again.") from error


def _open(file: BinaryIO, name: str) -> Image.Image:
    """Read the header. PIL's own size check is off meanwhile (PIL_SETTINGS is held): ours states both numbers."""
    from PIL import Image

    if not file.seekable():  # a named pipe
        file = _limited(file, name)
    if not file.read(1):
        raise PictureUnreadable(name, "it is empty", "Download or copy it again.")
    file.seek(0)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(file, formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        sentence = f"The picture {name} has {width}x{height} = {width * height:,} pixels, more than {max_pixels:,}."
        raise PictureTooLarge(name, sentence)
    if not width or not height:
        raise PictureUnreadable(name, f"it has no pixels ({width}x{height})")


def _normalised(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(image, name, max_pixels)
    image.load()
    orientation = _orientation(image)
    if image.mode == "RGB" and not image.info and orientation == 1:
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
    grey = image.convert("F")
    scale = 255 / _white(image, *grey.getextrema())
    return grey.point(lambda value: value * scale + 0.5).convert("L")


def _white(image: Image.Image, low: float, high: float) -> float:
    """The value that is white, of a grey picture whose values go from `low` to `high`.

    ``I;16`` says that it is 65535. Mode ``I`` only says that values are kept in 32 bits, which programs do with
    masks of 8 bits and scans of 16 as well: it is the smallest of these ranges that holds every value, and the
    highest that a TIFF states. Floats are 0 to 1 if all of them are, else 0 to 255.
    """
    if image.mode == "F":
        return 1.0 if 0 <= low and high <= 1 else 255.0
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
    from PIL import Image

    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.paste(image, (0, 0), image)
    return white.convert("RGB")
