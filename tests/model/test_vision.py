"""Several images through the tower together: the features of each, in order, whoever is beside it."""

from types import SimpleNamespace

import pytest
import torch
from support import builders
from support.dense_attention import dense, same_image
from support.devices import GPU, loaded

from pixtral_cli.model import fused, layers, vision
from pixtral_cli.model.vision import AttendWithinImages

GRIDS = [(2, 3), (1, 1), (3, 2), (2, 3), (4, 4), (1, 6)]  # in no order, and two of equal length but unequal sides


def picture(rows, columns, seed):
    return torch.randn(3, rows * 16, columns * 16, generator=torch.Generator().manual_seed(seed))


def pictures(grids=GRIDS):
    return [picture(*grid, seed) for seed, grid in enumerate(grids)]


FAMILIES = {"pixtral": builders.pixtral, "mistral 3": lambda folder: builders.mistral3(folder, patch_size=8)}
"""An image token is 16 pixels wide: a patch, or a square of four."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    FAMILIES[request.param](folder)
    return folder


def patches_a_token(model):
    return (16 // model.config.vision.patch_size) ** 2


@pytest.fixture(scope="module")
def model(folder):
    return loaded(folder)


@torch.inference_mode()
def alone(model, images):
    return [model.encode_image(image) for image in images]


@torch.inference_mode()
def together(model, images):
    return model.encode_images(images)


def assert_close(found, wanted, tolerance):
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each.cpu().float(), other.cpu().float(), atol=tolerance, rtol=0)


def test_on_a_cpu_nobody_beside_it_changes_a_bit_of_an_image(model):
    for found, wanted in zip(together(model, pictures()), alone(model, pictures()), strict=True):
        assert torch.equal(found, wanted)


def test_an_image_of_many_patches_goes_through_its_feed_forward_layers_in_pieces(model, monkeypatch):
    image, sizes, each = picture(3, 4, 0), [], patches_a_token(model)
    whole, added = alone(model, [image]), layers.GatedFeedForward._added
    monkeypatch.setattr(layers, "ROWS_AT_ONCE", 5 * each)
    monkeypatch.setattr(
        layers.GatedFeedForward, "_added", lambda self, rows: sizes.append(len(rows)) or added(self, rows)
    )
    assert_close(alone(model, [image]), whole, 1e-5)
    assert sizes[:3] == [5 * each, 5 * each, 2 * each]


def test_no_images_have_no_features(model):
    assert together(model, []) == []


@pytest.fixture
def as_on_a_card(monkeypatch):
    """The way of a card, on the CPU."""
    monkeypatch.setattr(vision.VisionLanguageModel, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(vision, "attend_within_images", lambda lengths, device: AttendWithinImages(lengths))


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_images_of_one_pass_do_not_see_each_other_and_keep_their_order(model, monkeypatch, as_on_a_card, at_once):
    monkeypatch.setattr(vision, "PATCHES", at_once)
    assert_close(together(model, pictures()), alone(model, pictures()), 1e-5)


def test_a_pass_has_no_more_patches_than_memory_is_planned_for(model, monkeypatch, as_on_a_card):
    each = patches_a_token(model)
    monkeypatch.setattr(vision, "PATCHES", 12 * each)
    passes, tower = [], vision.VisionTower.forward
    monkeypatch.setattr(
        vision.VisionTower, "forward", lambda self, patches, grids: passes.append(grids) or tower(self, patches, grids)
    )
    together(model, pictures())
    lengths = [[rows * columns / each for rows, columns in grids] for grids in passes]
    assert lengths == [[1, 6], [6, 6], [6], [16]]
    shown = sorted((rows * rows, columns * columns) for grids in passes for rows, columns in grids)
    assert shown == sorted((rows * rows * each, columns * columns * each) for rows, columns in GRIDS)


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [4, 2, 2, 7]], ids=str)
def test_attention_within_images_is_a_softmax_over_each(lengths):
    q, k, v = torch.randn(3, sum(lengths), 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    found = AttendWithinImages(lengths)(0, 3 * q, k, v)
    torch.testing.assert_close(found.double(), dense(3 * q, k, v, same_image(lengths)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", [GPU])
def test_a_card_gives_the_features_of_the_cpu(folder, model, device):
    there = loaded(folder, device)
    wanted = alone(model, pictures())
    assert_close(together(there, pictures()), wanted, 1e-4)
    assert_close(alone(there, pictures()), wanted, 1e-4)
    assert_close(together(there, [image.to(device) for image in pictures()]), wanted, 1e-4)


@pytest.mark.parametrize("device", [GPU])
def test_a_card_gives_the_features_of_the_cpu_in_bfloat16(folder, model, device):
    wanted = alone(model, pictures())
    spread = torch.cat(wanted).std().item()
    assert_close(together(loaded(folder, device, "bfloat16"), pictures()), wanted, 0.1 * spread)


@pytest.mark.parametrize("device", [GPU])
def test_without_triton_the_features_are_the_same(folder, model, device, monkeypatch):
    monkeypatch.setattr(fused, "_on_card", lambda x: False)
    assert_close(together(loaded(folder, device), pictures()), alone(model, pictures()), 1e-4)
