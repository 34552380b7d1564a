"""The bytes of a picture in, a refusal of those built to keep a decoder busy; decodes nothing itself.

A file can stay within every limit on bytes and pixels and still take minutes: a JPEG may go over all its pixels in
each of thousands of scans, and files may be cut into millions of pieces. Other formats and other tricks are held by
Pillow's own limits, which tests/server/test_attacks_pictures.py measures.
"""

from __future__ import annotations

import re

from pixtral_cli.prompt.errors import ImageUnreadable

MAX_SCANS = 100
"""Programs write some ten. Each takes 5.6 ms for 169 million grey pixels, and can be as short as 340 bytes."""
MAX_PIECES = 50_000
"""JPEG segments or PNG chunks; of 32 MiB, programs make some four thousand."""
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""Restart markers and escaped bytes are part of a scan."""
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9


def check_structure(data: bytes, name: str) -> None:
    """Raise ImageUnreadable for a file with more scans or pieces than any program would write."""
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
