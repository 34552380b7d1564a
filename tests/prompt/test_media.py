"""Pictures of every kind become 8-bit RGB on white, the right way up, and what is no picture is one sentence."""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import sys
import threading
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.image import _convert_to_rgb
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from pixtral_cli.prompt import media
from pixtral_cli.prompt.errors import ImageError, ImageNotFound, ImageTooLarge, ImageUnreadable

RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (9, 14, 4), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (9, 14), dtype=np.uint16)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def load(source, reader=None):
    with (reader or media.ImageReader()).opened(source) as image:
        return image


class Limited(media.ImageReader):
    """Takes images of so many pixels."""

    def __init__(self, max_pixels):
        self.max_pixels = max_pixels


def reopened(image: Image.Image, form: str = "PNG", **options) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, form, **options)))


RGB, RGBA = Image.fromarray(NOISE[..., :3].copy()), Image.fromarray(NOISE)
EIGHT_BIT = {
    "1": RGB.convert("1"),
    "L": RGB.convert("L"),
    "LA": RGBA.convert("LA"),
    "P": RGB.convert("P"),
    "P with a transparent colour": reopened(RGB.convert("P"), transparency=3),
    "P with alphas": reopened(RGB.quantize(8), transparency=bytes([0, 128, 255, 7, 9, 200, 255, 0])),
    "L with a transparent grey": reopened(RGB.convert("L"), transparency=int(RGB.convert("L").getpixel((0, 0)))),
    "RGB with a transparent colour": reopened(RGB, transparency=RGB.getpixel((1, 1))),
    "PA": RGBA.convert("LA").convert("PA"),
    "RGB": RGB,
    "RGBA": RGBA,
    "CMYK": RGB.convert("CMYK"),
    "YCbCr": RGB.convert("YCbCr"),
    "HSV": RGB.convert("HSV"),
}


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_every_mode_becomes_the_rgb_that_transformers_makes_of_it(kind):
    ours = array(load(EIGHT_BIT[kind]))
    assert np.abs(ours - convert_to_rgb(EIGHT_BIT[kind], return_numpy=True)).max() <= 1


# mistral-common keeps the hidden colours of an RGB picture that names one colour as transparent.
@pytest.mark.parametrize("kind", sorted(EIGHT_BIT.keys() - {"RGB with a transparent colour"}))
def test_every_mode_becomes_the_rgb_that_mistral_common_makes_of_it(kind):
    assert np.array_equal(array(load(EIGHT_BIT[kind])), np.asarray(_convert_to_rgb(EIGHT_BIT[kind])))


SIXTEEN_BIT = {
    "I;16 PNG": encoded(Image.fromarray(GREY16)),
    "I;16 TIFF": encoded(Image.fromarray(GREY16), "TIFF"),
    "I;16B TIFF": encoded(Image.frombytes("I;16B", (14, 9), GREY16.astype(">u2").tobytes()), "TIFF"),
}


@pytest.mark.parametrize("kind", SIXTEEN_BIT)
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    expected = GREY16.astype(float) * 255 / 65535
    ours = array(load(SIXTEEN_BIT[kind]))
    assert np.abs(ours - expected[..., None]).max() <= 0.51


def test_a_sixteen_bit_colour_png_keeps_its_high_bytes():
    samples = RNG.integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", 6, 5, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    assert np.abs(array(load(data)) - samples * (255 / 65535)).max() <= 1


@pytest.mark.parametrize("mode", ["I", "I;16"])
def test_integer_images_in_memory_are_scaled_from_sixteen_bits(mode):
    image = Image.fromarray(GREY16.astype(np.int32)) if mode == "I" else Image.fromarray(GREY16)
    assert np.abs(array(load(image)) - (GREY16 / 257.0)[..., None]).max() <= 0.51


