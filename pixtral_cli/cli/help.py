"""How help looks: a plain page, flags under the headings that their options name. Knows no single flag.

Typer's own panels are drawn by rich, whose import and layout cost more than all the rest of `--help`. This page
costs nothing, breaks no flag's name in the middle, and reads the same in a pipe.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

GENERAL = "General"


def _write_flags(command: Any, ctx: Any, formatter: Any) -> None:
    """One section for every heading, in the order in which the flags name them; flags without one come last."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            sections.setdefault(getattr(parameter, "rich_help_panel", None) or GENERAL, []).append(record)
    general = sections.pop(GENERAL, [])
    for title, records in (*sections.items(), (GENERAL, general)):
        if records:
            with formatter.section(typer.style(title, bold=True)):
                formatter.write_dl(records)


class Command(TyperCommand):
    """A command whose help is laid out by this module."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_flags(self, ctx, formatter)


class Group(TyperGroup):
    """The program itself: its commands first, then its own flags."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        _write_flags(self, ctx, formatter)
