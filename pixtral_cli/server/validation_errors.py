"""What pydantic says against a request's body in, one sentence about one field out. Knows no field and no route."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pixtral_cli.server.errors import ApiError

SHOULD = re.compile(r"^\w+ should ")
"""How most of pydantic's messages begin, as in "Input should be a valid string"."""
MISSING = ("missing", "union_tag_not_found")
WORDS = {"none_required": "be null"} | dict.fromkeys(
    ("dict_type", "model_type", "model_attributes_type"), "be an object"
)
MAX_KEY_LENGTH = 64
MAX_PROBLEMS = 200
"""More are not looked at: a body may have a hundred thousand."""


def refusal_of_body(error: ValidationError, body: Mapping[str, Any]) -> ApiError:
    """The refusal of `body`: a field that nobody knows, else what is wrong furthest inside."""
    problems = _meant(error.errors(include_url=False)[:MAX_PROBLEMS], body)
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
    """`problems` without those of branches of a union that `value` was not meant for: see `_misfit`.

    The problems have the first `level` places in common, which lead to `value`.
    """
    here: list[Mapping[str, Any]] = []
    further: dict[int | str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        is_here = len(problem["loc"]) <= level + (problem["type"] == "missing")
        (here if is_here else further.setdefault(problem["loc"][level], [])).append(problem)
    steps = {place: value[place] for place in further if _is_place(place, value)}
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


def _is_place(place: int | str, value: Any) -> bool:
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
    if _is_place(place, body):
        yield from ([place, *steps] for steps in _ways(body[place], rest))
    if isinstance(place, str):
        yield from _ways(body, rest)


def _path(problem: Mapping[str, Any], body: Any) -> str:
    """E.g. ``messages[0].content[1].text``."""
    path = ""
    for step in _inside(problem, body):
        path += f"[{step}]" if isinstance(step, int) else f".{step[:MAX_KEY_LENGTH]}"
    return path.removeprefix(".") or "The body"


def _wanted(problem: Mapping[str, Any]) -> str:
    kind = problem["type"]
    if kind == "union_tag_invalid":
        return f"be one of {problem['ctx']['expected_tags']}"
    return WORDS.get(kind) or SHOULD.sub("", problem["msg"]).partition(" after validation")[0]
