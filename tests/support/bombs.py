"""Pictures that are small to send and dear to read, each within the formats' rules. All are made here."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, kind: int = 2, depth: int = 8, chunks: bytes = b"") -> bytes:
    """A PNG whose pixels are all zero; `chunks` come before them."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    row = bytes(1 + (width * samples * depth + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def png_profile(size: int) -> bytes:
    return png(8, 8, chunks=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(size), 9)))


def png_texts(count: int, size: int) -> bytes:
    packed = zlib.compress(bytes(size), 9)
    return png(8, 8, chunks=b"".join(chunk(b"zTXt", b"k%d\0\0" % n + packed) for n in range(count)))


def png_chunks(count: int) -> bytes:
    """Only empty private chunks."""
    return png(8, 8, chunks=chunk(b"prVt", b"") * count)


def tiff_structure(tags: int, size: int) -> bytes:
    """TIFF tags that all refer to the same `size` bytes."""
    body = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack("<HHII", 40000 + tag, 7, size, body) for tag in range(tags))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", tags) + entries + bytes(4) + bytes(size)


def tiff_tags(tags: int, size: int) -> bytes:
    """A proper TIFF with such tags in its first directory."""
    shape = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 278: 8, 279: 64}
    wanted = [(tag, 4 if tag == 279 else 3, 1, value) for tag, value in shape.items()]
    body = 8 + 2 + 12 * (tags + len(wanted) + 1) + 4
    entries = sorted([*wanted, (273, 4, 1, body)] + [(40000 + tag, 7, size, body) for tag in range(tags)])
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + packed + bytes(4) + bytes(max(size, 64))


def png_exif(tags: int, size: int) -> bytes:
    return png(8, 8, chunks=chunk(b"eXIf", tiff_structure(tags, size)))


def gif(width: int, height: int, before: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "GIF")
    whole = buffer.getvalue()
    colours = 3 * 2 ** ((whole[10] & 7) + 1) if whole[10] & 0x80 else 0
    return whole[: 13 + colours] + before + whole[13 + colours :]


def gif_comment(size: int) -> bytes:
    return gif(8, 8, b"\x21\xfe" + (b"\xff" + bytes(255)) * (size // 256) + b"\0")


def gif_extensions(count: int) -> bytes:
    return gif(8, 8, b"\x21\x01\0" * count)


def webp(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return buffer.getvalue()


def jpeg_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG that goes over all of its blank blocks again and again."""
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "JPEG", progressive=True, optimize=True)
    whole = buffer.getvalue()
    table = b"\xff\xc4" + struct.pack(">HB", 2 + 1 + 16 + 1, 0x10) + bytes([1] + [0] * 15) + b"\xe0"  # one code: EOB14
    blocks = -(-width // 8) * -(-height // 8)
    runs = -(-blocks // 16384)
    bits = "".join("0" + "0" * 14 for _ in range(runs))  # each: a code of one bit, then 14 bits of length
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    head = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0x10, 1, 63, 0x01)
    return whole[:-2] + table + (head + scan) * scans + b"\xff\xd9"


def jpeg_segments(count: int) -> bytes:
    """Only empty comments."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    return b"\xff\xd8" + b"\xff\xfe\0\2" * count + buffer.getvalue()[2:]


def tiff(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "TIFF", compression="tiff_deflate")
    return buffer.getvalue()


def tiff_strips(count: int) -> bytes:
    """A picture of one column in `count` strips, whose offsets all lead to one byte."""
    shape = {256: 1, 257: count, 258: 8, 259: 1, 262: 1, 278: 1}
    start = 8 + 2 + 12 * 8 + 4
    entries = [(tag, 4, 1, value) for tag, value in shape.items()]
    entries += [(273, 4, count, start), (279, 4, count, start + 4 * count)]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    tables = struct.pack("<I", 8) * count + struct.pack("<I", 10**6) * count
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + tables


def gif_frame(width: int, height: int) -> bytes:
    """A small screen with a frame that reaches far beyond it."""
    whole = bytearray(gif(8, 8))
    place = whole.index(b",", 13)
    whole[place + 5 : place + 9] = struct.pack("<HH", width, height)
    return bytes(whole)
