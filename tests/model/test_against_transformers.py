"""Our models against transformers' own, on random checkpoints that transformers wrote."""

import pytest
import torch
from support import builders
from support.devices import loaded

from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import ImageInput, Request
from pixtral_cli.model.attention import AttendPaged, Span
from pixtral_cli.model.families import read_config
from pixtral_cli.model.kv_cache import KVCache, pages_for

IMG, IMG_BREAK, IMG_END = 10, 12, 13


@pytest.fixture(scope="module", params=builders.TEXT_FAMILIES)
def text_pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return builders.TEXT_FAMILIES[request.param](folder), loaded(folder)


@pytest.fixture(scope="module")
def pixtral_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixtral")
    return builders.pixtral(folder), loaded(folder)


def text_ids(length, seed):
    return torch.randint(14, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def image_ids(rows, columns):
    ids = ([IMG] * columns + [IMG_BREAK]) * rows
    return [*ids[:-1], IMG_END]


def picture(rows, columns, seed):
    return torch.randn(3, rows * 16, columns * 16, generator=torch.Generator().manual_seed(seed))


def prompt_with(grids):
    """Text and pictures of these grids in turn -> (ids, pictures)."""
    ids, pictures = [1], []
    for index, grid in enumerate(grids):
        ids += text_ids(3, index) + image_ids(*grid)
        pictures.append(picture(*grid, seed=index))
    return ids + text_ids(4, 99), pictures


def hf_pictures(pictures):
    """As transformers' processor batches pictures: padded to the largest, with their sizes."""
    height, width = (max(p.shape[axis] for p in pictures) for axis in (1, 2))
    padded = [torch.nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures]
    return {
        "pixel_values": torch.stack(padded),
        "image_sizes": torch.tensor([[p.shape[1], p.shape[2]] for p in pictures]),
    }


@torch.inference_mode()
def our_logits(model, ids, images=()):
    features = torch.cat([model.encode_image(p) for p in images]) if images else None
    pages = list(range(1, pages_for(len(ids)) + 1))[::-1]  # in no order
    cache = KVCache(model.config.text, model.dtype, model.device, len(pages) + 1)
    attend = AttendPaged(model.config.text, cache, [Span(pages, 0, len(ids))], model.device)
    hidden = model(model.embed(torch.tensor(ids), features), torch.arange(len(ids)), attend)
    return model.logits(hidden)


def as_asked(pictures):
    return tuple(ImageInput(p.numpy().tobytes(), p.shape[1] * p.shape[2] // 256, lambda p=p: p) for p in pictures)


def our_tokens(engine, requests):
    places = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            places[event.request_id].append(event.token_id)
    return list(places.values())


def hf_tokens(hf, ids, **pictures):
    hf.generation_config.eos_token_id = None  # as ignore_eos
    out = hf.generate(torch.tensor([ids]), **pictures, max_new_tokens=24, do_sample=False)
    return out[0, len(ids) :].tolist()


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
    assert our_tokens(Engine(ours), [Request(tuple(ids), 24)]) == [hf_tokens(hf, ids)]


@pytest.mark.parametrize("grids", [[(1, 1)], [(3, 5)], [(2, 7), (6, 1), (4, 4)]], ids=str)
def test_picture_logits_equal_at_every_position(pixtral_pair, grids):
    hf, ours = pixtral_pair
    ids, pictures = prompt_with(grids)
    with torch.no_grad():
        expected = hf(torch.tensor([ids]), **hf_pictures(pictures)).logits[0]
    torch.testing.assert_close(our_logits(ours, ids, pictures), expected, atol=1e-4, rtol=0)


def test_logits_depend_on_the_picture(pixtral_pair):
    _, ours = pixtral_pair
    ids, pictures = prompt_with([(3, 5)])
    other = our_logits(ours, ids, [picture(3, 5, seed=77)])
    assert (our_logits(ours, ids, pictures)[-1] - other[-1]).abs().max() > 0.05


def test_picture_greedy_tokens_equal_over_24_steps(pixtral_pair):
    hf, ours = pixtral_pair
    ids, pictures = prompt_with([(2, 7), (6, 1)])
    request = Request(tuple(ids), 24, images=as_asked(pictures))
    assert our_tokens(Engine(ours), [request]) == [hf_tokens(hf, ids, **hf_pictures(pictures))]


def test_a_batch_of_texts_and_pictures_gives_each_the_tokens_of_transformers(pixtral_pair):
    hf, ours = pixtral_pair
    requests, expected = [], []
    for grids in ([], [(3, 5)], [(1, 2), (5, 3)], [(8, 2)]):
        ids, pictures = prompt_with(grids)
        requests.append(Request(tuple(ids), 24, images=as_asked(pictures)))
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


def test_bfloat16_agrees_with_transformers_in_bfloat16(pixtral_pair, tmp_path):
    hf, _ = pixtral_pair
    hf.save_pretrained(tmp_path)
    ids, pictures = prompt_with([(3, 5)])
    ours = our_logits(loaded(tmp_path, encoding="bfloat16"), ids, pictures)
    with torch.no_grad():
        exact = hf(torch.tensor([ids]), **hf_pictures(pictures)).logits[0]
        half = hf.bfloat16()(torch.tensor([ids]), **hf_pictures([p.bfloat16() for p in pictures])).logits[0].float()
    hf.float()
    hf.load_state_dict(builders.pixtral(tmp_path).state_dict())
    assert (ours - exact).abs().mean() < 1.5 * (half - exact).abs().mean()
