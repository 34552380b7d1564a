"""What a request calls a picture in, an RGB picture out, as far as the server's policy lets it; knows no requests.

A request may bring a picture as a data: URI, name one on the web, or one below the server's media path. Nothing else
is looked at: not the server's standard input, not its home folder, not its network.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixtral_cli.prompt import fetch, media
from pixtral_cli.prompt.errors import (
    ImageDamaged,
    ImageNotFound,
    ImageRefused,
    ImageTooLarge,
    ImageUnreadable,
)
from pixtral_cli.server.network import LookUp, Network, NetworkPolicy
from pixtral_cli.server.room import Room
from pixtral_cli.server.structure import check_structure
from pixtral_cli.server.threads import check_waited_for

if TYPE_CHECKING:
    from PIL import Image

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
LARGE_PIXELS = 16_000_000
PIXELS_AT_ONCE = 64_000_000
"""Pixels in memory at one time, of small pictures and again of large ones, from decoding until they are scaled. PIL
takes 4 bytes for each, and 4 more while it turns a picture or puts it on white. A picture with more goes alone."""
WAIT_SECONDS = 60.0
BLOCK_BYTES = 64 * 2**20
"""In which PIL takes memory. What is below 32 MiB, as its own 16 are, glibc may keep for good when it is let go of."""
MEDIA_PATH_HINT = "Send the picture itself, as a data: URI; the server's --media-path says which files it may read."


@dataclass(frozen=True)
class PicturePolicy:
    """What pictures a server's clients may make it read."""

    allowed_domains: tuple[str, ...] = ()
    """The only hosts, if any are given: a name means itself, "*.example.org" or ".example.org" the names below it."""
    private_networks: tuple[Network, ...] = ()
    """Networks that may be reached although they are not public; never link-local or metadata addresses."""
    media_path: Path | None = None
    """The folder whose files may be named; None for no files."""
    max_pixels: int = media.MAX_PIXELS
    max_bytes: int = fetch.MAX_BYTES
    """Of one picture, downloaded or in a file; what a data: URI brings is bounded by the request's body."""
    connect_seconds: float = fetch.CONNECT_SECONDS
    total_seconds: float = fetch.TOTAL_SECONDS
    redirects: int = 3


class GuardedPictures:
    """`opened` is for `Processor.open_picture`: it blocks, so it belongs on a worker thread; any number may call it."""

    def __init__(self, policy: PicturePolicy, look_up: LookUp | None = None) -> None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None  # `media.decoded` checks; per picture, a lock would let one hold up all others
        Image.core.set_block_size(BLOCK_BYTES)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self.policy = policy
        known = {"look_up": look_up} if look_up else {}
        network = NetworkPolicy(policy.allowed_domains, policy.private_networks, **known)
        self.guard = fetch.Guard(network.dial, policy.redirects)
        self.media_path = policy.media_path.resolve() if policy.media_path else None
        self.small, self.large = Room(PIXELS_AT_ONCE), Room(PIXELS_AT_ONCE)

    @contextmanager
    def opened(self, source: Any) -> Iterator[Image.Image]:
        """The picture, upright, on white, 8-bit RGB. Others wait for their turn until it is let go of.

        Raises:
            ImageError: its text has nothing in it that the client did not send, or should not know.
            NobodyWaits: the client has left.
        """
        name = media.name_of(source)
        check_waited_for()
        data = self._bytes(source, name)
        check_structure(data, name)
        turn = partial(self._turn, name)
        try:
            with media.decoded(BytesIO(data), name, max_pixels=self.policy.max_pixels, turn=turn) as picture:
                yield picture
        except ImageDamaged:
            raise ImageUnreadable(name, "it is damaged or cut short", ImageDamaged.default_hint) from None

    def _bytes(self, source: Any, name: str) -> bytes:
        if not isinstance(source, str) or not source:
            raise ImageUnreadable(name, "it should be an address or a data: URI")
        known = SCHEME.match(source[:16])
        scheme = known[1].lower() if known else ""
        if scheme == "data":
            return media.data_uri(source, name)
        if scheme in ("http", "https"):
            return self._download(source)
        if scheme == "file":
            return self._local(media.file_address(source, name), name)
        if scheme or source == media.STDIN or source.startswith(("~", "/")):
            raise ImageUnreadable(name, "such an address is not known", "Known are http:, https:, data: and file:.")
        return self._local(Path(source), name)

    def _download(self, url: str) -> bytes:
        policy = self.policy
        return fetch.fetch(
            url,
            connect=policy.connect_seconds,
            total=policy.total_seconds,
            max_bytes=policy.max_bytes,
            guard=self.guard,
        )

    def _local(self, path: Path, name: str) -> bytes:
        """The bytes of a regular file below the media path, wherever links on the way lead."""
        if self.media_path is None:
            raise ImageRefused(name, "this server reads no files of its own for a request", MEDIA_PATH_HINT)
        try:
            real = (self.media_path / path).resolve()
            self._check_below(real, name)
            if not stat.S_ISREG(real.stat().st_mode):  # a device could be harmed by being opened
                raise ImageNotFound(name)
            with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                self._check_below(Path(os.readlink(f"/proc/self/fd/{file.fileno()}")), name)  # swapped meanwhile?
                data = file.read(self.policy.max_bytes + 1)
        except (OSError, ValueError, RuntimeError):  # missing, not permitted, a NUL, links in a circle
            raise ImageNotFound(name) from None
        if len(data) > self.policy.max_bytes:
            limit = f"{self.policy.max_bytes / 2**20:g} MiB"
            raise ImageTooLarge(name, f"The picture {name} is larger than {limit}.")
        return data

    def _check_below(self, path: Path, name: str) -> None:
        if not path.is_relative_to(self.media_path):
            raise ImageRefused(name, "it is not below the server's media path", MEDIA_PATH_HINT)

    @contextmanager
    def _turn(self, name: str, pixels: int) -> Iterator[None]:
        """Large pictures take memory and time: they wait for each other, and the small ones do not wait for them."""
        room = self.large if pixels > LARGE_PIXELS else self.small
        with ExitStack() as held:
            try:
                held.enter_context(room.held(pixels, WAIT_SECONDS))
            except TimeoutError:
                reason = "the server is decoding too many others"
                raise ImageRefused(name, reason, "Try again, or send it smaller.") from None
            check_waited_for()
            yield
