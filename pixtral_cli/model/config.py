"""A checkpoint's config.json in, frozen sizes out. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pixtral_cli.errors import ModelError
from weights_cache.errors import FETCH_AGAIN
from weights_cache.json_fields import Fields

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
    "rope_theta": 10000.0,
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
    "rope_theta": 10000.0,
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
        fields = ConfigFields({**MISTRAL_DEFAULTS, **raw})
        fields.only("hidden_act", "silu")
        heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
        layers = fields.size("num_hidden_layers")
        return cls(
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

    @property
    def kv_numbers_per_token(self) -> int:
        """Numbers of one token's keys and values over all layers; times the dtype's size gives bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def multiplications_per_token(self) -> int:
        """Of its matrices' weights with one token, the head's left out."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden_size * (attention + 3 * self.intermediate_size)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the Pixtral tower; lengths of pictures and patches in pixels. `feature_layer` counts layers to run."""

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
    def from_dict(cls, raw: Mapping[str, Any], feature_layer: Any = -1) -> VisionConfig:
        fields = ConfigFields({**PIXTRAL_VISION_DEFAULTS, **raw}, "vision_config.")
        # Published configs say "gelu" or nothing; the weights were trained with SiLU. Both mean SiLU here.
        fields.only("hidden_act", "silu", "gelu")
        hidden, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
        heads = fields.divisor("num_attention_heads", hidden)
        if hidden // heads % 4:
            raise fields.refused("num_attention_heads", f"should give heads of a multiple of 4, not {hidden // heads}")
        return cls(
            hidden_size=hidden,
            intermediate_size=fields.size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_channels=fields.size("num_channels"),
            image_size=fields.size("image_size"),
            patch_size=fields.size("patch_size"),
            rope_theta=fields.rope_theta(),
            feature_layer=_feature_layer(feature_layer, layers),
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


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

        Raises ModelError when the architecture is not one of ours, or a field is not what it should be.
        """
        architecture = _architecture(raw)
        if architecture in TEXT_ARCHITECTURES:
            return cls(architecture, TextConfig.from_dict(raw))
        fields = ConfigFields({"image_token_index": raw.get("image_token_id", 10), **raw})
        vision, text = fields.object("vision_config"), fields.object("text_config")
        ConfigFields(vision, "vision_config.").only("model_type", "pixtral")
        ConfigFields(text, "text_config.").only("model_type", "mistral", "ministral")
        fields.only("projector_hidden_act", "gelu")
        fields.only("vision_feature_select_strategy", "full")
        tied = fields.flag("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        return cls(
            architecture,
            TextConfig.from_dict({**text, "tie_word_embeddings": tied}),
            VisionConfig.from_dict(vision, raw.get("vision_feature_layer", -1)),
            image_token_id=fields.size("image_token_index"),
            projector_bias=fields.flag("multimodal_projector_bias", True),
        )


@dataclass(frozen=True)
class ConfigFields(Fields):
    """The fields of a config, or of its section `prefix`."""

    prefix: str = ""

    def wrong(self, key: str, wanted: str) -> ModelError:
        return self.refused(key, f"should be {wanted}")

    def refused(self, key: str, why: str) -> ModelError:
        """The error for the field `key`, whose value `why`."""
        return ModelError(
            f"config.json says {self.prefix}{key} = {self.get(key)!r}, which {why}.",
            hint=f"{FETCH_AGAIN}, or mend its config.json.",
        )

    def divisor(self, key: str, whole: int, default: int | None = None) -> int:
        """A size that divides `whole`."""
        if whole % self.size(key, default):
            raise self.refused(key, f"should divide {whole}")
        return self.size(key, default)

    def even(self, key: str, default: int | None) -> int:
        """An even size, as rotary positions need."""
        if self.size(key, default) % 2:
            raise self.refused(key, "should be even")
        return self.size(key, default)

    def only(self, key: str, *values: str) -> None:
        """Refuse a field that is there and says something else than the one thing that is built."""
        if key in self.values and self.values[key] not in values:
            raise self.refused(key, f"is not known here; {' or '.join(values)} is")

    def rope_theta(self) -> float:
        """Older configs say `rope_theta` (and `rope_scaling`), newer ones `rope_parameters`."""
        rope = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise self.wrong("rope_parameters", "an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "axial"):
            raise ModelError(
                f"The checkpoint scales its rotary positions by {kind!r}, which is not known here.",
                hint="Choose a model without rotary scaling.",
            )
        return float(ConfigFields({**self.values, **rope}, self.prefix).number("rope_theta"))


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    known = VISION_ARCHITECTURES + TEXT_ARCHITECTURES
    by_type = {"llava": "LlavaForConditionalGeneration", "mistral": "MistralForCausalLM"}
    kind = raw.get("model_type")
    found = names[0] if isinstance(names, list) and names else by_type.get(str(kind), kind)
    if found not in known:
        raise ModelError(
            f"The checkpoint's architecture is {found or 'not stated'}, which is not known here.",
            hint=f"Known architectures: {', '.join(known)}.",
        )
    return found


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


def _feature_layer(layer: Any, layers: int) -> int:
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
