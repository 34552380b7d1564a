"""Pixtral, which is Mistral's decoder and a vision tower behind a projector, published as Llava. A config.json in, the
sizes of both and the model out.

An image is cut into square patches in raster order; each of them is one [IMG] token, and rows end in tokens of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pixtral_cli.model.config import ConfigFields, ImageLayout, ModelConfig, VisionConfig
from pixtral_cli.model.families.mistral import read_text_config

if TYPE_CHECKING:
    from pixtral_cli.model.vision import VisionLanguageModel

ARCHITECTURES: tuple[str, ...] = ("LlavaForConditionalGeneration",)
MODEL_TYPE = "llava"
TOWER: str | None = VisionConfig.kind

# The tower's sizes in Pixtral-12B; its config.json leaves most of them out.
VISION_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
    "rope_theta": 10000.0,
}


def read_config(architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
    fields = ConfigFields({"image_token_index": raw.get("image_token_id", 10), **raw})
    vision, text = fields.object("vision_config"), fields.object("text_config")
    ConfigFields(vision, "vision_config.").only("model_type", VisionConfig.kind)
    ConfigFields(text, "text_config.").only("model_type", "mistral", "ministral", "ministral3")
    fields.only("projector_hidden_act", "gelu")
    fields.only("vision_feature_select_strategy", "full")
    tower = read_vision_config(vision, raw.get("vision_feature_layer", -1))
    return ModelConfig(
        architecture,
        read_text_config({**text, "tie_word_embeddings": tied(fields, text)}),
        tower,
        ImageLayout(tower.patch_size, _vision_fields(vision).size("image_size")),
        image_token_id=fields.size("image_token_index"),
        projector_bias=fields.flag("multimodal_projector_bias", True),
    )


def build(config: ModelConfig) -> VisionLanguageModel:
    from pixtral_cli.model.vision import Projector, VisionLanguageModel, VisionTower

    assert isinstance(config.vision, VisionConfig), config
    projector = Projector(config.vision.hidden_size, config.text.hidden_size, config.projector_bias)
    return VisionLanguageModel(config, VisionTower(config.vision), projector)


def tied(fields: ConfigFields, text: Mapping[str, Any]) -> Any:
    """Whether the head may be the embedding: either section may say it."""
    return fields.flag("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)


def read_vision_config(raw: Mapping[str, Any], feature_layer: Any = -1) -> VisionConfig:
    """The tower's sizes; `feature_layer` is the config's `vision_feature_layer`. Raises ModelError."""
    fields = _vision_fields(raw)
    # Published configs say "gelu" or nothing; the weights were trained with SiLU. Both mean SiLU here.
    fields.only("hidden_act", "silu", "gelu")
    hidden, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    heads = fields.divisor("num_attention_heads", hidden)
    if hidden // heads % 4:
        raise fields.refused("num_attention_heads", f"should give heads of a multiple of 4, not {hidden // heads}")
    return VisionConfig(
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        head_dim=hidden // heads,
        num_channels=fields.size("num_channels"),
        patch_size=fields.size("patch_size"),
        rope_theta=float(fields.rope("default", "axial").number("rope_theta")),
        feature_layer=layers_to_run(feature_layer, layers),
    )


def _vision_fields(raw: Mapping[str, Any]) -> ConfigFields:
    return ConfigFields({**VISION_DEFAULTS, **raw}, "vision_config.")


def layers_to_run(layer: Any, layers: int) -> int:
    """Number of layers to run for `vision_feature_layer`, which indexes [after ln_pre, layer 1, … layer n].

    A list of one layer is that layer; transformers puts the features of several side by side.
    """
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if isinstance(layer, bool) or not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise ConfigFields({"vision_feature_layer": layer}).refused(
            "vision_feature_layer", f"should index {layers} layers"
        )
    return layer % (layers + 1)
