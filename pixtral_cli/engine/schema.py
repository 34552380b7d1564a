"""A client's JSON schema in, the one that its answer is bound to out. Knows no grammar and no tokens.

Whatever the second allows, the first allows as well. Source of the keywords: JSON Schema 2020-12 and older drafts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"))
"""Those that llguidance writes. The rest are annotations, as JSON Schema has them: password, path, byte, int64, …"""
ONE = ("items", "additionalItems", "additionalProperties")
LISTS = ("prefixItems", "items")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
TOGETHER = ("allOf", "anyOf", "oneOf")
DECIDED = (*TOGETHER, "$ref", "additionalProperties", "enum", "const")
ABOUT_OBJECTS = ("properties", "patternProperties", "additionalProperties", "required")


def bound(schema: Any) -> Any:
    """The schema without annotations that would be refused, its objects closed.

    An object that lists `properties` has no others unless `additionalProperties` says so: else a model would write
    others, and the same one twice. Schemas that describe one object together stay open: each would forbid what the
    others list.
    """
    binding = _Binding(schema)
    binding.made(schema)  # finds what is shared
    return binding.made(schema)


class _Binding:
    def __init__(self, schema: Any) -> None:
        self.shared: set[str] = set()
        """References to schemas that describe an object together with others."""
        self.root = schema

    def made(self, schema: Any, path: str = "#", alone: bool = True) -> Any:
        """`schema`, which is at `path`; `alone` says that nothing else describes the same value."""
        if not isinstance(schema, Mapping):
            return schema
        alone = alone and path not in self.shared
        made = {key: value for key, value in schema.items() if not _says_nothing(key, value)}
        apart = alone and _leaves_all_to_one(schema)
        if not apart:
            self._share(_refs_in_place(schema))
        for key, value in made.items():
            made[key] = self._part(key, value, f"{path}/{key}", apart)
        if alone and _can_be_closed(made):
            made["additionalProperties"] = False
        return made

    def _share(self, refs: list[str]) -> None:
        """What a shared schema refers to is shared as well."""
        while refs:
            ref = unquote(refs.pop())
            if ref not in self.shared:
                self.shared.add(ref)
                refs += _refs_in_place(_found(self.root, ref))

    def _part(self, key: str, value: Any, path: str, apart: bool) -> Any:
        if isinstance(value, Mapping) and key in ONE:
            return self.made(value, path)
        if isinstance(value, Mapping) and key in MAPS:
            return {name: self.made(each, f"{path}/{_escaped(name)}") for name, each in value.items()}
        if isinstance(value, list) and key in LISTS:
            return [self.made(each, f"{path}/{index}") for index, each in enumerate(value)]
        if isinstance(value, list) and key in TOGETHER:
            return [self.made(each, f"{path}/{index}", apart) for index, each in enumerate(value)]
        return value


def _refs_in_place(schema: Any) -> list[str]:
    """References that describe the same value as the schema."""
    if not isinstance(schema, Mapping):
        return []
    branches = [each for key in TOGETHER if isinstance(schema.get(key), list) for each in schema[key]]
    refs = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    return refs + [ref for branch in branches for ref in _refs_in_place(branch)]


def _found(value: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) leads to; None for nothing."""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list):
            value = value[int(name)] if name in map(str, range(len(value))) else None
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _says_nothing(key: str, value: Any) -> bool:
    is_annotation = key == "format" and isinstance(value, str) and value not in FORMATS
    return is_annotation or (key == "uniqueItems" and value is False)


def _leaves_all_to_one(schema: Mapping[str, Any]) -> bool:
    """Whether an object is described by one of the schema's branches, whichever is taken, and by nothing beside it."""
    parts = [key for key in (*TOGETHER, "$ref") if key in schema]
    several = isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1
    return len(parts) <= 1 and not several and not (parts and any(key in schema for key in ABOUT_OBJECTS))


def _can_be_closed(schema: Mapping[str, Any]) -> bool:
    properties, required, least = (schema.get(key) for key in ("properties", "required", "minProperties"))
    if not isinstance(properties, Mapping) or any(key in schema for key in DECIDED):
        return False
    names = required if isinstance(required, list) else []
    enough = not isinstance(least, int) or least <= len(properties)
    return enough and all(name in properties for name in names)


def _escaped(name: str) -> str:
    """As JSON pointers write it."""
    return name.replace("~", "~0").replace("/", "~1")
