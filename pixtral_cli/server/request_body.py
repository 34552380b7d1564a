"""A request's body in, a checked model out, or a refusal in one sentence; knows no field and no route."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from pixtral_cli.server.errors import ApiError

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
        raise invalid(error, body) from None


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


SHOULD = re.compile(r"^\w+ should ")
MISSING = ("missing", "union_tag_not_found")
WORDS = {"none_required": "be null"} | dict.fromkeys(
    ("dict_type", "model_type", "model_attributes_type"), "be an object"
)
LONGEST = 64
MOST = 200
"""Problems that are looked at: a body may have a hundred thousand."""


def invalid(error: ValidationError, body: Mapping[str, Any]) -> ApiError:
    """The refusal of `body`: a field that nobody knows, else what is wrong furthest inside."""
    problems = _meant(error.errors(include_url=False)[:MOST], body)
    found = [(_path(problem, body), problem) for problem in problems]
    for path, problem in found:
        if problem["type"] == "extra_forbidden":
            return ApiError(400, f"The field {path} is not supported.", param=path, code="unknown_parameter")
    path, problem = max(found, key=lambda entry: len(_inside(entry[1], body)))
    if problem["type"] in MISSING:
        return ApiError(400, f"The field {path} is missing.", param=path, code="missing_required_parameter")
    wanted = dict.fromkeys(_wanted(other) for other_path, other in found if other_path == path)
    return ApiError(400, f"{path} should {' or '.join(wanted)}.", param=path, code="invalid_value")


def _meant(problems: Sequence[Mapping[str, Any]], value: Any, level: int = 0) -> list[Mapping[str, Any]]:
    """Without those of branches of a union that `value` was not meant for: of another kind, or wrong in more places.

    The problems have the first `level` places in common, which lead to `value`.
    """
    here: list[Mapping[str, Any]] = []
    further: dict[int | str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        is_here = len(problem["loc"]) <= level + (problem["type"] == "missing")
        (here if is_here else further.setdefault(problem["loc"][level], [])).append(problem)
    steps = {place: value[place] for place in further if _leads_on(place, value)}
    branches = [place for place in further if place not in steps]
    ranks = {place: _misfit(further[place], level + 1) for place in branches}
    for place in branches:
        if ranks[place] == min(ranks.values()):
            here += _meant(further[place], value, level + 1)
    for place, inner in steps.items():
        here += _meant(further[place], inner, level + 1)
    return here


def _misfit(problems: Sequence[Mapping[str, Any]], level: int) -> tuple[bool, int]:
    """How little a value fits a branch: whether it is of another kind, and how many values within it are."""
    wrong = [problem for problem in problems if _is_of_another_kind(problem)]
    return any(len(problem["loc"]) == level for problem in wrong), len(wrong)


def _is_of_another_kind(problem: Mapping[str, Any]) -> bool:
    is_word = problem["type"] == "literal_error" and isinstance(problem["input"], str)
    return problem["type"].endswith(("_type", "literal_error")) and not is_word


def _leads_on(place: int | str, value: Any) -> bool:
    """Whether the place is one in the value, and not the name of a branch."""
    return (isinstance(value, dict) and place in value) or (isinstance(value, list) and isinstance(place, int))


def _inside(problem: Mapping[str, Any], body: Any) -> list[int | str]:
    """The keys and indices on the way to the problem."""
    *before, last = problem["loc"] or ("",)
    if problem["type"] == "missing":
        return [*_steps(body, before), last]
    steps = _steps(body, [*before, last])
    if problem["type"].startswith("union_tag"):
        steps.append(problem["ctx"]["discriminator"].strip("'"))
    return steps


def _steps(body: Any, places: Sequence[int | str]) -> list[int | str]:
    """Those of the places that are in the body; pydantic's name the branches of unions as well, some as a key is named.

    What leads furthest is meant, to the last place if it can be.
    """
    return max(_ways(body, places), key=lambda steps: (steps[-1:] == list(places[-1:]), len(steps)))


def _ways(body: Any, places: Sequence[int | str]) -> Iterator[list[int | str]]:
    """Every choice of places that are keys and not names of branches."""
    if not places:
        yield []
        return
    place, *rest = places
    if _leads_on(place, body):
        yield from ([place, *steps] for steps in _ways(body[place], rest))
    if isinstance(place, str):
        yield from _ways(body, rest)


def _path(problem: Mapping[str, Any], body: Any) -> str:
    """E.g. ``messages[0].content[1].text``."""
    path = ""
    for step in _inside(problem, body):
        path += f"[{step}]" if isinstance(step, int) else f".{step[:LONGEST]}"
    return path.removeprefix(".") or "The body"


def _wanted(problem: Mapping[str, Any]) -> str:
    kind = problem["type"]
    if kind == "union_tag_invalid":
        return f"be one of {problem['ctx']['expected_tags']}"
    return WORDS.get(kind) or SHOULD.sub("", problem["msg"]).partition(" after validation")[0]
