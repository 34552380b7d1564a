"""Which images an HTTP request may name, and how they are read: what guards a server from its clients' images.

A request may bring an image as a data: URI, name one on the web, or one below the server's media path. Nothing else
is looked at: not the server's standard input, not its home folder, not its network. A host's name is looked up once,
every address that it has is checked, and the connection goes to one of those, so that a second answer of the name's
owner changes nothing. Addresses, not spellings, are judged: 0x7f.1 is whatever the look-up makes of it.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixtral_cli.prompt import media
from pixtral_cli.prompt.errors import ImageDamaged, ImageNotFound, ImageRefused, ImageTooLarge, ImageUnreadable
from pixtral_cli.prompt.fetch import FetchLimits, fetch
from pixtral_cli.server.threads import WeightedSemaphore, raise_if_abandoned

if TYPE_CHECKING:
    from PIL import Image

LARGE_PIXELS = 16_000_000
PIXELS_AT_ONCE = 64_000_000
"""Pixels in memory at one time, of small images and again of large ones, from decoding until they are scaled. PIL
takes 4 bytes for each, and 4 more while it turns an image or puts it on white. An image with more goes alone."""
WAIT_SECONDS = 60.0
BLOCK_BYTES = 64 * 2**20
"""In which PIL takes memory. What is below 32 MiB, as its own 16 are, glibc may keep for good when it is let go of."""
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
MEDIA_PATH_HINT = "Send the picture itself, as a data: URI; the server's --media-path says which files it may read."
MAX_SCANS = 100
"""Programs write some ten. Each takes 5.6 ms for 169 million grey pixels, and can be as short as 340 bytes."""
MAX_PIECES = 50_000
"""JPEG segments or PNG chunks; of 32 MiB, programs make some four thousand."""
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""Restart markers and escaped bytes are part of a scan."""
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
LookUp = Callable[..., list[tuple]]
"""`socket.getaddrinfo`, or what stands for it in a test."""

NEVER = tuple(
    map(
        ip_network,
        (
            "169.254.0.0/16",  # link-local: the metadata services of AWS, Azure, Google, Oracle, Tencent and others
            "fe80::/10",
            "fd00:ec2::/32",  # AWS
            "fd20:ce::/32",  # Google
            "fd00:42::/32",  # Scaleway
            "168.63.129.16/32",  # Azure's host
            "100.100.100.200/32",  # Alibaba
            "192.0.0.192/32",  # Oracle
            "0.0.0.0/8",
            "::/128",
        ),
    )
)
"""Not reachable whatever is allowed: services that give a machine's keys to whoever asks from it."""
NOT_PUBLIC = tuple(map(ip_network, ("192.88.99.0/24", "2002::/16", "3fff::/20")))
"""6to4 relays, 6to4, documentation: what `is_global` leaves out."""
PUBLIC_IPV6 = ip_network("2000::/3")
NAT64 = ip_network("64:ff9b::/96")
LOW_BITS = (NAT64, *map(ip_network, ("64:ff9b:1::/48", "::ffff:0:0/96")))
"""IPv6 whose last 32 bits are an IPv4 address: NAT64 in both its ranges, and mapped."""
LOW_PORTS = (80, 443)
HIGH_PORT = 1024


class ConnectionRefusedByPolicy(OSError):
    """The policy does not let this host be reached; the text is the reason."""


@dataclass(frozen=True)
class MediaPolicy(FetchLimits):
    """What images a server's clients may make it read.

    `max_bytes` is of one image, downloaded or in a file; what a data: URI brings is bounded by the request's body.
    """

    allowed_domains: tuple[str, ...] = ()
    """The only hosts, if any are given: a name means itself, "*.example.org" or ".example.org" the names below it."""
    private_networks: tuple[Network, ...] = ()
    """Networks that may be reached although they are not public; never link-local or metadata addresses."""
    media_path: Path | None = None
    """The folder whose files may be named; None for no files."""
    max_pixels: int = media.MAX_PIXELS
    look_up: LookUp = socket.getaddrinfo

    def dial(self, host: str, port: int, seconds: float) -> socket.socket:
        """A connection to `host`, within `seconds` for all of its addresses together.

        Raises:
            ConnectionRefusedByPolicy: its name, its port or one of its addresses is not allowed.
            OSError: unknown, or out of reach.
        """
        name = host.lower().rstrip(".")
        if self.allowed_domains and not any(_matches(name, rule.lower()) for rule in self.allowed_domains):
            raise ConnectionRefusedByPolicy("pictures from this host are not allowed on this server")
        found = self.look_up(host, port, type=socket.SOCK_STREAM)
        for *_, target in found:
            self._check_address(ip_address(target[0]), port)
        return _first_to_answer(found, time.monotonic() + seconds)

    def _check_address(self, address: Address, port: int) -> None:
        inner = _ipv4_in(address)
        if _within(address, NEVER) or (inner and _within(inner, NEVER)):
            raise ConnectionRefusedByPolicy("its address is never allowed")
        if _within(address, self.private_networks):
            return
        if not is_public(address):
            raise ConnectionRefusedByPolicy("its address is not a public one")
        if port < HIGH_PORT and port not in LOW_PORTS:
            raise ConnectionRefusedByPolicy(f"port {port} is not one for pictures")


