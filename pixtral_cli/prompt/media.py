"""What a user calls a picture in, an upright RGB PIL image out; knows no sizes, patches or tokens.

Only the formats listed are tried, and the header's size is checked before a pixel is decoded.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from pixtral_cli.prompt.errors import (
    ImageDamaged,
    ImageError,
    ImageNotFound,
    ImageTooLarge,
    ImageUnreadable,
    without_password,
)
from pixtral_cli.prompt.image import to_rgb
from pixtral_cli.prompt.settings import reason_of

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_000_000
KEPT_PIXELS = 4_000_000
"""Up to this size, 16 MB, a picture is kept decoded. To decode 12 million pixels again takes a tenth of a second."""
MAX_PIPE_BYTES = 256 * 2**20
ADDRESS = re.compile(r"\s*(data|file|https?):", re.IGNORECASE)
OTHER_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
STDIN = "-"
FROM_ARRAY = "Of an array, PIL.Image.fromarray makes a picture."
Fetch = Callable[[str], bytes]
Turn = Callable[[int], AbstractContextManager[Any]]
"""A number of pixels -> a context that is held while a picture of that size is in memory."""
PIL_SETTINGS = threading.Lock()
"""Held while PIL works: its pixel limit and Python's warning filters belong to the whole process."""


def fetch_url(url: str) -> bytes:
    """`fetch.fetch`, whose libraries only a download needs."""
    from pixtral_cli.prompt.fetch import fetch

    return fetch(url)


def load(source: Any, *, max_pixels: int = MAX_PIXELS, fetch: Fetch = fetch_url) -> Image.Image:
    """The picture as people see it: first frame, upright, transparency on white, 8-bit RGB.

    Args:
        source: a path ("~" is the home folder), an http(s) or file address, a data: URI, "-" for standard input,
            the bytes of a file, or a PIL.Image; what `load` gave comes back as it is.
        max_pixels: width times height that the header may state.
        fetch: gets an http(s) address; raises ImageFetchFailed.

    Raises:
        ImageError: ImageNotFound, ImageUnreadable, ImageTooLarge or ImageFetchFailed, naming the picture.
    """
    name = name_of(source)
    if hasattr(source, "convert") and hasattr(source, "size"):
        with _pil_set_up(), _sentences(name):
            _check_size(source, name, max_pixels)
            return to_rgb(source)
    with _file(source, name, fetch) as file, _pil_set_up(), decoded(file, name, max_pixels=max_pixels) as picture:
        return picture


@contextmanager
def opened(source: Any) -> Iterator[Image.Image]:
    """What `load` gives, for `Processor.open_image`."""
    yield load(source)


def checked(source: Any) -> Any:
    """Read and decode a picture, so that what is wrong with it is told now. Returns what `load` takes in its place.

    Standard input and the web are read only once. A large picture is kept as its bytes, or by its name if it is a file:
    many decoded ones would fill the memory before they are needed.

    Raises:
        ImageError: as `load`.
    """
    name = name_of(source)
    with _file(source, name, fetch_url) as file, _pil_set_up(), decoded(file, name) as picture:
        if picture.width * picture.height <= KEPT_PIXELS:
            return picture
        return file.getvalue() if isinstance(file, BytesIO) else source


@contextmanager
def decoded(
    file: BinaryIO, name: str, *, max_pixels: int = MAX_PIXELS, turn: Turn = lambda pixels: nullcontext()
) -> Iterator[Image.Image]:
    """The picture in `file`, as `load` gives it.

    PIL's own pixel check should be off (`Image.MAX_IMAGE_PIXELS` None) and warnings silent: both belong to the whole
    process, so a server sets them once, and `load` around each picture.

    Args:
        turn: entered with the number of pixels that the header states, before they are decoded; left with the picture.

    Raises:
        ImageError: ImageUnreadable (ImageDamaged in a decoder's words) or ImageTooLarge.
    """
    with _sentences(name):
        picture = _open(file, name)
        _check_size(picture, name, max_pixels)
    with turn(picture.width * picture.height):
        with _sentences(name):
            picture = to_rgb(picture)
        yield picture


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
        raise ImageUnreadable(name, "it is no path, address, bytes or PIL.Image", FROM_ARRAY)
    if source == STDIN:
        return _standard_input(name)
    if isinstance(source, str):
        return _named(source, name, fetch)
    return _path(Path(source), name)


