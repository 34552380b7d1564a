"""`pixtral completions`: prints the Tab completion script of a shell. Loads no model and no torch."""

from dataclasses import dataclass
from typing import Annotated

import typer

from pixtral_cli.cli.completions import LISTINGS, listed_now
from pixtral_cli.cli.console import Console
from pixtral_cli.cli.flags import one_of

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = """\
Examples:

\b
  source <(pixtral completions bash)        # in ~/.bashrc
  source <(pixtral completions zsh)         # in ~/.zshrc, after compinit
  pixtral completions fish > ~/.config/fish/completions/pixtral.fish

The script holds commands, flags and their choices. For the models on this machine it asks pixtral.
"""


@dataclass(frozen=True, kw_only=True)
class CompletionsArguments:
    """For which shell. The scripts themselves ask for lists by the same argument: `pixtral completions models`."""

    shell: Annotated[
        str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", **one_of(SHELLS, beside=tuple(LISTINGS)))
    ]
    context: typer.Context


def completions(arguments: CompletionsArguments) -> None:
    """Print a shell script that completes commands, flags, models and files."""
    console = Console()
    if arguments.shell in LISTINGS:
        console.write("".join(f"{word}\n" for word in listed_now(arguments.shell)))
    else:
        console.write(script(arguments.shell, arguments.context))


def script(shell: str, context: typer.Context) -> str:
    """The script for `shell`, one of SHELLS."""
    from pixtral_cli.cli.completions import bash, fish, program, zsh

    return {"bash": bash, "zsh": zsh, "fish": fish}[shell].script(program.read(context))
