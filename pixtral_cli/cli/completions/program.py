"""Typer's commands in, plain records of what can be typed out: commands, flags, arguments and what completes them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pixtral_cli.cli.completions import Values

NOTHING = Values()


@dataclass(frozen=True)
class Flag:
    """`values` is None for a flag that takes no value."""

    names: tuple[str, ...]
    help: str
    metavar: str
    values: Values | None
    repeatable: bool


@dataclass(frozen=True)
class Argument:
    metavar: str
    values: Values
    repeatable: bool


@dataclass(frozen=True)
class Command:
    """`path` is what is typed: ("pixtral", "cache", "list")."""

    path: tuple[str, ...]
    help: str
    flags: tuple[Flag, ...]
    arguments: tuple[Argument, ...]
    commands: tuple[Command, ...]

    @property
    def name(self) -> str:
        return self.path[-1]

    def walk(self) -> Iterator[Command]:
        """This, then all below it."""
        yield self
        for command in self.commands:
            yield from command.walk()


def read(context: Any) -> Command:
    """The whole program, of which `context` is any command's Typer context."""
    root = context.find_root()
    return _command(root.command, root, ("pixtral",))


def _command(command: Any, context: Any, path: tuple[str, ...]) -> Command:
    shown = [parameter for parameter in command.get_params(context) if not getattr(parameter, "hidden", False)]
    below = getattr(command, "commands", {})
    return Command(
        path,
        first_sentence(command.get_short_help_str(limit=200)),
        tuple(_flag(parameter, command) for parameter in shown if parameter.param_type_name == "option"),
        tuple(_argument(parameter, command) for parameter in shown if parameter.param_type_name == "argument"),
        tuple(_command(each, context, (*path, name)) for name, each in below.items() if not each.hidden),
    )


def _flag(option: Any, command: Any) -> Flag:
    valued = not (option.is_flag or option.count)
    names = tuple(sorted((*option.opts, *option.secondary_opts), key=len))
    values = _values(option, command) if valued else None
    return Flag(names, first_sentence(option.help or ""), option.metavar or "VALUE", values, option.multiple)


def _argument(argument: Any, command: Any) -> Argument:
    return Argument(re.sub(r"\W", "", argument.metavar), _values(argument, command), argument.nargs == -1)


def _values(parameter: Any, command: Any) -> Values:
    """What the parameter was declared with. Typer wraps `Values.offered` out of sight, but keeps the signature."""
    declared = inspect.signature(command.callback).parameters[parameter.name].annotation
    settings = getattr(declared, "__metadata__", (None,))[0]
    return getattr(getattr(settings, "autocompletion", None), "__self__", NOTHING)


def first_sentence(text: str) -> str:
    """What a shell has room for."""
    line = " ".join(text.split())
    return re.split(r"(?<=[^.])\.(?= [A-Z0-9]|$)", line, maxsplit=1)[0]
