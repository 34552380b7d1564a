"""Images that become one square, against transformers' own processors with PIL."""

import json
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image
from support.pictures import noise
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from pixtral_cli.prompt import cropped
from pixtral_cli.prompt.cropped import CroppedSpec
from pixtral_cli.prompt.image import prepare
from pixtral_cli.prompt.side_file import SideFile, SideFileUnreadable

SIDE = 56
SIZES = [(56, 56), (57, 56), (55, 80), (640, 481), (333, 1001), (31, 17), (5, 300), (300, 1), (1, 1), (111, 112)]
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
SETTINGS = {
    "as published": {},
    "padded": {"do_pad": True},
    "a larger edge": {"size": {"shortest_edge": 70}},
    "a smaller edge": {"size": {"shortest_edge": 40}},
    "stretched": {"size": {"height": SIDE, "width": SIDE}},
    "stretched and not cropped": {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
    "not resized": {"do_resize": False},
    "bilinear": {"resample": 2},
    "other colours": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "do_pad": True},
    "not normalised": {"do_normalize": False},
}


def ours(image, config, side=SIDE):
    spec = CroppedSpec(14, side).with_preprocessor(SideFile(config)).with_preprocessor(SideFile())
    return prepare(image, "hf", spec)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [LlavaImageProcessorPil, CLIPImageProcessorPil])
@pytest.mark.parametrize("name", SETTINGS)
def test_pixels_are_those_of_transformers(kind, name, size):
    if kind is CLIPImageProcessorPil and "do_pad" in SETTINGS[name]:
        pytest.skip("CLIP's processor pads a batch")
    theirs = kind(**{**CROP, **SETTINGS[name]})
    image = noise(*size)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    prepared = ours(image, json.loads(theirs.to_json_string()))
    assert (prepared.width, prepared.height) == (SIDE, SIDE)
    torch.testing.assert_close(prepared.pixels(), expected, atol=2e-6, rtol=0)
    assert prepared.compact().pixels().equal(prepared.pixels())


def test_lengths_may_be_numbers_as_in_old_files():
    assert ours(noise(90, 60), {"size": 56, "crop_size": 56}).spec == ours(noise(90, 60), CROP).spec


def test_without_a_file_the_tower_says_the_size():
    image = noise(90, 60)
    assert prepare(image, "hf", CroppedSpec(14, SIDE)).pixels().equal(ours(image, CROP).pixels())


def test_tokens_follow_each_other_without_row_ends():
    spec = CroppedSpec(14, SIDE)
    assert [prepare(noise(90, 60), "hf", each).tokens for each in (spec, replace(spec, own_tokens=1))] == [16, 17]


def test_a_low_detail_is_the_same_square():
    spec = CroppedSpec(14, 1008)
    assert spec.at("low") == spec


@pytest.mark.parametrize("size", [(3, 70_000), (70_000, 3), (1, 9000)], ids=str)
def test_a_narrow_strip_never_becomes_a_giant(size, monkeypatch):
    """What the middle of the strip shows, with no more memory than the square's."""
    column = numpy.linspace(0, 255, max(size)).astype(numpy.uint8)
    strip = Image.fromarray(numpy.repeat(column[:, None], min(size), 1))
    strip = (strip if size[0] < size[1] else strip.transpose(Image.Transpose.TRANSPOSE)).convert("RGB")
    resized, resize = [], Image.Image.resize

    def watched(image, to, *rest, **options):
        resized.append(to)
        return resize(image, to, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    monkeypatch.setattr(cropped, "WHOLE_PIXELS", SIDE**2 * 100)
    seen = numpy.asarray(CroppedSpec(14, SIDE).resized(strip, SIDE, SIDE))
    assert resized == [(SIDE, SIDE)] and abs(seen.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("size", [(640, 481), (300, 7), (31, 40)], ids=str)
@pytest.mark.parametrize("edge", [40, 56, 70])
def test_only_what_is_left_of_it_is_resized_to_the_same_pixels(size, edge, monkeypatch):
    image, spec = noise(*size), CroppedSpec(14, SIDE, edges=(edge,))
    whole = numpy.asarray(spec.resized(image, SIDE, SIDE)).astype(int)
    monkeypatch.setattr(cropped, "WHOLE_PIXELS", 0)
    part = numpy.asarray(spec.resized(image, SIDE, SIDE)).astype(int)
    assert abs(part - whole).max() <= 1


def test_a_huge_square_is_padded_around_a_smaller_image(monkeypatch):
    image = Image.new("RGB", (4000, 2000), (9, 99, 199))
    exact = CroppedSpec(14, SIDE, padding=(0, 0, 0)).resized(image, SIDE, SIDE)
    monkeypatch.setattr(cropped, "PADDED_SIDE", 1000)
    close = CroppedSpec(14, SIDE, padding=(0, 0, 0)).resized(image, SIDE, SIDE)
    assert abs(numpy.asarray(exact).astype(int) - numpy.asarray(close)).mean() < 1


@pytest.mark.parametrize(
    "config",
    [
        {"crop_size": 28},
        {"crop_size": {"height": 56, "width": 28}},
        {"crop_size": "56"},
        {"size": {"shortest_edge": 0}},
        {"size": {"longest": 9}},
        {"do_center_crop": False},
        {"do_center_crop": False, "size": {"height": 56, "width": 28}},
        {"resample": 9},
        {"do_pad": "yes"},
    ],
    ids=str,
)
def test_what_makes_no_square_of_the_towers_side_is_refused(config):
    with pytest.raises(SideFileUnreadable, match=next(iter(config)) if "do_center_crop" not in config else "size"):
        ours(noise(9, 9), config)
