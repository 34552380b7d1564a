"""How hard to think and in which form to answer, as a request says it; and what a model is told of that.

Source of the rules of tekken.json: mistral-common `tokens/tokenizers/model_settings_builder.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pixtral_cli.prompt.errors import EffortUnknown
from pixtral_cli.prompt.side_file import SideFile

ANY_JSON = {"anyOf": [{"type": "object"}, {"type": "array"}]}
"""What a model is told of an answer that may be any JSON."""


@dataclass(frozen=True)
class ModelSettings:
    """What a request says: an effort such as "none" or "high", and OpenAI's `response_format`, which was checked."""

    reasoning_effort: str | None = None
    response_format: Mapping[str, Any] | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that were given, by name: what templates see."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def json_schema(self) -> Any:
        kind = (self.response_format or {}).get("type")
        if kind == "json_schema":
            return (self.response_format or {})["json_schema"]["schema"]
        return ANY_JSON if kind == "json_object" else None


@dataclass(frozen=True)
class SettingsRules:
    """Which settings a model of V15 knows: `model_settings_builder` of its tekken.json."""

    efforts: tuple[str, ...] = ()
    default_effort: str | None = None
    takes_schema: bool = False

    @classmethod
    def of(cls, builder: SideFile) -> SettingsRules:
        effort = builder.section("reasoning_effort")
        efforts = effort.checked("values", (), _are_texts, "a list of texts")
        default = effort.text("default") if "default" in effort else None
        return cls(tuple(efforts), default, "json_schema" in builder)

    def built(self, asked: ModelSettings) -> dict[str, Any]:
        """What the prompt tells, its names in order. A setting that the model does not know is left out.

        Raises:
            EffortUnknown: the model knows efforts, and not this one.
        """
        effort = asked.reasoning_effort or self.default_effort
        if self.efforts and effort not in (None, *self.efforts):
            raise EffortUnknown(str(effort), self.efforts)
        schema = asked.json_schema if self.takes_schema else None
        told = {"json_schema": schema, "reasoning_effort": effort if self.efforts else None}
        return {name: value for name, value in told.items() if value is not None}


NO_SETTINGS = SettingsRules()


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
