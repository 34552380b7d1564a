"""config.json is read field by field; what cannot be run says which field and why."""

import pytest

from pixtral_cli.errors import ModelError
from pixtral_cli.model.config import ImageLayout
from pixtral_cli.model.families import read_config

MISTRAL = {"architectures": ["MistralForCausalLM"], "num_hidden_layers": 6, "sliding_window": None}
LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {}, "vision_config": {}}


def text(**fields):
    return read_config({**MISTRAL, **fields}).text


def test_rope_theta_is_read_from_old_and_new_places():
    assert text(rope_theta=1e8).rope_theta == 1e8
    assert text(rope_parameters={"rope_theta": 1e9, "rope_type": "default"}).rope_theta == 1e9


def test_the_layout_of_images_is_that_of_the_towers_patches():
    vision = {**FULL["vision_config"], "patch_size": 14, "image_size": 448}
    assert read_config({**FULL, "vision_config": vision}).image_layout == ImageLayout(token_size=14, longest_side=448)
    assert read_config(MISTRAL).image_layout is None


def test_sliding_windows_come_as_a_number_a_pattern_or_layer_types():
    assert text(sliding_window=5).sliding_windows == (5,) * 6
    assert text(sliding_window=[None, 5, 5, 5]).sliding_windows == (None, 5, 5, 5, None, 5)
    kinds = ["full_attention", "sliding_attention"] * 3
    assert text(sliding_window=5, layer_types=kinds).sliding_windows == (None, 5) * 3


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({}, "not stated"),
        ({**LLAVA, "vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        ({**LLAVA, "text_config": {"model_type": "llama"}}, "llama"),
        ({**LLAVA, "vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ({**LLAVA, "vision_feature_layer": 99}, "vision_feature_layer"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, "vision_config"),
        ({**MISTRAL, "hidden_size": "wide"}, "hidden_size"),
        ({**MISTRAL, "num_key_value_heads": 5}, "num_key_value_heads"),
        ({**MISTRAL, "rope_parameters": {"rope_type": "llama3"}}, "llama3"),
        ({**MISTRAL, "sliding_window": "wide"}, "sliding_window"),
        ({**MISTRAL, "layer_types": ["full_attention"]}, "layer_types"),
        ({**MISTRAL, "hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_what_cannot_be_run_is_named(raw, sentence):
    with pytest.raises(ModelError, match=sentence):
        read_config(raw)


def test_an_unknown_architecture_lists_the_known():
    with pytest.raises(ModelError) as failure:
        read_config({"architectures": ["GPT2LMHeadModel"]})
    assert "LlavaForConditionalGeneration" in failure.value.hint and "MistralForCausalLM" in failure.value.hint


FULL = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 10,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_window": 7,
        "layer_types": ["full_attention"] * 3,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "patch_size": 16,
        "image_size": 1024,
        "rope_theta": 1e4,
    },
}
ODD = [None, True, 0, -1, 2.5, "x", [], {}, [[1]], 10**12, float("nan")]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_field_of_any_kind_gives_a_config_or_a_model_error(value):
    places = [(FULL, key) for key in FULL]
    places += [(FULL[section], key) for section in ("text_config", "vision_config") for key in FULL[section]]
    assert read_config(FULL).text.head_dim == 16
    for holder, key in places:
        changed = {k: dict(v) if isinstance(v, dict) else v for k, v in FULL.items()}
        inside = next((k for k, v in FULL.items() if v is holder), None)
        (changed if inside is None else changed[inside])[key] = value
        try:
            read_config(changed)
        except ModelError as error:
            assert str(error).endswith(".") and error.hint, (key, value)
