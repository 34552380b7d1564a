"""Tiny random checkpoints in the real forms, written by transformers. The oracle's model comes back with the folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PixtralVisionConfig,
)

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads, as in NeMo
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "sliding_window": None,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "image_size": 1024,
    "patch_size": 16,
}


def pixtral(folder: Path, **text) -> LlavaForConditionalGeneration:
    """A Pixtral of three layers each side, saved into `folder`."""
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**VISION),
        text_config=MistralConfig(**{**TEXT, **text}),
        image_token_index=10,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _save(LlavaForConditionalGeneration, config, folder)


def mistral(folder: Path, **changes) -> MistralForCausalLM:
    return _save(MistralForCausalLM, MistralConfig(**{**TEXT, **changes}), folder)


def ministral(folder: Path, **changes) -> MinistralForCausalLM:
    """One layer of full attention, then sliding ones."""
    kinds = ["full_attention"] + ["sliding_attention"] * (TEXT["num_hidden_layers"] - 1)
    config = MinistralConfig(**{**TEXT, "sliding_window": 7, "layer_types": kinds, **changes})
    return _save(MinistralForCausalLM, config, folder)


def _save(kind: type, config, folder: Path):
    torch.manual_seed(0)
    model = kind(config).float().eval()
    with torch.no_grad():  # wide enough that logits differ visibly
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, edit) -> None:
    """Rewrite config.json after `edit(config)` has changed the dictionary in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
