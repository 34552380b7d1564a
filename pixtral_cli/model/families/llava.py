"""LLaVA-1.5: a Llama's or Mistral's decoder and the tower of CLIP behind a projector. A config.json in, the sizes of
both and the model out.

Every image becomes one square, which is cut into patches in raster order; each of them is one <image> token, without
rows. The features are those of a layer before the last, which is then not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pixtral_cli.model.config import ClipConfig, ConfigFields, ImageLayout, ModelConfig, TextConfig
from pixtral_cli.model.families import pixtral
from pixtral_cli.model.families.mistral import read_text_config

if TYPE_CHECKING:
    from pixtral_cli.model.vision import VisionLanguageModel

ARCHITECTURES: tuple[str, ...] = pixtral.ARCHITECTURES
MODEL_TYPE = pixtral.MODEL_TYPE
TOWER: str | None = ClipConfig.kind

# What a config.json may leave out (transformers `configuration_llava.py`, `configuration_clip.py` and
# `configuration_llama.py`).
DEFAULTS: Mapping[str, Any] = {
    "image_token_index": 32000,
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
VISION_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as heads
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


def read_config(architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
    fields = ConfigFields({**DEFAULTS, "image_token_index": raw.get("image_token_id", 32000), **raw})
    fields.only("projector_hidden_act", "gelu")
    tower = _read_tower(fields)
    text = fields.object("text_config", {"model_type": "llama"})
    return ModelConfig(
        architecture,
        _read_text({**text, "tie_word_embeddings": pixtral.tied(fields, text)}),
        tower,
        ImageLayout(tower.patch_size, tower.image_size, cropped=True, own_tokens=int(tower.keeps_class)),
        image_token_id=fields.size("image_token_index"),
        projector_bias=fields.flag("multimodal_projector_bias"),
    )


def build(config: ModelConfig) -> VisionLanguageModel:
    from pixtral_cli.model.clip import ClipTower
    from pixtral_cli.model.vision import Projector, VisionLanguageModel

    assert isinstance(config.vision, ClipConfig), config
    width = config.vision.hidden_size * len(config.vision.feature_layers)
    projector = Projector(width, config.text.hidden_size, config.projector_bias)
    return VisionLanguageModel(config, ClipTower(config.vision), projector)


def _read_tower(whole: ConfigFields) -> ClipConfig:
    whole.only("vision_feature_select_strategy", "default", "full")
    fields = ConfigFields({**VISION_DEFAULTS, **whole.object("vision_config")}, "vision_config.")
    fields.only("hidden_act", "quick_gelu", "gelu")
    hidden, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    heads, side = fields.divisor("num_attention_heads", hidden), fields.size("image_size")
    chosen = whole.get("vision_feature_layer")
    if chosen == []:
        raise whole.refused("vision_feature_layer", "names no layer")
    return ClipConfig(
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        head_dim=hidden // heads,
        num_channels=fields.size("num_channels"),
        patch_size=fields.divisor("patch_size", side),
        image_size=side,
        feature_layers=tuple(
            pixtral.layers_to_run(layer, layers) for layer in (chosen if isinstance(chosen, list) else [chosen])
        ),
        keeps_class=whole.get("vision_feature_select_strategy") == "full",
        activation=fields.text("hidden_act"),
        norm_eps=float(fields.number("layer_norm_eps")),
    )


def _read_text(raw: Mapping[str, Any]) -> TextConfig:
    """Llama's decoder is Mistral's, without windows; its biases, which few models have, are not known here."""
    fields = ConfigFields(raw, "text_config.")
    fields.only("model_type", "llama", "mistral")
    if fields.text("model_type", "llama") == "mistral":
        return read_text_config(raw)
    for bias in ("attention_bias", "mlp_bias"):
        if fields.flag(bias, False):
            raise fields.refused(bias, "is not known here; false is")
    return read_text_config({**LLAMA_DEFAULTS, **raw, "sliding_window": None, "layer_types": None})
