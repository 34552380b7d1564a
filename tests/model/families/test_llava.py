"""LLaVA-1.5 against transformers' own model and processor, on random checkpoints of Llama's and Mistral's decoder."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support import builders
from support import format_builders as forms
from support.devices import CPU, loaded
from support.oracles import asked, assert_answers_as, hf_tokens, our_logits, our_tokens, picture, text_ids
from support.pictures import conversation, noise
from transformers import MistralConfig

from pixtral_cli import Pixtral
from pixtral_cli.commands import inspect, tokenize
from pixtral_cli.engine.engine import Engine
from pixtral_cli.errors import ModelError, PixtralError
from pixtral_cli.model import joining
from pixtral_cli.model.families import read_config
from pixtral_cli.model.load import empty
from pixtral_cli.model.load import load as load_as_placed
from pixtral_cli.model.placement import place
from pixtral_cli.source import Source
from weights_cache import checkpoint
from weights_cache.encodings import ENCODINGS
from weights_cache.errors import TensorsMissing, TensorsUnexpected

IMAGE = 10
CONVERSATIONS = {
    "text": conversation(),
    "picture": conversation(noise(70, 40)),
    "pictures": conversation(noise(200, 33, 1), noise(5, 60, 2), noise(28, 28, 3)),
}
TEXTS = {"llama": None, "mistral": MistralConfig(**builders.TEXT)}


@pytest.fixture(scope="module", params=TEXTS)
def models(request, tmp_path_factory):
    """A folder, and transformers' model and processor of it."""
    folder = tmp_path_factory.mktemp("llava")
    oracle = builders.llava(folder, TEXTS[request.param])
    return folder, oracle, builders.add_llava_processor(folder)


def load(path, **options):
    return Pixtral.load(path, devices="cpu", **{"quantization_encoding": "float32", **options})


