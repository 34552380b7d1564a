"""The sizes of a model, frozen, and typed access to the config.json that they are read from. Knows no tensors and no
family: what a family's fields mean is read in `families`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pixtral_cli.errors import ModelError
from weights_cache.json_fields import Fields
from weights_cache.wording import FETCH_AGAIN


@dataclass(frozen=True)
class Yarn:
    """How rotary positions reach beyond `original_length`, at every length (Peng et al. 2023, YaRN): the angles of slow
    frequencies are divided by `factor`, and cosines and sines multiplied by `attention_factor`.

    Kept are frequencies that turn more than `beta_fast` times in the original length, divided those that turn less than
    `beta_slow` times. `truncate`: the bounds are whole frequencies.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class QueryScaling:
    """Queries grow with their position: by 1 + beta ln(1 + floor(position / length)), after they are rotated."""

    beta: float
    length: int


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
    yarn: Yarn | None = None
    query_scaling: QueryScaling | None = None


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of a vision tower; lengths in pixels. `kind` is its `model_type` in config.json."""

    kind: ClassVar[str]

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    num_channels: int
    patch_size: int


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """Of the Pixtral tower. `feature_layer` counts layers to run."""

    kind: ClassVar[str] = "pixtral"

    rope_theta: float
    feature_layer: int
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class ClipConfig(TowerConfig):
    """Of the CLIP tower, which sees squares of side `image_size`. `feature_layers` are those whose outputs are put side
    by side, counted from 1; 0 is what goes into the first. `activation` is "quick_gelu" or "gelu"."""

    kind: ClassVar[str] = "clip_vision_model"

    image_size: int
    feature_layers: tuple[int, ...]
    keeps_class: bool
    """Whether the feature of the class token, which stands for no patch, is an image token too."""
    activation: str
    norm_eps: float


@dataclass(frozen=True)
class ImageLayout:
    """How images become tokens, in pixels: each square of side `token_size` is an image token, in raster order; an
    image is resized so that no side is longer than `longest_side`.

    `cropped`: every image becomes one square of that side, and its tokens follow each other, `own_tokens` of the whole
    image first; else rows end in tokens of text.
    """

    token_size: int
    longest_side: int
    cropped: bool = False
    own_tokens: int = 0

    def tokens(self, width: int, height: int) -> int:
        """Of an image whose sides are multiples of `token_size`."""
        return (width // self.token_size) * (height // self.token_size) + self.own_tokens


@dataclass(frozen=True)
class ModelConfig:
    """What the checkpoint is: a decoder and, where it sees, a vision tower with its projector."""

    architecture: str
    text: TextConfig
    vision: TowerConfig | None = None
    image_layout: ImageLayout | None = None
    image_token_id: int | None = None
    projector_bias: bool = True


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

    def rope(self, *kinds: str) -> ConfigFields:
        """What it says of rotary positions, which are of one of the `kinds`: `rope_parameters`, and in older configs
        `rope_scaling` and `rope_theta` beside it."""
        rope = self.get("rope_scaling") or self.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise self.wrong("rope_parameters", "an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in kinds:
            raise ModelError(
                f"The checkpoint scales its rotary positions by {kind!r}, which is not known here.",
                hint="Choose a model without rotary scaling.",
            )
        return ConfigFields({**self.values, **rope, "rope_type": kind}, self.prefix)
