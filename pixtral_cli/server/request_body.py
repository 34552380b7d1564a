"""A request's body in, a checked model out, or a refusal in one sentence; knows no field and no route."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NoReturn, TypeVar

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from pixtral_cli.server.errors import ApiError
from pixtral_cli.server.validation_errors import refusal_of_body

Model = TypeVar("Model", bound=BaseModel)
LARGE = 256 * 1024
"""Bytes; more is not parsed on the event loop."""

MAX_DEPTH = 64
MAX_MARKS = 4_000_000
"""Quotes, commas and brackets in a body. A value takes some; Python needs up to a hundred bytes for a value."""
MARKS = b'"', b",", b"[", b"{"
LARGEST_INTEGER = 2**63 - 1
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRoute(APIRoute):
    """A route whose body is read here: FastAPI gets the model, made by stricter rules and, of much, on a thread.

    The app's `state.work` runs a function on a thread.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]

        async def handle_checked(request: Request) -> Response:
            body = await _read(request)
            checked = partial(_checked, model, body)
            request = _CheckedRequest(request.scope, request.receive)
            request.checked = await request.app.state.work(checked) if len(body) > LARGE else checked()
            del body, checked
            return await handle(request)

        return handle_checked


class _CheckedRequest(Request):
    """What FastAPI asks for its JSON."""

    checked: BaseModel

    async def body(self) -> bytes:
        return b"read"

    async def json(self) -> BaseModel:
        return self.checked


async def _read(request: Request) -> bytes:
    return b"".join([piece async for piece in request.stream() if piece])  # `request.body()` would keep it


def _checked(model: type[Model], body: bytes) -> Model:
    return validated(model, parse_json(body))


def validated(model: type[Model], body: dict[str, Any]) -> Model:
    """`body` as `model`. Raises ApiError, which names the first field that is wrong."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise refusal_of_body(error, body) from None


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that `body` holds, in time and memory proportional to its length.

    Refused are, beyond what is no JSON: other encodings than UTF-8, NaN and infinities (also as 1e999), integers
    beyond 64 bits, halves of surrogate pairs (no text has them), a key that appears twice (the reader would have to
    ignore one of them), and depths that a recursive reader further in could not follow.

    Raises:
        ApiError: 400.
    """
    if sum(map(body.count, MARKS)) > MAX_MARKS:
        raise _bad("The body holds too many values.")
    try:
        value = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad(f"The body is not UTF-8: byte {error.start} begins no character.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _bad(f"The body is not JSON: something else is expected at {where}.") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise _bad("The body should be a JSON object.")
    _check_depth(value)
    if SURROGATE.search(body):
        _check_text(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _bad("An object of the body has the same key twice.")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(value := int(digits)) > LARGEST_INTEGER:
        raise _bad("The body holds an integer beyond 64 bits.")
    return value


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        _constant(digits)
    return value


def _constant(name: str) -> NoReturn:
    raise _bad("The body holds a number that is not finite: JSON knows neither NaN nor Infinity.")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
)


def _check_depth(value: Any) -> None:
    """Level by level, as a recursive walk would be what it guards against."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        held = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in held if isinstance(value, dict | list)]


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _bad("The body holds half of a surrogate pair, which is no character.") from None


def _too_deep() -> ApiError:
    return _bad(f"The body is nested deeper than {MAX_DEPTH} levels.")


def _bad(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")
