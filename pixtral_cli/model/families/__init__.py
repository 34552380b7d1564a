"""A config.json in, the sizes and the model of its family out. The registry: one line for each family.

A family is a module here, found by the architecture that config.json names, and by its tower's type where several have
that architecture. Importing one imports no torch, so that `inspect` and `tokenize` can read a config; what it builds
from is imported when it builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from pixtral_cli.errors import ModelError
from pixtral_cli.model.config import ConfigFields, ModelConfig
from pixtral_cli.model.families import llava, ministral3, mistral, mistral3, pixtral

if TYPE_CHECKING:
    from pixtral_cli.model.language_model import LanguageModel


class Family(Protocol):
    """What a family's module has. `ARCHITECTURES` are names in config.json; the first stands for `MODEL_TYPE` where a
    config names none. `TOWER` is the `model_type` of its vision_config; None for models of text."""

    ARCHITECTURES: tuple[str, ...]
    MODEL_TYPE: str
    TOWER: str | None

    def read_config(self, architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
        """The sizes that a Hugging Face config.json says. Raises ModelError, which names the field that is wrong."""
        ...

    def build(self, config: ModelConfig) -> LanguageModel:
        """The model, its parameters named as `weights_cache.names` names tensors; on torch's current device."""
        ...


FAMILIES: list[Family] = [pixtral, llava, mistral3, mistral, ministral3]
"""Of several with one architecture, the first reads a config that does not say the type of its tower."""


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json.

    Raises ModelError when architecture and tower are of no family here, or a field is not what it should be.
    """
    names, kind = raw.get("architectures"), raw.get("model_type")
    by_type: Mapping[str, Any] = {family.MODEL_TYPE: family.ARCHITECTURES[0] for family in FAMILIES}
    architecture = names[0] if isinstance(names, list) and names else by_type.get(str(kind), kind)
    vision = raw.get("vision_config")
    tower = vision.get("model_type") if isinstance(vision, Mapping) else None
    return _family_of(architecture, tower).read_config(architecture, raw)


def build(config: ModelConfig) -> LanguageModel:
    """The model of `config`, its weights not set."""
    return _family_of(config.architecture, config.vision and config.vision.kind).build(config)


def _family_of(architecture: Any, tower: Any) -> Family:
    found = [family for family in FAMILIES if architecture in family.ARCHITECTURES]
    if not found:
        known = dict.fromkeys(architecture for family in FAMILIES for architecture in family.ARCHITECTURES)
        raise ModelError(
            f"The checkpoint's architecture is {architecture or 'not stated'}, which is not known here.",
            hint=f"Known architectures: {', '.join(known)}.",
        )
    towers = [family.TOWER for family in found if family.TOWER]
    if towers and tower is not None:
        ConfigFields({"model_type": tower}, "vision_config.").only("model_type", *towers)
    return next((family for family in found if tower == family.TOWER), found[0])
