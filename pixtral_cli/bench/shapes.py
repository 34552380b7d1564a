"""Names of sizes in, configs as config.json has them out. Imports no torch, so that `--help` can list them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMMON = {
    "vocab_size": 131072,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def _sizes(hidden: int, layers: int, heads: int, ffn: int, **others: Any) -> dict[str, Any]:
    return COMMON | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        **others,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1b": _sizes(2048, 16, 16, 8192),
    "3b": _sizes(3072, 26, 32, 9216, tie_word_embeddings=True),
    "8b": _sizes(4096, 36, 32, 12288),
    "nemo-12b": _sizes(5120, 40, 32, 14336),
    "ministral-3b": _sizes(
        3072, 26, 32, 9216, tie_word_embeddings=True, model_type="ministral3", max_position_embeddings=262144
    ),
    "small-24b": _sizes(5120, 40, 32, 32768, rope_theta=1e9, max_position_embeddings=131072),
}
"""1.5 billion parameters, and the sizes of Ministral 3 3B, Ministral 8B, Mistral NeMo 12B; and, with the positions, the
queries and the vision tower of their families, of Ministral 3 3B and Mistral Small 3 24B (their config.json)."""
ENCODINGS = ("float32", "bfloat16", "fp8", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "nf4")
"""Those that random weights are made in."""
TOWER = {
    "model_type": "pixtral",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 1024,
    "patch_size": 16,
    "rope_theta": 10000.0,
}
"""Of Pixtral 12B."""
MERGING = ("ministral-3b", "small-24b")
"""Shapes whose tower is of Mistral 3: of smaller patches, of which four are a token."""
MISTRAL3: Mapping[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "spatial_merge_size": 2,
    "multimodal_projector_bias": False,
    "vision_config": {**TOWER, "image_size": 1540, "patch_size": 14},
}
IMAGE_TOKEN_ID = 10
"""Of the built-in model's tokenizer, which a shape borrows."""


def config_of(shape: str, sees: bool = False) -> dict[str, Any]:
    """The config.json of a model of that shape; one that `sees` has the tower of its family, or else Pixtral's."""
    text = {"model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2, **SHAPES[shape]}
    if not sees:
        architecture = "Ministral3ForCausalLM" if text["model_type"] == "ministral3" else "MistralForCausalLM"
        return {"architectures": [architecture], **text}
    seeing = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": IMAGE_TOKEN_ID,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": text,
        "vision_config": dict(TOWER),
    }
    return {**seeing, **MISTRAL3} if shape in MERGING else seeing