def renamed(source, folder, rename):
    """The same files in `folder`, each tensor under another name; what has none is left out."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = {rename(name): tensor for name, tensor in forms.tensors(source).items()}
    weights.pop(None, None)
    save_file(weights, folder / "model.safetensors")
    return weights


def published(name):
    """As llava-hf has published them: CLIP's tower is a module inside its own."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def newer(name):
    """As transformers names its modules since 4.52."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


NAMINGS = {
    "saved": lambda name: name,
    "published": published,
    "newer": newer,
    "newer inside": lambda name: published(newer(name)),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_tokens_and_logprobs_are_those_of_transformers(models, name):
    folder, oracle, processor = models
    assert_answers_as(load(folder), oracle, processor, CONVERSATIONS[name])


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_very_same_weights(models, tmp_path, naming):
    folder = models[0]
    weights = renamed(folder, tmp_path / "other", NAMINGS[naming])
    tower = next(name for name in weights if name.endswith("class_embedding")).removesuffix("class_embedding")
    weights[f"{tower}position_ids"] = torch.arange(5)[None]  # as old files have it
    save_file(weights, tmp_path / "other/model.safetensors")
    expected, found = (dict(loaded(path).named_parameters()) for path in (folder, tmp_path / "other"))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def ids_and_pictures(count, tokens=4):
    """A text with so many images of two by two patches."""
    ids = [1]
    for index in range(count):
        ids += text_ids(3, index) + [IMAGE] * tokens
    return ids + text_ids(4, 99), [picture(2, 2, index, 14) for index in range(count)]


def logits_of(hf, ids, pictures):
    with torch.no_grad():
        return hf(torch.tensor([ids]), pixel_values=torch.stack(pictures)).logits[0]


CONFIGS = {
    "last": {"vision_feature_layer": -1},
    "none": {"vision_feature_layer": -5},
    "counted": {"vision_feature_layer": 2},
    "several": {"vision_feature_layer": [-3, 1, -2]},
    "one in a list": {"vision_feature_layer": [-2]},
    "with the class": {"vision_feature_select_strategy": "full"},
    "several with the class": {"vision_feature_layer": [1, 3], "vision_feature_select_strategy": "full"},
    "exact gelu": {"tower": {"hidden_act": "gelu"}},
    "eps": {"tower": {"layer_norm_eps": 0.1}},
    "three by three": {"tower": {"image_size": 42}},
    "no biases": {"multimodal_projector_bias": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_chosen_as_the_config_says(tmp_path, name):
    hf = builders.llava(tmp_path, **CONFIGS[name])
    ours, side = loaded(tmp_path), hf.config.vision_config.image_size
    patches = (side // 14) ** 2
    tokens = patches + (hf.config.vision_feature_select_strategy == "full")
    assert ours.config.image_layout.tokens(side, side) == tokens
    ids, _ = ids_and_pictures(2, tokens)
    pictures = [picture(side // 14, side // 14, seed, 14) for seed in (1, 2)]
    expected = logits_of(hf, ids, pictures)
    torch.testing.assert_close(our_logits(ours, ids, pictures), expected, atol=1e-4, rtol=0)
    other = our_logits(ours, ids, pictures[::-1])
    assert (other - expected).abs().max() > 0.05


def test_a_batch_gives_each_the_tokens_of_transformers(models):
    folder, hf, _ = models
    requests, expected = [], []
    for count in (0, 1, 3, 2):
        ids, pictures = ids_and_pictures(count)
        requests.append(asked(ids, pictures, 14))
        expected.append(hf_tokens(hf, ids, **({"pixel_values": torch.stack(pictures)} if pictures else {})))
    assert our_tokens(Engine(loaded(folder), max_batch_size=3), requests) == expected


def test_images_of_one_pass_do_not_see_each_other(models):
    model, pictures = loaded(models[0]), ids_and_pictures(3)[1]
    with torch.inference_mode():
        patches = torch.cat([model._patches(each, (2, 2)) for each in pictures])
        together = model.multi_modal_projector(model.vision_tower(patches, [(2, 2)] * 3), [(2, 2)] * 3)
        alone = torch.cat([model.encode_image(each) for each in pictures])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


class TestUnreadLayers:
    """Layers behind the features are neither made nor read."""

    def test_a_checkpoint_may_lack_them(self, models, tmp_path):
        renamed(models[0], tmp_path / "cut", lambda name: None if "layers.3." in name and "vision" in name else name)
        assert "vision_tower.encoder.layers.3.mlp.fc1.bias" not in checkpoint.open(tmp_path / "cut").tensors
        assert_answers_as(load(tmp_path / "cut"), *models[1:], CONVERSATIONS["picture"])

    def test_a_layer_that_is_run_must_be_there(self, models, tmp_path):
        renamed(models[0], tmp_path / "cut", lambda name: None if "vision_tower.encoder.layers.2." in name else name)
        with pytest.raises(TensorsMissing, match=r"layers\.2"):
            loaded(tmp_path / "cut")

    def test_a_layer_that_no_config_speaks_of_is_still_unexpected(self, models, tmp_path):
        renamed(models[0], tmp_path / "more", lambda name: name.replace("tower.encoder.layers.3.", "tower.extra.3."))
        with pytest.raises(TensorsUnexpected, match="extra"):
            loaded(tmp_path / "more")

    def test_a_serialized_model_has_no_such_layers_and_answers_alike(self, models, tmp_path):
        load(models[0]).save(tmp_path / "model.pixtral")
        again = Pixtral.load(serialized_model_path=tmp_path / "model.pixtral", devices="cpu")
        names = again.source.checkpoint.tensors
        assert not any("layers.3." in name or "post_layernorm" in name for name in names)
        assert_answers_as(again, *models[1:], CONVERSATIONS["pictures"])


def test_the_table_of_places_is_never_packed(models):
    tensors = checkpoint.open(models[0]).tensors
    chosen = place(tensors, ENCODINGS["q8_0"], quantize_vision=True).encodings
    assert chosen["vision_tower.embeddings.position_embedding.weight"] == "bfloat16"
    assert chosen["vision_tower.encoder.layers.0.mlp.fc1.weight"] == "q8_0"


def test_a_packed_tower_answers_nearly_as_its_floats(models):
    ids, pictures = ids_and_pictures(2)
    exact = our_logits(loaded(models[0]), ids, pictures)
    opened = checkpoint.open(models[0])
    packed = place(opened.tensors, ENCODINGS["q8_0"], quantize_vision=True)
    ours = load_as_placed(opened, read_config(opened.config), packed, CPU)
    assert (our_logits(ours, ids, pictures) - exact).abs().mean() < 0.1 * exact.std()


def test_matrices_with_biases_are_not_joined_on_a_card(models):
    names = [name for name, _ in empty(read_config(checkpoint.open(models[0]).config)).named_parameters()]
    joined = [group for group in joining.groups(names) if len(group) > 1]
    assert joined and not any(name.startswith("vision_tower") for group in joined for name in group)


def test_a_raw_text_names_the_place_of_a_picture_as_the_model_does(models):
    folder, _, processor = models
    raw = "USER: <image>\nwhat is it? ASSISTANT:"
    inputs = processor(raw, [noise(70, 40)])
    ours = Source.open(folder)
    assert ours.complete(raw, [noise(70, 40)]).token_ids == [1, *inputs["input_ids"][0].tolist()]
    assert ours.complete("what?", [noise(70, 40)]).token_ids[:6] == [
        1,
        *[IMAGE] * 4,
        *ours.complete("what?").token_ids[1:2],
    ]
    with pytest.raises(PixtralError, match="2 <image>"):
        ours.complete("<image><image>", [noise(9, 9)])


def test_the_image_token_in_a_users_text_is_text(models):
    prompt = Source.open(models[0]).chat(conversation(noise(9, 9), text="say <image> twice: <image>"))
    assert prompt.token_ids.count(IMAGE) == 4


def test_commands_tell_what_becomes_of_a_picture(models):
    source = Source.open(models[0])
    shown = inspect.as_object("some/model", source)
    assert shown["vision"].items() >= {"image_size": 28, "patch_size": 14, "token_size": 14, "layers": 4}.items()
    assert "cropped to 28x28 px, in patches of 14 px" in inspect.as_text(shown)
    prompt = source.chat(CONVERSATIONS["picture"])
    (image,) = tokenize.as_object("some/model", prompt)["images"]
    assert image.items() >= {"width": 28, "height": 28, "rows": 2, "columns": 2, "tokens": 4}.items()
    assert "70x40 px, scaled down to 28x28 px, 2 rows of 2 tokens, 4 in all" in tokenize.as_text(prompt)
    assert prompt.image_tokens == 4


def test_memory_is_planned_for_the_layers_of_the_tower(models):
    assert load(models[0]).plan.weights >= sum(p.nbytes for p in loaded(models[0]).parameters())


VICUNA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
"""As llava-1.5-7b-hf was published."""


def changed(part=None, **changes):
    raw = json.loads(json.dumps(VICUNA))
    (raw[part] if part else raw).update(changes)
    return raw


def test_the_published_config_is_filled_with_the_defaults_of_transformers():
    config = read_config(VICUNA)
    text, vision, layout = config.text, config.vision, config.image_layout
    assert (text.hidden_size, text.intermediate_size, text.num_layers) == (4096, 11008, 32)
    assert (text.num_heads, text.num_kv_heads, text.head_dim, text.rope_theta) == (32, 32, 128, 1e4)
    assert set(text.sliding_windows) == {None} and text.yarn is None
    assert (vision.feature_layers, vision.keeps_class, vision.activation) == ((23,), False, "quick_gelu")
    assert layout.tokens(336, 336) == 576 and config.image_token_id == 32000 and config.projector_bias
    sparse = {key: VICUNA[key] for key in ("architectures", "text_config", "vision_config")}
    assert read_config(sparse) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed("vision_config", model_type="siglip_vision_model"), "siglip.* pixtral or clip_vision_model is"),
        (changed("vision_config", hidden_act="relu"), "hidden_act"),
        (changed("vision_config", image_size=340), "patch_size"),
        (changed("text_config", model_type="qwen2"), "qwen2"),
        (changed("text_config", attention_bias=True), "attention_bias"),
        (changed("text_config", mlp_bias=True), "mlp_bias"),
        (changed("text_config", rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
        (changed("text_config", rope_parameters={"rope_type": "llama3", "factor": 8.0}), "llama3"),
        (changed(vision_feature_layer=[]), "vision_feature_layer"),
        (changed(vision_feature_layer=[-2, 30]), "vision_feature_layer"),
        (changed(vision_feature_select_strategy="cls"), "vision_feature_select_strategy"),
        (changed(projector_hidden_act="relu"), "projector_hidden_act"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_its_name(raw, message):
    with pytest.raises(ModelError, match=message):
        read_config(raw)
