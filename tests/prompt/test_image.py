"""Sizes and pixels are those of transformers and mistral-common."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.protocol.instruct.chunk import ImageChunk
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)

from pixtral_cli.prompt.image import STD, ImageSpec, plan_size, prepare
from pixtral_cli.prompt.processor import ImageTokens
from pixtral_cli.prompt.side_file import SideFile

SIZES = [(1, 1), (1, 2), (16, 16), (17, 15), (300, 200), (90, 700), (3000, 400), (1025, 1023), (1024, 1024), (2000, 9)]
SIZES += [(4000, 10), (29, 28)]
THIN = [(1, 3000), (3000, 1)]
MODELS = {"pixtral": (16, 1, 1024), "mistral3": (14, 2, 1540)}
"""The side of a patch, how many are merged along each side, and the longest side."""
models = pytest.mark.parametrize("model", MODELS)
LEVEL = 1 / 255
sides = st.integers(1, 6000)


def spec_of(model: str) -> ImageSpec:
    patch, merge, longest = MODELS[model]
    return ImageSpec(patch * merge, longest)


def noise_or_ramp(width: int, height: int, kind: str = "noise") -> Image.Image:
    if kind == "noise":
        data = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    else:
        row, column = np.mgrid[0:height, 0:width]
        data = np.stack([row % 256, column % 256, (row + column) // 3 % 256], -1).astype(np.uint8)
    return Image.fromarray(data)


def difference(ours: torch.Tensor, theirs: np.ndarray) -> torch.Tensor:
    """Per pixel, as a part of the range from black to white."""
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    return (ours - torch.tensor(theirs)).abs() * torch.tensor(STD).view(3, 1, 1)


def transformers_pixels(image: Image.Image, model: str = "pixtral", **options) -> np.ndarray:
    """As `processing_pixtral.py` asks for them: the size of a patch is that of what becomes a token."""
    patch, merge, longest = MODELS[model]
    options = {
        "size": {"longest_edge": longest},
        "patch_size": {"height": patch * merge, "width": patch * merge},
    } | options
    return PixtralImageProcessorPil(**options)(image, return_tensors="np")["pixel_values"][0]


def mistral_encoder(model: str) -> ImageEncoder:
    patch, merge, longest = MODELS[model]
    return ImageEncoder(ImageConfig(patch, longest, merge), SpecialImageIDs(10, 12, 13))


@pytest.mark.parametrize("size", [(300, 200), (513, 40), (2000, 900), (1024, 1024)])
def test_in_low_detail_the_longest_side_is_at_most_512_pixels(size):
    image, spec = noise_or_ramp(*size, "ramp"), ImageSpec().at("low")
    theirs = transformers_pixels(image, size={"longest_edge": 512})
    assert difference(prepare(image, "hf", spec).pixels(), theirs).max() <= 2 * LEVEL
    native = ImageEncoder(ImageConfig(16, 512), SpecialImageIDs(10, 12, 13))(ImageChunk(image=image)).image
    assert difference(prepare(image, "native", spec).pixels(), np.ascontiguousarray(native)).max() <= LEVEL
    assert ImageSpec().at("high") == ImageSpec().at("auto") == ImageSpec()
    assert ImageSpec(longest_side=256).at("low").longest_side == 256


@models
@pytest.mark.parametrize("kind", ["noise", "ramp"])
@pytest.mark.parametrize("size", SIZES)
def test_hf_pixels_are_those_of_transformers(size, kind, model):
    image = noise_or_ramp(*size, kind)
    off = difference(prepare(image, "hf", spec_of(model)).pixels(), transformers_pixels(image, model))
    assert off.max() <= 2 * LEVEL
    assert off.mean() <= 0.5 * LEVEL


@models
@pytest.mark.parametrize("kind", ["noise", "ramp"])
@pytest.mark.parametrize("size", SIZES + THIN)
def test_native_pixels_and_ids_are_those_of_mistral_common(size, kind, model):
    image = noise_or_ramp(*size, kind)
    theirs, ours = mistral_encoder(model)(ImageChunk(image=image)), prepare(image, "native", spec_of(model))
    assert difference(ours.pixels(), np.ascontiguousarray(theirs.image)).max() <= 0.5 * LEVEL
    assert ImageTokens(10, 12, 13).grid(ours.rows, ours.columns) == theirs.tokens


@pytest.mark.parametrize("recipe", ["hf", "native"])
@pytest.mark.parametrize("size", [(3000, 2000), (1500, 1100), (300, 200), (5000, 9)])
def test_a_compact_image_has_the_same_pixels_and_sizes(size, recipe):
    whole = prepare(noise_or_ramp(*size), recipe, ImageSpec())
    compact = whole.compact()
    assert torch.equal(compact.pixels(), whole.pixels())
    assert (compact.original_size, compact.tokens) == (size, whole.tokens)


@pytest.mark.parametrize("recipe", ["hf", "native"])
def test_a_compact_image_takes_no_more_than_its_pixels(recipe):
    image = noise_or_ramp(3000, 2000)
    gone = weakref.ref(image)
    compact = prepare(image, recipe, ImageSpec()).compact()
    del image
    assert gone() is None and compact.pixels().nbytes == 12 * compact.width * compact.height


@pytest.mark.parametrize("recipe", ["hf", "native"])
@pytest.mark.parametrize("size", [(3000, 2000), (300, 200)])
def test_compact_images_have_one_key_if_their_pixels_are_the_same(size, recipe):
    def key(kind, recipe):
        return prepare(noise_or_ramp(*size, kind), recipe, ImageSpec()).compact().key

    assert key("noise", recipe) == key("noise", recipe)
    assert len({key(kind, recipe) for kind in ("noise", "ramp") for recipe in ("hf", "native")}) == 4


@pytest.mark.parametrize(("model", "most"), [("pixtral", 64), ("mistral3", 55)])
@pytest.mark.parametrize("size", THIN)
def test_a_side_that_would_vanish_keeps_one_token(size, model, most):
    prepared = prepare(noise_or_ramp(*size), "hf", spec_of(model))
    assert sorted((prepared.rows, prepared.columns)) == [1, most]
    assert prepared.pixels().isfinite().all()


@given(sides, sides, st.sampled_from(list(MODELS)))
def test_hf_sizes_are_those_of_transformers(width, height, model):
    shape, spec = SimpleNamespace(shape=(3, height, width)), spec_of(model)
    if min(width, height) * spec.longest_side < max(width, height):
        return  # transformers rounds a side to nothing
    array = np.broadcast_to(np.zeros((), np.uint8), shape.shape)
    theirs = get_resize_output_image_size(array, spec.longest_side, spec.token_size, input_data_format="channels_first")
    assert plan_size(width, height, "hf", spec) == theirs[::-1]


@given(sides, sides, st.sampled_from(list(MODELS)))
def test_native_sizes_are_those_of_mistral_common(width, height, model):
    spec = spec_of(model)
    columns, rows = mistral_encoder(model)._image_to_num_tokens(SimpleNamespace(size=(width, height)))
    assert plan_size(width, height, "native", spec) == (columns * spec.token_size, rows * spec.token_size)


@pytest.mark.parametrize(("model", "longest", "most"), [("pixtral", 64, 4160), ("mistral3", 55, 3080)])
@given(sides, sides, st.sampled_from(["hf", "native"]))
def test_no_image_takes_more_tokens_than_a_square_of_its_longest_side(model, longest, most, width, height, recipe):
    spec = spec_of(model)
    columns, rows = (side // spec.token_size for side in plan_size(width, height, recipe, spec))
    assert 1 <= rows <= longest
    assert 1 <= columns <= longest
    assert len(ImageTokens(10, 12, 13).grid(rows, columns)) == rows * (columns + 1) <= most


def test_a_preprocessor_config_changes_the_recipe():
    config = {"size": {"longest_edge": 64}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    image = noise_or_ramp(100, 90)
    prepared = prepare(image, "hf", ImageSpec(token_size=8).with_preprocessor(SideFile(config)))
    theirs = transformers_pixels(image, patch_size={"height": 8, "width": 8}, **config)
    assert (prepared.pixels() - torch.tensor(theirs)).abs().max() <= 2 * LEVEL / 0.5


@pytest.mark.parametrize("switch", ["do_rescale", "do_normalize"])
def test_a_step_switched_off_is_left_out(switch):
    image = noise_or_ramp(33, 20)
    ours = prepare(image, "hf", ImageSpec().with_preprocessor(SideFile({switch: False}))).pixels()
    theirs = transformers_pixels(image, **{switch: False})
    assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_the_original_size_is_remembered():
    prepared = prepare(noise_or_ramp(2000, 100), "hf", ImageSpec())
    assert prepared.original_size == (2000, 100)
    assert (prepared.width, prepared.height) == (1024, 16 * math.ceil(51 / 16))
    assert prepared.tokens == prepared.rows * (prepared.columns + 1)
