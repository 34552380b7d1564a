"""The two halves of a model's sizes in, one config as Hugging Face writes it out. Knows no format."""

from collections.abc import Mapping
from typing import Any

IMAGE_TOKEN_ID = 10
"""Of `[IMG]` in all of Mistral's vocabularies."""


def text_model(text: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a text model, from MistralConfig's fields."""
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **text}


def vision_model(
    text: Mapping[str, Any], vision: Mapping[str, Any], image_token_id: int, projector_bias: bool
) -> dict[str, Any]:
    """The config of a Pixtral, from MistralConfig's and PixtralVisionConfig's fields."""
    ends = {key: text[key] for key in ("bos_token_id", "eos_token_id") if key in text}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token_id,
        "multimodal_projector_bias": projector_bias,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        "text_config": {"model_type": "mistral", **text},
        "vision_config": {"model_type": "pixtral", "hidden_act": "silu", **vision},
        **ends,
    }


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the head may be the embedding: either section may say it, as in transformers' `LlavaConfig`."""
    text = config.get("text_config")
    sections = (config, text if isinstance(text, Mapping) else {})
    return any(section.get("tie_word_embeddings") is True for section in sections)


def head_dims(config: Mapping[str, Any]) -> dict[str, int]:
    """Rows of one head in the query and key projections of each part, for a config made here."""
    dims = {"text": config.get("text_config", config)["head_dim"]}
    if vision := config.get("vision_config"):
        dims["vision"] = vision["hidden_size"] // vision["num_attention_heads"]
    return dims
