"""Promises of the name tables. The expected names are written out here, apart from the tables."""

import pytest

from weights_cache.names import from_hf, looks_native

TEXT_LAYER = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
]
VISION_LAYER = [
    "attention_norm.weight",
    "ffn_norm.weight",
    "attention.q_proj.weight",
    "attention.k_proj.weight",
    "attention.v_proj.weight",
    "attention.o_proj.weight",
    "feed_forward.gate_proj.weight",
    "feed_forward.up_proj.weight",
    "feed_forward.down_proj.weight",
]
PROJECTOR = ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]
PROJECTOR += ["norm.weight", "patch_merger.merging_layer.weight"]

OURS = {
    "text": "language_model.layers.39.",
    "norm": "language_model.norm.weight",
    "embed": "language_model.embed_tokens.weight",
    "head": "lm_head.weight",
    "vision": "vision_tower.layers.23.",
    "vision_edge": "vision_tower.",
    "projector": "multi_modal_projector.",
}
STYLES = {
    "older": {
        "text": "language_model.model.layers.39.",
        "norm": "language_model.model.norm.weight",
        "embed": "language_model.model.embed_tokens.weight",
        "head": "language_model.lm_head.weight",
        "vision": "vision_tower.transformer.layers.23.",
        "vision_edge": "vision_tower.",
        "projector": "multi_modal_projector.",
    },
    "newer": {
        "text": "model.language_model.layers.39.",
        "norm": "model.language_model.norm.weight",
        "embed": "model.language_model.embed_tokens.weight",
        "head": "lm_head.weight",
        "vision": "model.vision_tower.transformer.layers.23.",
        "vision_edge": "model.vision_tower.",
        "projector": "model.multi_modal_projector.",
    },
    "text only": {
        "text": "model.layers.39.",
        "norm": "model.norm.weight",
        "embed": "model.embed_tokens.weight",
        "head": "lm_head.weight",
    },
    "ours": OURS,
}
ENDINGS = {
    "text": TEXT_LAYER,
    "vision": VISION_LAYER,
    "vision_edge": ["patch_conv.weight", "ln_pre.weight"],
    "projector": PROJECTOR,
}


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_of_each_style_gets_our_name(style: str):
    for part, theirs in STYLES[style].items():
        for ending in ENDINGS.get(part, [""]):
            assert from_hf(theirs + ending) == OURS[part] + ending


@pytest.mark.parametrize("prefix", ["model.layers.0.self_attn.rotary_emb", "language_model.model.rotary_emb"])
def test_saved_rotary_buffers_are_dropped(prefix: str):
    assert from_hf(prefix + ".inv_freq") is None
    assert from_hf("vision_tower.patch_positional_embedding.inv_freq") is None


def test_a_name_from_elsewhere_is_kept_for_the_error_that_reports_it():
    assert from_hf("audio_tower.conv.weight") == "audio_tower.conv.weight"


def test_native_naming_is_told_from_hugging_face_naming():
    assert looks_native({"tok_embeddings.weight", "output.weight"})
    assert not looks_native({"model.embed_tokens.weight", "lm_head.weight"})
