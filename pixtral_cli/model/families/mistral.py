"""Mistral and Ministral: decoders for text, of models that see as well. A config.json in, the decoder's sizes and the
model out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pixtral_cli.model.config import ConfigFields, ModelConfig, QueryScaling, TextConfig, Yarn
from weights_cache.json_fields import is_number

if TYPE_CHECKING:
    from pixtral_cli.model.language_model import LanguageModel

ARCHITECTURES: tuple[str, ...] = ("MistralForCausalLM", "MinistralForCausalLM")
MODEL_TYPE = "mistral"
TOWER: str | None = None

# Fields that Hugging Face configs may leave out. A nested `text_config` is written as its difference from the class of
# its model_type, so an absent field means that class's default (transformers `configuration_mistral.py` and
# `configuration_ministral3.py`).
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
MINISTRAL3_DEFAULTS: Mapping[str, Any] = {
    **DEFAULTS,
    "vocab_size": 131072,
    "num_hidden_layers": 34,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
MINISTRAL3_ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Where a config of that type has neither `rope_parameters` nor `rope_scaling`."""


BETAS: Mapping[str, float] = {"beta_fast": 32.0, "beta_slow": 1.0}
"""What YaRN's bounds are where a config leaves them out, or has 0 or null."""


def read_config(architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(architecture, read_text_config(raw))


def build(config: ModelConfig) -> LanguageModel:
    from pixtral_cli.model.language_model import LanguageModel

    return LanguageModel(config)


def read_text_config(raw: Mapping[str, Any]) -> TextConfig:
    """The decoder's sizes; also of a config's `text_config`. A `model_type` of "ministral3" has its own defaults, and
    scales queries. Raises ModelError."""
    third = raw.get("model_type") == "ministral3"
    fields = ConfigFields({**(MINISTRAL3_DEFAULTS if third else DEFAULTS), **raw})
    if third and not (fields.get("rope_scaling") or fields.get("rope_parameters")):
        fields = ConfigFields({**fields.values, "rope_parameters": MINISTRAL3_ROPE})
    fields.only("hidden_act", "silu")
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    layers, rope = fields.size("num_hidden_layers"), fields.rope("default", "yarn")
    return TextConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.divisor("num_key_value_heads", heads, default=heads),
        head_dim=fields.even("head_dim", default=hidden // heads or None),
        norm_eps=float(fields.number("rms_norm_eps")),
        rope_theta=float(rope.number("rope_theta")),
        max_length=fields.size("max_position_embeddings"),
        sliding_windows=_sliding_windows(fields, layers),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        yarn=_yarn(rope),
        query_scaling=_query_scaling(rope) if third else None,
    )


def _yarn(rope: ConfigFields) -> Yarn | None:
    """What transformers' `_compute_yarn_parameters` reads (`modeling_rope_utils.py`)."""
    if rope.get("rope_type") != "yarn":
        return None
    if rope.number("rope_theta") <= 1:
        raise rope.refused("rope_theta", "should be above 1")
    if rope.number("partial_rotary_factor", 1.0) != 1:
        raise rope.refused("partial_rotary_factor", "is not known here")
    factor = float(rope.number("factor"))
    fast, slow = (float(rope.number(key) if rope.get(key) else usual) for key, usual in BETAS.items())
    return Yarn(
        factor, _original_length(rope), fast, slow, _attention_factor(rope, factor), rope.flag("truncate", True)
    )


def _attention_factor(rope: ConfigFields, factor: float) -> float:
    """As it is given, or by the paper's rule, or where `mscale_all_dim` undoes it, without."""
    if "attention_factor" in rope:
        return float(rope.number("attention_factor"))
    scale, undone = (rope.checked(key, 0.0, _is_factor, "a number from 0 up") for key in ("mscale", "mscale_all_dim"))
    log = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (scale * log + 1) / (undone * log + 1) if scale and undone else log + 1


def _is_factor(value: Any) -> bool:
    return is_number(value) and value >= 0


def _query_scaling(rope: ConfigFields) -> QueryScaling | None:
    """None where queries stay as they are."""
    beta = rope.checked("llama_4_scaling_beta", 0.0, _is_factor, "a number from 0 up")
    return QueryScaling(float(beta), _original_length(rope)) if beta else None


def _original_length(rope: ConfigFields) -> int:
    return rope.size("original_max_position_embeddings", rope.size("max_position_embeddings"))


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
