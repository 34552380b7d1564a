"""The operations of the API in, their description for programs (OpenAPI 3.1) and for people (HTML) out."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pixtral_cli.server import schemas

REF = "#/components/schemas/{model}"
HELLO = [{"role": "user", "content": "What can you do?"}]
TOO_MANY = {429: "The queue is full.", 503: "The server is stopping, or holds too much."}
BODY_ERRORS = {
    400: "The body is not what it should be; the sentence names the field.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not declared to be JSON.",
    500: "The server failed.",
}
NOT_FOUND = {404: "The model is not served here."}


@dataclass(frozen=True)
class Operation:
    """One method of one path; `name` is the function that answers it."""

    path: str
    method: str
    name: str
    summary: str
    result: type[BaseModel] | None
    """None: plain text."""
    body: type[BaseModel] | None = None
    examples: tuple[dict[str, Any], ...] = ()
    event: type[BaseModel] | None = None
    """The data of a stream's events, where the body has `stream`."""
    errors: tuple[tuple[int, str], ...] = ()
    is_open: bool = False
    """Whether no key is needed."""


_CHAT = {"model": "tiny", "messages": HELLO, "max_tokens": 64}
_ANSWER_ERRORS = tuple({**BODY_ERRORS, **NOT_FOUND, **TOO_MANY}.items())
_TOKEN_ERRORS = tuple({**BODY_ERRORS, **NOT_FOUND}.items())
OPERATIONS = (
    Operation(
        "/v1/chat/completions",
        "POST",
        "chat",
        "The next message of a conversation, which may hold pictures.",
        schemas.ChatCompletion,
        schemas.ChatRequest,
        (_CHAT, {**_CHAT, "stream": True, "stream_options": {"include_usage": True}}),
        schemas.ChatCompletionChunk,
        _ANSWER_ERRORS,
    ),
    Operation(
        "/v1/completions",
        "POST",
        "completions",
        "The continuation of a text.",
        schemas.Completion,
        schemas.CompletionRequest,
        ({"model": "tiny", "prompt": "Once upon a time", "max_tokens": 16},),
        schemas.Completion,
        _ANSWER_ERRORS,
    ),
    Operation("/v1/models", "GET", "models", "The names of the model.", schemas.Models),
    Operation("/v1/models/{name}", "GET", "model", "One of them.", schemas.Model, errors=tuple(NOT_FOUND.items())),
    Operation(
        "/predict",
        "POST",
        "predict",
        "A chat completion whose body needs no model, with 512 tokens and temperature 0.7 unless it says otherwise.",
        schemas.ChatCompletion,
        schemas.PredictRequest,
        ({"messages": HELLO},),
        schemas.ChatCompletionChunk,
        _ANSWER_ERRORS,
    ),
    Operation(
        "/tokenize",
        "POST",
        "tokenize",
        "The tokens of a text or a conversation, and what its pictures cost.",
        schemas.Tokenized,
        schemas.TokenizeRequest,
        ({"prompt": "How many tokens is this?"}, {"messages": HELLO}),
        errors=_TOKEN_ERRORS,
    ),
    Operation(
        "/detokenize",
        "POST",
        "detokenize",
        "The text of tokens.",
        schemas.Detokenized,
        schemas.DetokenizeRequest,
        ({"tokens": [1, 71, 437, 110]},),
        errors=_TOKEN_ERRORS,
    ),
    Operation("/health", "GET", "health", "Whether the process lives.", schemas.Status, is_open=True),
    Operation(
        "/ready",
        "GET",
        "ready",
        "Whether requests are worked on.",
        schemas.Status,
        errors=((503, "Not yet, or no longer."),),
        is_open=True,
    ),
    Operation("/metrics", "GET", "metrics", "Counters for Prometheus.", None),
    Operation("/version", "GET", "version", "The version of pixtral.", schemas.Version),
)


def document(operations: Sequence[Operation], title: str, version: str) -> dict[str, Any]:
    """The OpenAPI document."""
    models = {model for op in operations for model in (op.result, op.body, op.event) if model} | {schemas.Error}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in ordered], ref_template=REF)
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "apiKey": {"type": "apiKey", "in": "header", "name": "Api-Key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": "A key is needed if the server has one."},
        "paths": paths,
        "components": {"schemas": definitions["$defs"], "securitySchemes": keys},
        "security": [{}, {"bearer": []}, {"apiKey": []}],
    }


def _described(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {"200": _success(operation), **{str(s): _error(why) for s, why in _errors(operation)}},
    }
    if operation.is_open:
        described["security"] = []
    if "{name}" in operation.path:
        named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": "tiny"}
        described["parameters"] = [named]
    if operation.body is not None:
        examples = {f"example {number}": {"value": value} for number, value in enumerate(operation.examples, 1)}
        content = {"application/json": {"schema": _ref(operation.body), "examples": examples}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _success(operation: Operation) -> dict[str, Any]:
    if operation.result is None:
        return {"description": "Text.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    content = {"application/json": {"schema": _ref(operation.result)}}
    if operation.event is not None:
        data = {"type": "string", "description": f"JSON of {operation.event.__name__}; the last event's is [DONE]."}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}  # of each event, as readers of OpenAPI 3.1 take it
    return {"description": "As asked.", "content": content}


def _errors(operation: Operation) -> list[tuple[int, str]]:
    refused = [] if operation.is_open else [(401, "A key is needed, or this one is not known.")]
    return sorted([*refused, *operation.errors])


def _error(why: str) -> dict[str, Any]:
    return {"description": why, "content": {"application/json": {"schema": _ref(schemas.Error)}}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}


STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; }
"""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
DOCS_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


def page(operations: Sequence[Operation], title: str, version: str) -> str:
    """The description as one page of HTML that needs nothing else. Goes with `DOCS_HEADERS`."""
    schemas = document(operations, title, version)["components"]["schemas"]
    sections = "".join(_section(operation, schemas) for operation in operations)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} {version}: the API</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><h1>{title} {version}</h1><p>The same for programs: <a href="openapi.json">openapi.json</a>. '
        "A key, if the server has one, goes into the header <code>Authorization: Bearer …</code>.</p>"
        f"{sections}</body></html>"
    )


def _section(operation: Operation, schemas: dict[str, Any]) -> str:
    heading = f'<h2 id="{operation.name}"><code>{operation.method} {operation.path}</code></h2>'
    examples = "".join(f"<pre>{html.escape(json.dumps(each, indent=2))}</pre>" for each in operation.examples)
    table = _table(schemas[operation.body.__name__]) if operation.body else ""
    return f"{heading}<p>{html.escape(operation.summary)}</p>{examples}{table}"


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