def without_blanks(source: str) -> str:
    """An address without the blanks around it; the name of a file keeps them."""
    return source.strip() if ADDRESS.match(source) else source


def _named(source: str, name: str, fetch: Fetch) -> BinaryIO:
    source = without_blanks(source)
    scheme = source[:8].partition(":")[0].lower()
    if scheme in ("http", "https"):
        return BytesIO(fetch(source))
    if scheme == "data":
        return BytesIO(data_uri(source, name))
    if scheme == "file":
        return _path(file_address(source, name), name)
    if source == "":
        raise ImageUnreadable(name, "it has no name")
    path = Path(source)
    if OTHER_ADDRESS.match(source) and not _exists(path):
        raise ImageUnreadable(name, "such an address is not known", "Known are http:, https:, data: and file:.")
    return _path(path if _exists(path) else _from_home(source), name)


def file_address(source: str, name: str) -> Path:
    """The path in a file: address of this computer. Raises ImageUnreadable."""
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise ImageUnreadable(name, "the address is malformed") from error
    if parts.netloc not in ("", "localhost"):
        raise ImageUnreadable(name, f"the file is on another computer, {parts.netloc}", "Copy it to this one.")
    if parts.path in ("", "/"):
        raise ImageUnreadable(name, "the address names no file")
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
        raise ImageUnreadable(name, "it is closed", "Send the picture through a pipe, or give its path.")
    return _limited(sys.stdin.buffer, name)


def _limited(pipe: BinaryIO, name: str) -> BinaryIO:
    """All that a pipe holds; one without an end must not fill the memory."""
    data = pipe.read(MAX_PIPE_BYTES + 1)
    if len(data) > MAX_PIPE_BYTES:
        raise ImageTooLarge(name, f"The picture {name} has more than {MAX_PIPE_BYTES // 2**20} MiB.")
    return BytesIO(data)


def _path(path: Path, name: str) -> BinaryIO:
    try:
        file = path.open("rb")
    except IsADirectoryError as error:
        raise ImageUnreadable(name, "it is a folder") from error
    except PermissionError as error:
        raise ImageUnreadable(name, "no permission to read it", "Check the file's permissions.") from error
    except (OSError, ValueError) as error:  # missing, a name too long, a NUL
        raise ImageNotFound(name) from error
    if file.seekable():
        return file
    with file:  # a named pipe
        return _limited(file, name)


def data_uri(uri: str, name: str) -> bytes:
    """What a data: URI holds. Raises ImageUnreadable."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise ImageUnreadable(name, "a data: URI needs a comma before its data")
    data = unquote_to_bytes(body)
    del body  # each copy of a large picture counts
    if not head.lower().endswith(";base64"):
        return data
    try:
        data += b"=="
        return b64decode(data, altchars=b"-_" if b"-" in data or b"_" in data else None)
    except ValueError as error:
        raise ImageUnreadable(name, "its base64 is damaged") from error


@contextmanager
def _pil_set_up() -> Iterator[None]:
    """PIL's own size check off (ours states both numbers), and no warnings of odd metadata, which nobody can mend."""
    from PIL import Image

    with PIL_SETTINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _sentences(name: str) -> Iterator[None]:
    """Decoders of damaged files raise nearly anything; all of it means that the picture cannot be read."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageUnreadable(name, "it is not a picture of a known format") from error
    except Exception as error:
        raise ImageDamaged(name, f"it is damaged or cut short ({reason_of(error)})") from error


def _open(file: BinaryIO, name: str) -> Image.Image:
    """Read the header."""
    from PIL import Image

    if not file.read(1):
        raise ImageUnreadable(name, "it is empty", "Download or copy it again.")
    file.seek(0)
    return Image.open(file, formats=FORMATS)


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        sentence = f"The picture {name} has {width}x{height} = {width * height:,} pixels, more than {max_pixels:,}."
        raise ImageTooLarge(name, sentence)
    if not width or not height:
        raise ImageUnreadable(name, f"it has no pixels ({width}x{height})")
