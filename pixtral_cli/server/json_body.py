"""The bytes of a body in, a JSON object out, or a 400 that says what is wrong; knows no fields."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from pixtral_cli.server.errors import ApiError

MAX_DEPTH = 64
MAX_MARKS = 4_000_000
"""Quotes, commas and brackets in a body. A value takes some; Python needs up to a hundred bytes for a value."""
MARKS = b'"', b",", b"[", b"{"
LARGEST_INTEGER = 2**63 - 1
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


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
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]


def _inside(container: dict[str, Any] | list[Any]) -> Any:
    return container.values() if isinstance(container, dict) else container


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _bad("The body holds half of a surrogate pair, which is no character.") from None


def _too_deep() -> ApiError:
    return _bad(f"The body is nested deeper than {MAX_DEPTH} levels.")


def _bad(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")
