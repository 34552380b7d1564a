"""Ministral 3 and Devstral 2: Mistral's decoder, whose positions YaRN stretches and whose queries grow with them. A
config.json in, the decoder's sizes and the model out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.families.mistral import build as build
from pixtral_cli.model.families.mistral import read_text_config

ARCHITECTURES: tuple[str, ...] = ("Ministral3ForCausalLM",)
MODEL_TYPE = "ministral3"
TOWER: str | None = None


def read_config(architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(architecture, read_text_config({"model_type": MODEL_TYPE, **raw}))
