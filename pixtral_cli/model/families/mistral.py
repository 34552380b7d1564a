"""Mistral and Ministral: decoders for text. A config.json in, the decoder's sizes and the model out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pixtral_cli.model.config import ConfigFields, ModelConfig, TextConfig

if TYPE_CHECKING:
    from pixtral_cli.model.language_model import LanguageModel

ARCHITECTURES: tuple[str, ...] = ("MistralForCausalLM", "MinistralForCausalLM")
MODEL_TYPE = "mistral"

# Fields that Hugging Face configs may leave out. A nested `text_config` is written as its difference from
# MistralConfig, so an absent field means that class's default (transformers `configuration_mistral.py`).
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}


def read_config(architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(architecture, read_text_config(raw))


def build(config: ModelConfig) -> LanguageModel:
    from pixtral_cli.model.language_model import LanguageModel

    return LanguageModel(config)


def read_text_config(raw: Mapping[str, Any]) -> TextConfig:
    """The decoder's sizes; also of a config's `text_config`. Raises ModelError."""
    fields = ConfigFields({**DEFAULTS, **raw})
    fields.only("hidden_act", "silu")
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    layers = fields.size("num_hidden_layers")
    return TextConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.divisor("num_key_value_heads", heads, default=heads),
        head_dim=fields.even("head_dim", default=hidden // heads or None),
        norm_eps=float(fields.number("rms_norm_eps")),
        rope_theta=fields.rope_theta(),
        max_length=fields.size("max_position_embeddings"),
        sliding_windows=_sliding_windows(fields, layers),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _sliding_windows(fields: ConfigFields, layers: int) -> tuple[int | None, ...]:
    """One window a layer, from one number, a repeating list of windows, or `layer_types` beside a number.

    Ministral-8B's Hugging Face config calls all layers sliding where every fourth sees everything; its window is its
    whole context of 32768, so both are the same.
    """
    window, kinds = fields.get("sliding_window"), fields.get("layer_types")
    pattern = window if isinstance(window, list) and window else [window]
    if any(w is not None and (isinstance(w, bool) or not isinstance(w, int) or w <= 0) for w in pattern):
        raise fields.wrong("sliding_window", "a positive whole number, null, or a list of them")
    if kinds is None:
        return tuple(pattern[i % len(pattern)] for i in range(layers))
    full_or_sliding = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in full_or_sliding for kind in kinds):
        raise fields.refused("layer_types", f"should name {' or '.join(full_or_sliding)} for each of {layers} layers")
    return tuple(pattern[0] if kind == "sliding_attention" else None for kind in kinds)
