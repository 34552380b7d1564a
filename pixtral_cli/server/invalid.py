"""What pydantic found wrong with a body in, one sentence that names the field out; knows no fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pixtral_cli.server.errors import ApiError

SHOULD = re.compile(r"^\w+ should ")
LONGEST = 64


def invalid(error: ValidationError, body: Mapping[str, Any]) -> ApiError:
    """The refusal of `body`: a field that nobody knows, else what is wrong furthest inside."""
    found = [(_path(problem, body), problem) for problem in error.errors(include_url=False)]
    for path, problem in found:
        if problem["type"] == "extra_forbidden":
            return ApiError(400, f"The field {path} is not supported.", param=path, code="unknown_parameter")
    path, problem = max(found, key=lambda entry: len(_inside(entry[1], body)))
    if problem["type"] == "missing":
        return ApiError(400, f"The field {path} is missing.", param=path, code="missing_required_parameter")
    wanted = dict.fromkeys(_wanted(other) for other_path, other in found if other_path == path)
    return ApiError(400, f"{path} should {' or '.join(wanted)}.", param=path, code="invalid_value")


def _inside(problem: Mapping[str, Any], body: Any) -> list[int | str]:
    """The keys and indices on the way to the problem; pydantic's place names the branches of unions as well."""
    steps: list[int | str] = []
    *places, last = problem["loc"] or ("",)
    for place in (*places, last):
        here = isinstance(body, dict) and isinstance(place, str) and place in body
        if here or isinstance(body, list) and isinstance(place, int):
            body = body[place]
            steps.append(place)
    if problem["type"] == "missing":
        steps.append(last)
    if problem["type"].startswith("union_tag"):
        steps.append(problem["ctx"]["discriminator"].strip("'"))
    return steps


def _path(problem: Mapping[str, Any], body: Any) -> str:
    """E.g. ``messages[0].content[1].text``."""
    path = ""
    for step in _inside(problem, body):
        path += f"[{step}]" if isinstance(step, int) else f".{step[:LONGEST]}"
    return path.removeprefix(".") or "The body"


def _wanted(problem: Mapping[str, Any]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "union_tag_not_found":
        return "say which it is"
    if kind == "union_tag_invalid":
        return f"be one of {context['expected_tags']}"
    if kind == "none_required":
        return "be null"
    return SHOULD.sub("", problem["msg"])