@pytest.mark.parametrize(("top", "stated"), [(200, None), (40_000, None), (2**31 - 1, None), (200, 65_535)])
def test_a_32_bit_tiff_is_scaled_from_the_range_that_its_values_or_its_header_show(top, stated):
    values = (RNG.random((9, 14)) * top).astype(np.int32)
    values[0, 0] = top
    tags = {"tiffinfo": {281: stated}} if stated else {}
    ours = array(load(encoded(Image.fromarray(values), "TIFF", **tags)))
    white = next(white for white in (255, 65_535, 2**31 - 1) if max(top, stated or 0) <= white)
    assert np.abs(ours - (values.astype(float) * 255 / white)[..., None]).max() <= 0.51


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_images_are_read_as_0_to_1_or_0_to_255(top):
    values = RNG.random((9, 14)).astype(np.float32)
    ours = array(load(Image.fromarray(values * np.float32(top))))
    assert np.abs(ours - (values * 255)[..., None]).max() <= 0.51


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(form, orientation):
    """A corner that is dark in the upright picture stays there, whichever way the file stores it."""
    upright = np.full((24, 40, 3), 255, np.uint8)
    upright[:8, :8] = 0
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    turned = upright.transpose(1, 0, 2)
    stored |= {5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1]}
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored[orientation])), form, exif=exif, **options)
    assert np.abs(array(load(data)) - upright).max() <= 8


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_that_was_loaded_is_not_turned_again(form):
    exif = Image.Exif()
    exif[0x0112] = 6
    once = load(encoded(RGB, form, exif=exif))
    assert once.size == (RGB.height, RGB.width)
    assert np.array_equal(array(load(once)), array(once))


def test_a_picture_of_the_callers_is_left_as_it_was():
    exif = Image.Exif()
    exif[0x0112] = 6
    mine = reopened(RGB, "JPEG", exif=exif)
    load(mine)
    assert mine.size == RGB.size and "exif" in mine.info


def test_a_damaged_exif_block_does_not_spoil_the_picture():
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 9)
    assert load(data).size == RGB.size


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_seen(form):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(array(load(data)), array(frames[0]))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_every_format_is_read(form):
    assert load(encoded(RGB, form)).size == RGB.size


def test_a_cmyk_jpeg_is_read():
    assert np.abs(array(load(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))) - [255, 0, 0]).max() < 5


@pytest.mark.parametrize("form", ["ICO", "PPM", "TGA", "PDF", "EPS"])
def test_other_formats_are_not_even_tried(form):
    with pytest.raises(ImageUnreadable, match="known format"):
        load(encoded(RGB, form))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(encoded(RGB))
    return path


def test_a_picture_comes_from_wherever_it_is_named(file, monkeypatch):
    data = file.read_bytes()
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    quoted = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    unpadded = uri.rstrip("=")
    named = [str(file), file, file.name, f"~/{file.name}", file.as_uri(), uri, quoted, unpadded, f" {uri}\n"]
    for source in (*named, "-", data, RGB):
        assert np.array_equal(array(load(source)), array(RGB)), source


def test_an_address_goes_through_the_download_of_the_reader():
    class Reader(media.ImageReader):
        def download(self, url):
            asked.append(url)
            return encoded(RGB)

    asked = []
    assert np.array_equal(array(load("https://example.org/a.png", Reader())), array(RGB))
    assert asked == ["https://example.org/a.png"]


@pytest.mark.parametrize(
    "name", ["missing.png", "~nobody-by-this-name/x.png", "a\0b.png", "~a\0b", "x" * 5000, "file:///missing"]
)
def test_a_missing_file_is_one_sentence(name):
    with pytest.raises(ImageNotFound) as caught:
        load(name)
    assert caught.value.hint


@pytest.mark.parametrize("source", [np.zeros((4, 4, 3), np.uint8), 7, None, ["a.png"]], ids=repr)
def test_what_is_no_picture_at_all_is_one_sentence(source):
    with pytest.raises(ImageUnreadable, match="no path") as caught:
        load(source)
    assert caught.value.hint


