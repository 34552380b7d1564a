"""Arguments in, exit code out: registers the commands and is the one place where an error becomes a sentence.

A command is a module of `commands` with a function of the same name, whose docstring is its help, and EXAMPLES, the
end of that help. A group of commands has a table COMMANDS, and HELP, in place of the function.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any

import typer

from pixtral_cli import __version__
from pixtral_cli.cli import console
from pixtral_cli.cli.flags import UsageError, with_flags
from pixtral_cli.cli.help import Command, Group
from pixtral_cli.commands import bench, cache, completions, download, export, inspect, run, serve, tokenize, verify
from pixtral_cli.errors import PixtralError, is_out_of_memory

DEBUG = "PIXTRAL_DEBUG"
FAILED, USAGE, INTERRUPTED = 1, 2, 130

# Typer keeps its own copy of click, so the base of its errors is taken from Typer, never from click.
_TyperError = next(
    cls for cls in typer.BadParameter.__mro__ if issubclass(cls, Exception) and cls.__name__ == "ClickException"
)


app = typer.Typer(
    name="pixtral",
    help="Run Pixtral and other Mistral models on your own machine: they look at pictures and answer.",
    epilog='Try: pixtral run --model-path tiny -i picture.png -p "What shape is it?"',
    cls=Group,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)


def _register(module: ModuleType) -> None:
    name = module.__name__.rpartition(".")[2]
    if hasattr(module, "COMMANDS"):
        group = typer.Typer(help=module.HELP, epilog=module.EXAMPLES, cls=Group, no_args_is_help=True)
        for each, command in module.COMMANDS.items():
            group.command(each, cls=Command)(with_flags(command))
        app.add_typer(group, name=name)
    else:
        app.command(name, cls=Command, epilog=module.EXAMPLES)(with_flags(getattr(module, name)))


for module in (run, serve, tokenize, download, inspect, export, verify, bench, completions, cache):
    _register(module)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pixtral {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run_program(arguments: list[str]) -> int:
    """Run one command line and give back its exit code: 0, 1 failure, 2 usage, 130 interrupted.

    Typer only reads the arguments: it gives back the command ready to run, or the exit code of what it did
    itself (help, version, completion).
    """
    if not (sys.warnoptions or os.environ.get(DEBUG)):
        warnings.simplefilter("ignore")  # libraries' notes to programmers; ours to users are sentences
    arguments, color = _spelt_out(arguments), None if console.is_styled(sys.stdout) else False
    try:
        command = app(arguments, prog_name="pixtral", standalone_mode=False, color=color)
    except _TyperError as error:
        return _refuse(error, arguments)
    except OSError as error:  # help or version, and no room where they go
        console.tell_error(f"Standard output cannot be written: {error.strerror}.", console.CHECK_OUTPUT)
        console.abandon_stdout()
        return FAILED
    except SystemExit as error:  # Typer leaves with 1 when the reader of its help has gone
        code = 0 if error.code == 1 else int(error.code or 0)
    else:
        code = _run(command) if callable(command) else int(command or 0)
    return code if console.flush_stdout() else code or FAILED


def _spelt_out(arguments: list[str]) -> list[str]:
    """`run --serve …`, as MAX spells it, is `serve …`."""
    if arguments[:1] == ["run"] and "--serve" in arguments:
        return ["serve", *(argument for argument in arguments[1:] if argument != "--serve")]
    return arguments


def _refuse(error: Any, arguments: list[str]) -> int:
    """Tell of arguments that Typer did not accept, and where help is."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return USAGE
    commands = [command.name for command in app.registered_commands]
    named = f"pixtral {arguments[0]}" if arguments and arguments[0] in commands else "pixtral"
    where = getattr(getattr(error, "ctx", None), "command_path", named)
    text = error.format_message() + _refused_value(error, arguments)
    console.tell_error(text if text.endswith((".", "?", "!")) else f"{text}.", f"See: {where} --help")
    return error.exit_code


def _refused_value(error: Any, arguments: list[str]) -> str:
    """The value that a flag could not take, where Typer's sentence about a number leaves it out."""
    flags = getattr(getattr(error, "param", None), "opts", ())
    given = [value for flag, value in itertools.pairwise(arguments) if flag in flags]
    given += [flag.partition("=")[2] for flag in arguments if flag.partition("=")[0] in flags and "=" in flag]
    if not given or "Input should be" not in str(error):
        return ""
    return f": {given[-1]!r}"


def _run(command: Callable[[], None]) -> int:
    """Run the command to its end or to an interrupt, whatever of it is under way then."""
    interrupts = _Interrupts()
    try:
        return _attempt(command, interrupts)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        interrupts.leave_at_once()


def _attempt(command: Callable[[], None], interrupts: _Interrupts) -> int:
    """The error boundary: turn whatever ends the command into a sentence and an exit code."""
    try:
        command()
    except console.OutputClosed:
        return 0
    except Exception as error:  # noqa: BLE001 - every failure becomes a sentence
        if interrupts.seen:  # torn out of an import or a callback, an interrupt can wear any name
            return INTERRUPTED
        if os.environ.get(DEBUG):
            console.tell_traceback()
        console.tell_error(*_explained(error))
        return USAGE if isinstance(error, UsageError) else FAILED
    return 0


def _explained(error: Exception) -> tuple[str, str | None]:
    """The sentence for the user, and the next thing to do."""
    from weights_cache.errors import WeightsError

    if isinstance(error, PixtralError | WeightsError | UsageError):
        return str(error), error.hint or f"{DEBUG}=1 shows where it comes from."
    if is_out_of_memory(error):
        less = "Try a smaller --max-length, a smaller --max-batch-size, or a smaller picture."
        return "There is not enough memory for this.", less
    first_line = str(error).partition("\n")[0]
    return (
        f"Something unexpected went wrong: {type(error).__name__}: {first_line}",
        f"This is a bug. {DEBUG}=1 shows the traceback for a report.",
    )


class _Interrupts:
    """From now on the first Ctrl-C raises KeyboardInterrupt; a second one ends the process at once.

    So does TIDYING seconds' time after the first: code that catches everything, as imports of large libraries
    do, can swallow a KeyboardInterrupt.
    """

    TIDYING = 2.0

    def __init__(self) -> None:
        self.seen = False
        self._wanted = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        self._on_interrupt(self._first)

    def leave_at_once(self) -> None:
        """There is nothing left to tidy up: from now on the first Ctrl-C ends the process."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._on_interrupt(self._leave)

    def _on_interrupt(self, handler: Callable[[int, Any], None]) -> None:
        if self._wanted:
            signal.signal(signal.SIGINT, handler)

    def _first(self, signum: int, frame: Any) -> None:
        self.seen = True
        self._on_interrupt(self._leave)
        signal.signal(signal.SIGALRM, self._leave)
        signal.setitimer(signal.ITIMER_REAL, self.TIDYING)
        raise KeyboardInterrupt

    def _leave(self, signum: int, frame: Any) -> None:
        console.restore_terminal()
        os._exit(INTERRUPTED)