class RequestImages(media.ImageReader):
    """`opened` blocks, so it belongs on a worker thread; any number may call it.

    What it raises has nothing in its text that the client did not send, or should not know. Abandoned: it has left.
    """

    def __init__(self, policy: MediaPolicy) -> None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None  # `decode` checks; per image, a lock would let one hold up all others
        Image.core.set_block_size(BLOCK_BYTES)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self.policy, self.max_pixels = policy, policy.max_pixels
        self.media_path = policy.media_path.resolve() if policy.media_path else None
        self.small, self.large = WeightedSemaphore(PIXELS_AT_ONCE), WeightedSemaphore(PIXELS_AT_ONCE)

    def read(self, source: Any, name: str) -> AbstractContextManager[Any]:
        raise_if_abandoned()
        if not isinstance(source, str) or not source:
            raise ImageUnreadable(name, "it should be an address or a data: URI")
        return super().read(source, name)

    def read_other(self, source: Any, name: str) -> BytesIO:
        """A name relative to the media path."""
        if SCHEME.match(source[:16]) or source == media.STDIN or source.startswith(("~", "/")):
            raise media.unknown_address(name)
        return self.read_path(Path(source), name)

    def read_path(self, path: Path, name: str) -> BytesIO:
        """A regular file below the media path, wherever links on the way lead."""
        if self.media_path is None:
            raise ImageRefused(name, "this server reads no files of its own for a request", MEDIA_PATH_HINT)
        try:
            real = (self.media_path / path).resolve()
            _check_below(real, self.media_path, name)
            if not stat.S_ISREG(real.stat().st_mode):  # a device could be harmed by being opened
                raise ImageNotFound(name)
            with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                opened = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))  # it may have been swapped meanwhile
                _check_below(opened, self.media_path, name)
                data = file.read(self.policy.max_bytes + 1)
        except (OSError, ValueError, RuntimeError):  # missing, not permitted, a NUL, links in a circle
            raise ImageNotFound(name) from None
        if len(data) > self.policy.max_bytes:
            raise ImageTooLarge(name, f"The picture {name} is larger than {self.policy.max_bytes / 2**20:g} MiB.")
        return BytesIO(data)

    def download(self, url: str) -> bytes:
        return fetch(url, self.policy, self.policy.dial)

    def decode(self, file: Any, name: str, memory: ExitStack) -> Image.Image:
        check_structure(file.getvalue(), name)
        try:
            return super().decode(file, name, memory)
        except ImageDamaged:
            raise ImageUnreadable(name, "it is damaged or cut short", ImageDamaged.default_hint) from None

    @contextmanager
    def pil_settings(self) -> Iterator[None]:
        """Made once, for the whole process."""
        yield

    @contextmanager
    def memory(self, pixels: int, name: str) -> Iterator[None]:
        """Large images take memory and time: they wait for each other, and the small ones do not wait for them."""
        semaphore = self.large if pixels > LARGE_PIXELS else self.small
        with ExitStack() as held:
            try:
                held.enter_context(semaphore.held(pixels, WAIT_SECONDS))
            except TimeoutError:
                reason = "the server is decoding too many others"
                raise ImageRefused(name, reason, "Try again, or send it smaller.") from None
            raise_if_abandoned()
            yield


def _check_below(path: Path, folder: Path, name: str) -> None:
    if not path.is_relative_to(folder):
        raise ImageRefused(name, "it is not below the server's media path", MEDIA_PATH_HINT)


def is_public(address: Address) -> bool:
    """Whether anybody on the internet could reach `address`.

    Of IPv6 only global unicast counts, and IPv4 through NAT64 if that is public; the other ways to write IPv4 in IPv6
    (mapped, compatible, 6to4, Teredo) are nobody's real address.
    """
    inner = _ipv4_in(address)
    if inner and address in NAT64:
        return is_public(inner)
    if isinstance(address, IPv6Address) and address not in PUBLIC_IPV6:
        return False
    return address.is_global and not address.is_multicast and not _within(address, (*NOT_PUBLIC, *NEVER))


def _ipv4_in(address: Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for, however it is packed."""
    if isinstance(address, IPv4Address):
        return None
    low = IPv4Address(int(address) & 0xFFFFFFFF)
    if any(address in network for network in LOW_BITS):
        return low
    return address.sixtofour or (address.teredo[1] if address.teredo else None)


def _within(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def _matches(name: str, rule: str) -> bool:
    below = rule.removeprefix("*")
    return name.endswith(below) if below.startswith(".") else name == rule.rstrip(".")


def _first_to_answer(found: list[tuple], deadline: float) -> socket.socket:
    last: OSError = OSError("its name has no address")
    for family, kind, protocol, _, target in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect(target)
            return connection
        except OSError as error:
            connection.close()
            last = error
    raise last


def check_structure(data: bytes, name: str) -> None:
    """Raise ImageUnreadable for a file with more scans or pieces than any program would write.

    A file can stay within every limit on bytes and pixels and still keep a decoder busy for minutes: a JPEG may go
    over all its pixels in each of thousands of scans, and files may be cut into millions of pieces. Other formats and
    other tricks are held by Pillow's own limits, which tests/server/test_attacks_pictures.py measures.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data, name)
    elif data.startswith(b"\x89PNG"):
        _check_png(data, name)


def _check_jpeg(data: bytes, name: str) -> None:
    place = scans = pieces = 0
    while found := JPEG_MARKER.search(data, place + 2):
        marker, place = found[1][0], found.end()
        scans, pieces = scans + (marker == START_OF_SCAN), pieces + 1
        if scans > MAX_SCANS or pieces > MAX_PIECES:
            raise _too_many(name, "scans" if scans > MAX_SCANS else "segments")
        if marker == END_OF_IMAGE:
            return
        place += max(0, int.from_bytes(data[place : place + 2], "big") - 2)


def _check_png(data: bytes, name: str) -> None:
    place = 8
    for _ in range(MAX_PIECES):
        if place >= len(data):
            return
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    raise _too_many(name, "chunks")


def _too_many(name: str, parts: str) -> ImageUnreadable:
    return ImageUnreadable(name, f"it is made of too many {parts}", "Open and save it with another program.")
