"""Mistral 3 (Mistral Small 3.1 and later, Magistral, Ministral 3): Pixtral, its patches normed and merged before the
projector. A config.json in, the sizes and the model out.

An image is cut into square patches, and each square of merge x merge of them is one [IMG] token, in raster order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pixtral_cli.model.config import ConfigFields, ImageLayout, ModelConfig, VisionConfig
from pixtral_cli.model.families import pixtral

if TYPE_CHECKING:
    from pixtral_cli.model.vision import VisionLanguageModel

ARCHITECTURES: tuple[str, ...] = ("Mistral3ForConditionalGeneration",)
MODEL_TYPE = "mistral3"
TOWER: str | None = pixtral.TOWER

# What a config.json may leave out (transformers `configuration_mistral3.py`). Those of models whose head is another
# matrix than their embedding do not say so: what the file holds decides.
DEFAULTS: Mapping[str, Any] = {
    "multimodal_projector_bias": False,
    "spatial_merge_size": 2,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Mistral3Config(ModelConfig):
    """`merge` patches, along each side, are one token."""

    merge: int = 1


def read_config(architecture: str, raw: Mapping[str, Any]) -> Mistral3Config:
    raw = {**DEFAULTS, **raw}
    parts, merge = pixtral.read_config(architecture, raw), ConfigFields(raw).size("spatial_merge_size")
    assert parts.image_layout is not None, architecture
    layout = ImageLayout(parts.image_layout.token_size * merge, parts.image_layout.longest_side)
    return Mistral3Config(**{**vars(parts), "image_layout": layout, "merge": merge})


def build(config: ModelConfig) -> VisionLanguageModel:
    from pixtral_cli.model.vision import MergingProjector, VisionLanguageModel, VisionTower

    assert isinstance(config, Mistral3Config), config
    assert isinstance(config.vision, VisionConfig), config
    vision, text = config.vision, config.text
    projector = MergingProjector(
        vision.hidden_size, text.hidden_size, config.projector_bias, config.merge, text.norm_eps
    )
    return VisionLanguageModel(config, VisionTower(vision), projector)
