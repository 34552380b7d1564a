"""OpenAI-style tools in, checked ones out, and what a call of one is; knows no messages and no tokens."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pixtral_cli.prompt.errors import InvalidTools

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What a function may be called, for OpenAI and for mistral-common (`protocol/instruct/validator.py`)."""
ID = re.compile(r"[a-zA-Z0-9]{9}")
"""What Mistral's models and templates know a call by."""
LETTERS = string.ascii_letters + string.digits
DEPTH = 100
"""Objects and lists within each other that arguments and schemas may have."""
NAME_RULE = "1 to 64 letters, digits, underscores or dashes"


@dataclass(frozen=True)
class Tool:
    """A function that a model may ask for; `parameters` is a JSON schema of its arguments, {} for any."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    """Whether a call that the model is free to make must keep to `parameters`; one that is forced always does."""

    @property
    def described(self) -> dict[str, Any]:
        """As prompts show it: OpenAI's form, in mistral-common's order."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolCall:
    """A model's request for a function: `arguments` is JSON text as the model wrote it, `id` nine letters or digits."""

    id: str
    name: str
    arguments: str


def parse_tools(tools: Any) -> tuple[Tool, ...]:
    """Check ``[{"type": "function", "function": {"name": …, "description"?, "parameters"?, "strict"?}}, …]``.

    None and an empty list are no tools.

    Raises:
        InvalidTools: names the entry that is wrong, e.g. ``tools[1].function.name``.
    """
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple):
        raise InvalidTools("tools", "should be a list of tools")
    parsed = tuple(_tool(entry, f"tools[{index}]") for index, entry in enumerate(tools))
    names = [tool.name for tool in parsed]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidTools(f"tools[{index}].function.name", f"a tool before it is called {name!r} as well")
    return parsed


def _tool(entry: Any, where: str) -> Tool:
    if not isinstance(entry, dict) or not isinstance(entry.get("function"), dict):
        raise InvalidTools(where, "should be an object with type and function")
    if entry.get("type", "function") != "function":
        raise InvalidTools(where, f"the type should be function, not {entry['type']!r}")
    function, where = entry["function"], f"{where}.function"
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidTools(f"{where}.name", f"should be {NAME_RULE}")
    if not isinstance(description, str | None):
        raise InvalidTools(f"{where}.description", "should be a text")
    if not isinstance(parameters, dict | None) or as_json(parameters) is None:
        raise InvalidTools(f"{where}.parameters", "should be an object: a JSON schema")
    if not isinstance(function.get("strict"), bool | None):
        raise InvalidTools(f"{where}.strict", "should be true or false")
    return Tool(name, description or "", parameters or {}, function.get("strict") or False)


def fitting_id(id: str) -> str:
    """The id itself, or always the same nine letters or digits for one that models do not know how to write."""
    if ID.fullmatch(id):
        return id
    number = int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest())
    return "".join(LETTERS[number // len(LETTERS) ** place % len(LETTERS)] for place in range(9))


def new_id() -> str:
    """An id for a call whose model gave it none."""
    return "".join(secrets.choice(LETTERS) for _ in range(9))


def value_of(text: str) -> Any:
    """What JSON text stands for, {} for an empty text; text that is no JSON, or nested too deep, stands for itself."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return text
    return text if _is_deep(value) else value


def as_json(value: Any) -> str | None:
    """The value as JSON text; None where it is none, or nested too deep."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return None if _is_deep(value) else text


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()


def texts_in(value: Any) -> Iterable[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from texts_in(key)
            yield from texts_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from texts_in(entry)
