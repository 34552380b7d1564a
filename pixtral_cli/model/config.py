"""A checkpoint's config.json in, frozen sizes out. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pixtral_cli.errors import ModelError

VISION_ARCHITECTURES = ("LlavaForConditionalGeneration",)
TEXT_ARCHITECTURES = ("MistralForCausalLM", "MinistralForCausalLM")

# Fields that Hugging Face configs may leave out. A nested `text_config` is written as its difference from
# MistralConfig, so an absent field means that class's default (transformers `configuration_mistral.py`).
MISTRAL_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
# The tower's sizes in Pixtral-12B; its config.json leaves most of them out.
PIXTRAL_VISION_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
}


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the decoder. `sliding_windows` holds one entry a layer: a span in tokens, or None for all."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_length: int
    sliding_windows: tuple[int | None, ...]
    tied_embeddings: bool

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TextConfig:
        def field(key: str) -> Any:
            return raw.get(key, MISTRAL_DEFAULTS[key])

        _only(raw, "hidden_act", "silu")
        heads, layers = field("num_attention_heads"), field("num_hidden_layers")
        return cls(
            vocab_size=_positive("vocab_size", field("vocab_size")),
            hidden_size=_positive("hidden_size", field("hidden_size")),
            intermediate_size=_positive("intermediate_size", field("intermediate_size")),
            num_layers=_positive("num_hidden_layers", layers),
            num_heads=_positive("num_attention_heads", heads),
            num_kv_heads=_divisor("num_key_value_heads", field("num_key_value_heads") or heads, heads),
            head_dim=_even("head_dim", raw.get("head_dim") or field("hidden_size") // heads),
            norm_eps=float(field("rms_norm_eps")),
            rope_theta=_rope_theta(raw),
            max_length=_positive("max_position_embeddings", field("max_position_embeddings")),
            sliding_windows=_sliding_windows(raw, field("sliding_window"), layers),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Numbers of one token's keys and values over all layers; times the dtype's size gives bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the Pixtral tower; lengths of pictures and patches in pixels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    rope_theta: float
    feature_layer: int
    norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], feature_layer: int = -1) -> VisionConfig:
        def field(key: str) -> int:
            return _positive(f"vision_config.{key}", raw.get(key, PIXTRAL_VISION_DEFAULTS[key]))

        # Published configs say "gelu" or nothing; the weights were trained with SiLU. Both mean SiLU here.
        if raw.get("hidden_act", "silu") not in ("silu", "gelu"):
            raise ModelError(f"vision_config.hidden_act is {raw['hidden_act']!r}, and Pixtral's tower has SiLU.")
        layers = field("num_hidden_layers")
        return cls(
            hidden_size=field("hidden_size"),
            intermediate_size=field("intermediate_size"),
            num_layers=layers,
            num_heads=_divisor("vision_config.num_attention_heads", field("num_attention_heads"), field("hidden_size")),
            num_channels=field("num_channels"),
            image_size=field("image_size"),
            patch_size=field("patch_size"),
            rope_theta=_rope_theta(raw),
            feature_layer=_feature_layer(feature_layer, layers),
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_features(self) -> int:
        """Numbers in one patch: channels x patch_size x patch_size."""
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True)
class ModelConfig:
    """What the checkpoint is: a decoder and, in a Pixtral, a vision tower with its projector."""

    architecture: str
    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    projector_bias: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config.json.

        Raises ModelError when the architecture is not one of ours or a field contradicts it.
        """
        architecture = _architecture(raw)
        if architecture in TEXT_ARCHITECTURES:
            return cls(architecture, TextConfig.from_dict(raw))
        vision = _section(raw, "vision_config")
        if vision.get("model_type", "pixtral") != "pixtral":
            raise ModelError(
                f"The picture part of this model is {vision['model_type']!r}, and only 'pixtral' is known.",
                hint="LLaVA models with a CLIP or SigLIP tower cannot run here.",
            )
        text = _section(raw, "text_config")
        if text.get("model_type", "mistral") not in ("mistral", "ministral"):
            raise ModelError(f"The text part of this model is {text['model_type']!r}; only 'mistral' is known.")
        _only(raw, "projector_hidden_act", "gelu")
        _only(raw, "vision_feature_select_strategy", "full")
        tied = raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        return cls(
            architecture,
            TextConfig.from_dict({**text, "tie_word_embeddings": tied}),
            VisionConfig.from_dict(vision, raw.get("vision_feature_layer", -1)),
            image_token_id=int(raw.get("image_token_index", raw.get("image_token_id", 10))),
            projector_bias=bool(raw.get("multimodal_projector_bias", True)),
        )


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    known = VISION_ARCHITECTURES + TEXT_ARCHITECTURES
    by_type = {"llava": "LlavaForConditionalGeneration", "mistral": "MistralForCausalLM"}
    found = names[0] if names else by_type.get(str(raw.get("model_type")), raw.get("model_type"))
    if found not in known:
        raise ModelError(
            f"The checkpoint's architecture is {found or 'not stated'}, which is not known here.",
            hint=f"Known architectures: {', '.join(known)}.",
        )
    return found


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = raw.get(key)
    if not isinstance(section, Mapping):
        raise ModelError(f"config.json has no {key!r} object, which a Llava model needs.")
    return section


def _only(raw: Mapping[str, Any], key: str, value: str) -> None:
    if raw.get(key, value) != value:
        raise ModelError(f"config.json says {key} = {raw[key]!r}, and only {value!r} is known for this model.")


def _positive(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(f"config.json says {key} = {value!r}, which should be a positive whole number.")
    return value


def _divisor(key: str, value: Any, whole: int) -> int:
    if whole % _positive(key, value):
        raise ModelError(f"config.json says {key} = {value}, which does not divide {whole}.")
    return value


def _even(key: str, value: Any) -> int:
    if _positive(key, value) % 2:
        raise ModelError(f"config.json says {key} = {value}, which rotary positions need to be even.")
    return value


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """Older configs say `rope_theta` (and `rope_scaling`), newer ones `rope_parameters`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "axial"):
        raise ModelError(f"The checkpoint scales its rotary positions by {kind!r}, which is not known here.")
    return float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))


def _sliding_windows(raw: Mapping[str, Any], window: Any, layers: int) -> tuple[int | None, ...]:
    """One window a layer, from one number, a repeating list of windows, or `layer_types` beside a number."""
    kinds = raw.get("layer_types")
    if kinds is not None:
        if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise ModelError(f"layer_types should name full_attention or sliding_attention for {layers} layers.")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    pattern = list(window) if isinstance(window, list | tuple) and window else [window]
    if any(w is not None and (isinstance(w, bool) or not isinstance(w, int) or w <= 0) for w in pattern):
        raise ModelError(f"config.json says sliding_window = {window!r}; positive numbers or null are known.")
    return tuple(pattern[i % len(pattern)] for i in range(layers))


def _feature_layer(layer: Any, layers: int) -> int:
    """Number of layers to run for `vision_feature_layer`, which indexes [after ln_pre, layer 1, … layer n]."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise ModelError(f"config.json says vision_feature_layer = {layer!r}; the tower has {layers} layers.")
    return layer % (layers + 1)
