"""What flags are made of: checks that name the flag at fault, and the bridge from flag records to Typer.

A command is written as `def run(source: SourceFlags, request: RequestFlags, ...)` over the records of
`options`; `with_flags` shows Typer one option for every field of them. Knows no single flag and no terminal.
"""

import functools
import inspect
import math
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from ipaddress import ip_network
from typing import Any

import typer

from pixtral_cli import devices
from pixtral_cli.cli.completions import Values
from pixtral_cli.errors import DeviceError
from pixtral_cli.generation_options import OPTION_RANGES

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(b|[kmgt](?:ib)?)?", re.IGNORECASE)
UNITS = {"b": 1} | {unit + end: 1024**power for power, unit in enumerate("kmgt", 1) for end in ("", "ib")}


class UsageError(Exception):
    """Flags that do not go together: exit code 2. `hint` says what to write instead."""

    def __init__(self, message: str, hint: str = "See: pixtral run --help") -> None:
        super().__init__(message)
        self.hint = hint


def one_of(names: tuple[str, ...], *, beside: tuple[str, ...] = ()) -> dict[str, Any]:
    """Typer settings for a flag that takes one of `names`: checked, listed in the error, completed by Tab.

    Those of `beside` are accepted as well, but not shown.
    """

    def check(value: str | None) -> str | None:
        if value is not None and value not in names + beside:
            raise typer.BadParameter(f"{value!r} is not known; known are {', '.join(names)}.")
        return value

    return {"callback": check, "autocompletion": Values(names).offered}


def within(low: float, high: float = math.inf) -> Callable[[Any], Any]:
    """A check that a number is finite and from `low` to `high`."""

    def check(value: float | None) -> float | None:
        if value is None or (low <= value <= high and math.isfinite(value)):
            return value
        most = f" and at most {high}" if high < math.inf else ""
        raise typer.BadParameter(f"{value} is not at least {low}{most}.")

    return check


def within_option(name: str) -> Callable[[Any], Any]:
    """A check for the range of that generation option."""
    return within(OPTION_RANGES[name].low, OPTION_RANGES[name].high)


def device_text(value: str | None) -> str | None:
    """A check that `devices.parse` reads the text."""
    try:
        if value is not None:
            devices.parse(value)
    except DeviceError as error:
        raise typer.BadParameter(f"{error} {error.hint}") from error
    return value


def token_limit(value: int | None) -> int | None:
    """A check for a number of tokens, or -1."""
    if value is None or value == -1 or value > 0:
        return value
    raise typer.BadParameter(f"{value} is not a number of tokens; -1 means until the end of the context.")


def byte_count(text: str) -> int:
    """``8GiB``, ``512 MiB``, ``1.5g`` or a plain number of bytes -> bytes: a parser for Typer."""
    written = SIZE.fullmatch(text.strip())
    found = int(float(written[1]) * UNITS[(written[2] or "b").lower()]) if written else 0
    if found < 1:
        raise typer.BadParameter(f"{text!r} is not a size; write 8GiB, 512MiB or a number of bytes.")
    return found


def networks(values: list[str] | None) -> list[str]:
    """A check that `ipaddress.ip_network` reads each: ``10.0.0.0/8``, or one address."""
    for value in values or ():
        try:
            ip_network(value)
        except ValueError as error:
            raise typer.BadParameter(f"{error}; write a network as 10.0.0.0/8, or one address.") from None
    return values or []


def whole_text(value: str | None) -> str | None:
    """An argument as real text: Python smuggles bytes that the locale cannot read as lone surrogates."""
    return None if value is None else os.fsencode(value).decode("utf-8", "replace")


def stop_texts(values: list[str] | None) -> list[str]:
    """A check that none of the stop strings is empty."""
    if any(not value for value in values or ()):
        raise typer.BadParameter("An empty string would stop every answer before it begins.")
    return [whole_text(value) or "" for value in values or ()]


def with_flags(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """What Typer registers for `command`, whose parameters are flag records.

    Called with every flag's value, it fills the records and gives back the command ready to run, so that the
    program runs it outside Typer, inside its own error boundary.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    records = {name: parameter.annotation for name, parameter in parameters.items()}

    def parsed(**values: Any) -> Callable[[], None]:
        filled = {
            name: record(**{field.name: values[field.name] for field in fields(record)})
            for name, record in records.items()
        }
        return functools.partial(command, **filled)

    parsed.__name__, parsed.__doc__ = command.__name__, command.__doc__
    parsed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=field.type,
            )
            for record in records.values()
            for field in _in_order(record)
        ]
    )
    parsed.__annotations__ = {field.name: field.type for record in records.values() for field in fields(record)}
    return parsed


def _in_order(record: type) -> list[Any]:
    """The record's own fields before those it inherits, which is the order that the help shows."""
    return sorted(fields(record), key=lambda field: field.name not in record.__annotations__)