def test_a_tilde_is_the_home_folder_only_where_it_is_typed_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~x.png").write_bytes(encoded(RGB))
    (tmp_path / "~root").write_bytes(encoded(RGB))
    assert all(load(name).size == RGB.size for name in ("./~x.png", "~x.png", "~root"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", 'picture "": it has no name'),
        ("  ", 'No picture at "  "'),
        ("file://", "names no file"),
        ("file://elsewhere/etc/passwd", "another computer, elsewhere"),
        ("ftp://example.org/a.png", "address is not known"),
        ("s3://bucket/a.png", "address is not known"),
        (b"", "is empty"),
        ("http://ann:secret@example.org/a.png", "password is not supported"),
        ("http://example.org:99999/a.png", "Port out of range"),
        ("http://example.org:x/a.png", "Port could not be cast"),
        ("http:///a.png", "names no server"),
    ],
)
def test_a_name_that_can_be_none_says_why(name, said):
    with pytest.raises(ImageError, match=re.escape(said)) as caught:
        load(name)
    assert caught.value.hint and "secret" not in str(caught.value) + caught.value.name


def test_standard_input_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(media, "MAX_PIPE_BYTES", 2**20)
    with open("/dev/zero", "rb") as endless:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=endless))
        with pytest.raises(ImageTooLarge, match="1 MiB"):
            load("-")


def test_a_named_pipe_is_read(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(encoded(RGB),))
    writer.start()
    assert load(path).size == RGB.size
    writer.join()


def test_a_picture_that_was_checked_loads_as_it_would_have(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RGB))
    uri = "data:image/png;base64," + base64.b64encode(encoded(RGB)).decode()
    for kept in (RGB.width * RGB.height, 1):
        monkeypatch.setattr(media, "KEPT_PIXELS", kept)
        for source in (path, str(path), path.as_uri(), uri, encoded(RGB)):
            assert np.array_equal(array(load(media.checked(source))), array(RGB)), source
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(encoded(RGB))))
        assert np.array_equal(array(load(media.checked("-"))), array(RGB))


def test_a_large_picture_that_was_checked_is_not_kept_decoded(tmp_path):
    path, data = tmp_path / "a.png", encoded(Image.new("RGB", (3000, 2000)))
    path.write_bytes(data)
    assert media.checked(path) == path and media.checked(data) == data
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageUnreadable):
        media.checked(path)


def test_closed_standard_input_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ImageUnreadable, match="closed"):
        load("-")


def test_warning_filters_and_the_limit_of_pil_stay_the_callers():
    with warnings.catch_warnings():
        before, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
        load(encoded(RGB))
        with pytest.raises(ImageUnreadable):
            load(b"nothing")
        assert (warnings.filters, Image.MAX_IMAGE_PIXELS) == (before, limit)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ImageUnreadable, match="folder"):
        load(tmp_path)


@pytest.mark.parametrize("uri", ["data:image/png;base64", "data:image/png;base64,AAA%%%", "data:,hello", "data:,"])
def test_a_damaged_data_uri_is_one_sentence(uri):
    with pytest.raises(ImageUnreadable):
        load(uri)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_picture_is_one_sentence_that_names_it(tmp_path, form, part):
    whole = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), form)
    path = tmp_path / "cut.bin"
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ImageUnreadable, match=r"cut\.bin") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 9_000), (100_000, 100_000), (178_000_001, 1)])
def test_a_bomb_is_refused_by_its_header_with_both_numbers(size, recwarn):
    with pytest.raises(ImageTooLarge) as caught:
        load(bomb(*size))
    assert f"{size[0] * size[1]:,}" in str(caught.value)
    assert "178,000,000" in str(caught.value)
    assert not recwarn.list


def test_the_pixel_limit_can_be_set(recwarn):
    with pytest.raises(ImageTooLarge, match="100"):
        load(RGB, Limited(100))
    assert load(RGB, Limited(RGB.width * RGB.height)).size == RGB.size
    with pytest.raises(ImageUnreadable):  # within the limit, so its missing pixels are noticed
        load(bomb(20_000, 10_000), Limited(10**9))
    assert not recwarn.list


@given(st.one_of(st.binary(max_size=60), st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_arbitrary_and_damaged_bytes_never_escape_as_anything_but_a_picture_error(data, draw):
    if isinstance(data, str):
        whole = bytearray(encoded(RGB, data))
        for _ in range(draw.draw(st.integers(1, 8))):
            whole[draw.draw(st.integers(0, len(whole) - 1))] = draw.draw(st.integers(0, 255))
        data = bytes(whole)
    try:
        assert load(data).mode == "RGB"
    except ImageError as error:
        assert error.hint and "\n" not in str(error)
