"""A params.json, Mistral's own form of a model's sizes, in; the config as Hugging Face writes it out.

Knows no tensors. Sources: mistral-inference `args.py` (fields and defaults), `transformer.py` and `rope.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import hf_config
from .errors import CheckpointCorrupt, ModelUnsupported
from .json_fields import CheckpointFields, read_json_object

ROPE_THETA = 1_000_000.0  # `self.args.rope_theta or 1000000.0`
VISION_ROPE_THETA = 10_000.0
CONTEXT = 128_000  # positions that the reference prepares; older files do not say it

UNKNOWN_FEATURES = ("moe", "yarn", "llama_4_scaling", "lora", "use_biases")
UNKNOWN_VISION_FEATURES = ("add_pre_mm_projector_layer_norm", "mm_projector_id")
"""Fields whose presence, unless they are empty or false, changes what the model computes."""


def read_config(path: Path) -> dict[str, Any]:
    """The config that the params.json at `path` describes. Raises as `to_config`."""
    return to_config(path, read_json_object(path))


def to_config(path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """The config that `params` describe, which `path` holds.

    Raises CheckpointCorrupt (a field is missing or of the wrong kind), ModelUnsupported.
    """
    _refuse(path, params, UNKNOWN_FEATURES)
    if params.get("model_type", "transformer") != "transformer":
        raise ModelUnsupported(path, f"model_type {str(params['model_type'])[:60]!r}")
    text = _text(CheckpointFields(params, path))
    vision = params.get("vision_encoder")
    if vision is None:
        return hf_config.text_model(text)
    if not isinstance(vision, dict):
        raise CheckpointCorrupt(path, "its 'vision_encoder' is not an object")
    return _with_vision(path, text, vision)


def _text(params: CheckpointFields) -> dict[str, Any]:
    heads = params.size("n_heads")
    hidden = params.size("dim")
    return {
        "vocab_size": params.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": params.size("hidden_dim"),
        "num_hidden_layers": params.size("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": params.size("n_kv_heads", heads),
        "head_dim": params.size("head_dim", hidden // heads),
        "rms_norm_eps": params.number("norm_eps"),
        "rope_theta": params.number("rope_theta", ROPE_THETA),
        "max_position_embeddings": params.size("max_seq_len", params.size("max_position_embeddings", CONTEXT)),
        "sliding_window": _window(params),
        "tie_word_embeddings": params.flag("tied_embeddings", False),
    }


def _window(params: CheckpointFields) -> int | list[int | None] | None:
    """One window for all layers, or a list of them, null for none, that the layers repeat."""
    key = "sliding_window" if "sliding_window" in params else "_sliding_window"
    value = params.get(key)
    if not isinstance(value, list):
        return params.size(key) if key in params else None
    if not value or any(window is not None and (type(window) is not int or window < 1) for window in value):
        raise CheckpointCorrupt(params.path, f"its {key!r} is {str(value)[:60]}, not a list of positive numbers")
    return value


def _with_vision(path: Path, text: Mapping[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    _refuse(path, params, UNKNOWN_VISION_FEATURES)
    if params.get("spatial_merge_size", 1) != 1:
        raise ModelUnsupported(path, f"spatial_merge_size {str(params['spatial_merge_size'])[:60]}")
    fields = CheckpointFields(params, path)
    vision = {
        "hidden_size": fields.size("hidden_size"),
        "intermediate_size": fields.size("intermediate_size"),
        "num_hidden_layers": fields.size("num_hidden_layers"),
        "num_attention_heads": fields.size("num_attention_heads"),
        "num_channels": fields.size("num_channels", 3),
        "image_size": fields.size("image_size"),
        "patch_size": fields.size("patch_size"),
        "rope_theta": fields.number("rope_theta", VISION_ROPE_THETA),
    }
    image_token = fields.size("image_token_id", hf_config.IMAGE_TOKEN_ID)
    return hf_config.vision_model(text, vision, image_token, fields.flag("adapter_bias", True))


def _refuse(path: Path, params: Mapping[str, Any], features: tuple[str, ...]) -> None:
    for feature in features:
        if value := params.get(feature):
            raise ModelUnsupported(path, f"{feature} = {str(value)[:60]}")
