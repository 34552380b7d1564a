"""An OpenAPI document in, one page of HTML out that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from typing import Any

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; }
"""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


def page(document: dict[str, Any]) -> str:
    """Goes with `HEADERS`."""
    title = f"{document['info']['title']} {document['info']['version']}"
    schemas = document["components"]["schemas"]
    sections = "".join(
        _section(method.upper(), path, operation, schemas)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: the API</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><h1>{title}</h1><p>The same for programs: <a href="openapi.json">openapi.json</a>. '
        "A key, if the server has one, goes into the header <code>Authorization: Bearer …</code>.</p>"
        f"{sections}</body></html>"
    )


def _section(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    heading = f'<h2 id="{operation["operationId"]}"><code>{method} {path}</code></h2>'
    said = f"{heading}<p>{html.escape(operation['summary'])}</p>"
    if "requestBody" not in operation:
        return said
    content = operation["requestBody"]["content"]["application/json"]
    given = (json.dumps(each["value"], indent=2) for each in content["examples"].values())
    examples = "".join(f"<pre>{html.escape(each)}</pre>" for each in given)
    return said + examples + _table(schemas[_kind(content["schema"])])


def _table(schema: dict[str, Any]) -> str:
    needed = schema.get("required", ())
    rows = (
        f"<tr><td><code>{name}</code></td><td>{html.escape(_kind(field))}{', needed' * (name in needed)}</td>"
        f"<td>{html.escape(field.get('description', ''))}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"<table><tr><th>field</th><th>value</th><th></th></tr>{''.join(rows)}</table>"


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(_kind(each) for each in schema[several] if each.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(each) for each in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}" if "items" in schema else "list"
    bounds = [schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")]
    kind = schema.get("type", "anything")
    return f"{kind}, {bounds[0]} to {bounds[1]}" if None not in bounds else kind
