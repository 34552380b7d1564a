"""A path, an address or the bytes of an image in, an RGB PIL image out; knows no patches and no tokens.

Only the formats listed are tried, and the header's size is checked before a pixel is decoded. `ImageReader` reads for
whoever runs the program; a server's subclass lets a request name less.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import warnings
from base64 import b64decode
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from pixtral_cli.errors import reason_of
from pixtral_cli.prompt.errors import (
    PASSWORD,
    ImageDamaged,
    ImageError,
    ImageNotFound,
    ImageTooLarge,
    ImageUnreadable,
)
from pixtral_cli.prompt.image import to_rgb

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_000_000
KEPT_PIXELS = 4_000_000
"""Up to this size, 16 MB, an image is kept decoded. To decode 12 million pixels again takes a tenth of a second."""
MAX_PIPE_BYTES = 256 * 2**20
ADDRESS = re.compile(r"\s*(data|file|https?):", re.IGNORECASE)
OTHER_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
STDIN = "-"
FROM_ARRAY = "Of an array, PIL.Image.fromarray makes a picture."
PIL_SETTINGS = threading.Lock()
"""Held while PIL works: its pixel limit and Python's warning filters belong to the whole process."""


class ImageReader:
    """Reads images for whoever runs the program: any path, http(s) address, data: URI, pipe, bytes or PIL.Image.

    Everything that a stranger must not do is in a method of its own (`read_path`, `read_other`, `download`), and so is
    what the process shares (`pil_settings`, `memory`): a subclass has stricter ones.
    """

    max_pixels = MAX_PIXELS
    """Width times height that the header may state."""

    @contextmanager
    def opened(self, source: Any) -> Iterator[Image.Image]:
        """The image as people see it: first frame, turned as its EXIF says, transparency on white, 8-bit RGB.

        Args:
            source: a path ("~" is the home folder), an http(s) or file address, a data: URI, "-" for standard input,
                the bytes of a file, or a PIL.Image; what `opened` gave comes back as it is.

        Raises:
            ImageError: ImageNotFound, ImageUnreadable, ImageTooLarge or ImageFetchFailed, naming the image.
        """
        name = name_of(source)
        with ExitStack() as memory:
            with self.read(source, name) as file:
                image = self.decode(file, name, memory)
            yield image

    def checked(self, source: Any) -> Any:
        """Decode an image, so that what is wrong with it is told now. Returns what can be opened in its place.

        Standard input and the web are read only once. A large image is kept as its bytes, or by its name if it is a
        file: many decoded ones would fill the memory before they are needed.

        Raises:
            ImageError: as `opened`.
        """
        name = name_of(source)
        with self.read(source, name) as file, ExitStack() as memory:
            image = self.decode(file, name, memory)
            if image.width * image.height <= KEPT_PIXELS:
                return image
            return file.getvalue() if isinstance(file, BytesIO) else source

    def decode(self, file: Any, name: str, memory: ExitStack) -> Image.Image:
        """The image in a file, or a PIL.Image; `memory` then holds what its pixels take."""
        with self.pil_settings():
            with _sentences(name):
                image = _with_header(file, name, self.max_pixels)
            memory.enter_context(self.memory(image.width * image.height, name))
            with _sentences(name):
                return to_rgb(image)

    def read(self, source: Any, name: str) -> AbstractContextManager[Any]:
        """The open file that `source` stands for; a PIL.Image stands for itself. Raises ImageError."""
        found = ADDRESS.match(source) if isinstance(source, str) else None
        if found is None:
            return self.read_other(source, name)
        source, scheme = source.strip(), found[1].lower()
        if scheme == "data":
            return BytesIO(data_uri(source, name))
        if scheme == "file":
            return self.read_path(file_address(source, name), name)
        return BytesIO(self.download(source))

    def read_other(self, source: Any, name: str) -> AbstractContextManager[Any]:
        """What is no address: bytes, an image, a path or standard input."""
        if is_image(source):
            return nullcontext(source)
        if isinstance(source, (bytes, bytearray)):
            return BytesIO(source)
        if not (isinstance(source, str) or hasattr(source, "__fspath__")):
            raise ImageUnreadable(name, "it is no path, address, bytes or PIL.Image", FROM_ARRAY)
        if source == STDIN:
            return _standard_input(name)
        if source == "":
            raise ImageUnreadable(name, "it has no name")
        path = Path(source)
        if isinstance(source, str) and not os.path.exists(path):
            if OTHER_ADDRESS.match(source):
                raise unknown_address(name)
            with suppress(ValueError):  # a NUL in the name of a user
                path = Path(os.path.expanduser(source))  # not of `path`: "./~x" is a file here
        return self.read_path(path, name)

    def read_path(self, path: Path, name: str) -> BinaryIO:
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

    def download(self, url: str) -> bytes:
        """The bytes at an http(s) address. Raises ImageFetchFailed."""
        from pixtral_cli.prompt.fetch import fetch

        return fetch(url)

    @contextmanager
    def pil_settings(self) -> Iterator[None]:
        """PIL's own size check off (ours states both numbers), and no warnings of odd metadata, which nobody can mend.

        Both belong to the whole process, so one image is decoded at a time.
        """
        from PIL import Image

        with PIL_SETTINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                yield
            finally:
                Image.MAX_IMAGE_PIXELS = limit

    def memory(self, pixels: int, name: str) -> AbstractContextManager[Any]:
        """Entered before `pixels` are decoded, left when the image is no longer needed."""
        return nullcontext()


_READER = ImageReader()
opened, checked = _READER.opened, _READER.checked


def is_image(source: Any) -> bool:
    """Whether it is a PIL.Image, or does what one does."""
    return hasattr(source, "convert") and hasattr(source, "size")


def name_of(source: Any) -> str:
    """What to call a picture in a sentence."""
    if isinstance(source, (bytes, bytearray)):
        return f"of {len(source)} bytes"
    if not isinstance(source, str):
        return str(source) if hasattr(source, "__fspath__") else f"({type(source).__name__})"
    if source == STDIN:
        return "from standard input"
    source = PASSWORD.sub(r"\1", source) if source.strip() else f'"{source}"'
    return source if len(source) <= 120 else f"{source[:40]}…"


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


def unknown_address(name: str) -> ImageUnreadable:
    return ImageUnreadable(name, "such an address is not known", "Known are http:, https:, data: and file:.")


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


def _with_header(file: Any, name: str, max_pixels: int) -> Image.Image:
    """The image in a file, of which only the header is read, or a PIL.Image; its size is one that we decode."""
    from PIL import Image

    image = file
    if not is_image(file):
        if not file.read(1):
            raise ImageUnreadable(name, "it is empty", "Download or copy it again.")
        file.seek(0)
        image = Image.open(file, formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        sentence = f"The picture {name} has {width}x{height} = {width * height:,} pixels, more than {max_pixels:,}."
        raise ImageTooLarge(name, sentence)
    if not width or not height:
        raise ImageUnreadable(name, f"it has no pixels ({width}x{height})")
    return image
