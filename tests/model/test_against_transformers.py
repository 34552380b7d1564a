"""Our models against transformers' own, on random checkpoints that transformers wrote."""

import pytest
import torch
from support import builders
from support.devices import loaded
from support.oracles import asked, hf_pictures, hf_tokens, our_logits, our_tokens, picture, prompt_with, text_ids

from pixtral_cli.engine.engine import Engine
from pixtral_cli.model.families import read_config


@pytest.fixture(scope="module", params=builders.TEXT_FAMILIES)
def text_pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return builders.TEXT_FAMILIES[request.param](folder), loaded(folder)


@pytest.fixture(scope="module", params=builders.SEEING_FAMILIES)
def seeing(request, tmp_path_factory):
    """transformers' model and ours, and the side of an image token in pixels."""
    folder = tmp_path_factory.mktemp(request.param)
    hf, ours = builders.SEEING_FAMILIES[request.param](folder), loaded(folder)
    return hf, ours, ours.config.image_layout.token_size


def test_text_logits_equal_at_every_position(text_pair):
    hf, ours = text_pair
    ids = text_ids(40, 1)
    with torch.no_grad():
        expected = hf(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(our_logits(ours, ids), expected, atol=1e-4, rtol=0)


def test_text_greedy_tokens_equal_over_24_steps(text_pair):
    hf, ours = text_pair
    ids = text_ids(33, 2)
    assert our_tokens(Engine(ours), [asked(ids)]) == [hf_tokens(hf, ids)]


@pytest.mark.parametrize("grids", [[(1, 1), (1, 2)], [(3, 5)], [(2, 7), (6, 1), (4, 4)]], ids=str)
def test_picture_logits_equal_at_every_position(seeing, grids):
    hf, ours, side = seeing
    ids, pictures = prompt_with(grids, side)
    with torch.no_grad():
        expected = hf(torch.tensor([ids]), **hf_pictures(pictures)).logits[0]
    torch.testing.assert_close(our_logits(ours, ids, pictures), expected, atol=1e-4, rtol=0)


def test_logits_depend_on_the_picture(seeing):
    _, ours, side = seeing
    ids, pictures = prompt_with([(3, 5)], side)
    other = our_logits(ours, ids, [picture(3, 5, 77, side)])
    assert (our_logits(ours, ids, pictures)[-1] - other[-1]).abs().max() > 0.05


def test_picture_greedy_tokens_equal_over_24_steps(seeing):
    hf, ours, side = seeing
    ids, pictures = prompt_with([(2, 7), (6, 1)], side)
    assert our_tokens(Engine(ours), [asked(ids, pictures, side)]) == [hf_tokens(hf, ids, **hf_pictures(pictures))]


def test_a_batch_of_texts_and_pictures_gives_each_the_tokens_of_transformers(seeing):
    hf, ours, side = seeing
    requests, expected = [], []
    for grids in ([], [(3, 5)], [(1, 2), (5, 3)], [(8, 2)]):
        ids, pictures = prompt_with(grids, side)
        requests.append(asked(ids, pictures, side))
        expected.append(hf_tokens(hf, ids, **(hf_pictures(pictures) if pictures else {})))
    assert our_tokens(Engine(ours, max_batch_size=3), requests) == expected


def test_published_sparse_config_is_filled_with_pixtrals_sizes():
    config = read_config(
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": 10,
            "text_config": {
                "head_dim": 128,
                "hidden_size": 5120,
                "intermediate_size": 14336,
                "max_position_embeddings": 1024000,
                "model_type": "mistral",
                "num_hidden_layers": 40,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000000.0,
                "sliding_window": None,
                "vocab_size": 131072,
            },
            "vision_config": {"head_dim": 64, "image_size": 1024, "model_type": "pixtral", "patch_size": 16},
        }
    )
    text, vision = config.text, config.vision
    assert (text.num_heads, text.head_dim, text.rope_theta) == (32, 128, 1e9)
    assert set(text.sliding_windows) == {None}
    assert (vision.hidden_size, vision.intermediate_size, vision.num_layers, vision.num_heads) == (1024, 4096, 24, 16)
    assert vision.feature_layer == 24 and vision.rope_theta == 1e4


def test_gelu_in_a_vision_config_means_silu(tmp_path):
    hf = builders.pixtral(tmp_path)
    builders.edit_config(tmp_path, lambda config: config["vision_config"].update(hidden_act="gelu"))
    ids, pictures = prompt_with([(3, 5)])
    with torch.no_grad():
        expected = hf(torch.tensor([ids]), **hf_pictures(pictures)).logits[0]
    torch.testing.assert_close(our_logits(loaded(tmp_path), ids, pictures), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [-1, -2, 1, [-1], [2]], ids=str)
def test_vision_feature_layer_counts_as_transformers_does(tmp_path, layer):
    hf = builders.pixtral(tmp_path)
    builders.edit_config(tmp_path, lambda config: config.update(vision_feature_layer=layer))
    ids, pictures = prompt_with([(3, 5)])
    with torch.no_grad():
        expected = hf(torch.tensor([ids]), **hf_pictures(pictures), vision_feature_layer=layer).logits[0]
    torch.testing.assert_close(our_logits(loaded(tmp_path), ids, pictures), expected, atol=1e-4, rtol=0)


def test_bfloat16_agrees_with_transformers_in_bfloat16(tmp_path):
    hf = builders.pixtral(tmp_path)
    ids, pictures = prompt_with([(3, 5)])
    ours = our_logits(loaded(tmp_path, encoding="bfloat16"), ids, pictures)
    with torch.no_grad():
        exact = hf(torch.tensor([ids]), **hf_pictures(pictures)).logits[0]
        half = hf.bfloat16()(torch.tensor([ids]), **hf_pictures([p.bfloat16() for p in pictures])).logits[0].float()
    assert (ours - exact).abs().mean() < 1.5 * (half - exact).abs().mean()
