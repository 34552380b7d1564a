"""`pixtral cache`: lists, checks and removes the models in the caches. Loads no model and no torch."""

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixtral_cli.cli.completions import CACHED
from pixtral_cli.cli.console import Console, counted, is_terminal, table
from pixtral_cli.cli.flags import UsageError
from pixtral_cli.cli.options import OutputFlags
from pixtral_cli.errors import PixtralError
from weights_cache.wording import size

if TYPE_CHECKING:
    from weights_cache.inventory import Model

HELP = "List, check and remove the models on this machine."
EXAMPLES = """\
Examples:

\b
  pixtral cache list
  pixtral cache verify mistral-community/pixtral-12b
  pixtral cache remove owner/name:model-Q4_K_M.gguf
  pixtral cache prune --older-than 30d --yes
"""
DAY = 86400.0
UNITS = {"h": 3600.0, "d": DAY, "w": 7 * DAY}


def age(text: str) -> float:
    """Seconds of `12h`, `30d` or `4w`; a bare number is days. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,6})([hdw]?)", text.strip().lower())
    if not match:
        raise typer.BadParameter(f"{text!r} is no age; write 12h, 30d or 4w.")
    return int(match[1]) * UNITS[match[2] or "d"]


_names = partial(
    typer.Argument, autocompletion=CACHED.offered, help="Names as `pixtral cache list` prints them, or paths."
)


@dataclass(frozen=True, kw_only=True)
class NamesArguments:
    """Which models; all if none is named."""

    names: Annotated[list[str] | None, _names(metavar="[MODEL]...")] = None


@dataclass(frozen=True, kw_only=True)
class RequiredNamesArguments:
    """Which models; at least one."""

    names: Annotated[list[str], _names(metavar="MODEL...")]


@dataclass(frozen=True, kw_only=True)
class YesFlags:
    """Whether to ask first."""

    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False


@dataclass(frozen=True, kw_only=True)
class AgeFlags:
    """What counts as old."""

    older_than: Annotated[
        float,
        typer.Option(
            "--older-than", metavar="AGE", parser=age, help="Remove models not used for this long: 12h, 30d or 4w."
        ),
    ]


def list_models(output: OutputFlags) -> None:
    """List the models on this machine."""
    from weights_cache import inventory

    console = output.console()
    found = inventory.models()
    if console.json:
        console.object({"models": [as_object(model) for model in found]})
    elif found:
        console.write(as_table(found, time.time()))
    else:
        console.notice("no models are cached. `pixtral download MODEL` fetches one.")


def path(output: OutputFlags) -> None:
    """Print the folders of the Hub's cache and of pixtral's own."""
    from weights_cache.cache import hub_cache_folder, own_cache_folder

    console = output.console()
    folders = {"hub": str(hub_cache_folder()), "own": str(own_cache_folder())}
    console.result(folders, "".join(f"{folder}\n" for folder in folders.values()))


def verify(arguments: NamesArguments, output: OutputFlags) -> None:
    """Check every file against its hash."""
    from weights_cache import inventory

    console = output.console()
    results: list[dict[str, Any]] = []
    for model in chosen(arguments.names):
        if model.format == inventory.INCOMPLETE:
            continue
        with console.progress(f"checking {model.name}") as progress:
            wrong = inventory.altered(model, progress)
        results.append({"name": model.name, "format": model.format, "altered": wrong})
        if not console.json:
            console.write(f"{model.name}: {'damaged: ' + ', '.join(wrong) if wrong else 'whole'}\n")
    if console.json:
        console.object({"models": results})
    if damaged := [result["name"] for result in results if result["altered"]]:
        again = f"Remove it with `pixtral cache remove {quote(damaged[0])}`, then fetch or export it again."
        raise PixtralError(f"{counted(len(damaged), 'model')} damaged: {', '.join(damaged)}.", again)


def remove(arguments: RequiredNamesArguments, yes: YesFlags, output: OutputFlags) -> None:
    """Remove models by name."""
    _remove(chosen(arguments.names), yes.yes, output.console())


def prune(older: AgeFlags, yes: YesFlags, output: OutputFlags) -> None:
    """Remove models that pixtral has used, but not for a long time."""
    before = time.time() - older.older_than
    old = [model for model in chosen(None) if model.known and model.used < before]
    _remove(old, yes.yes, output.console())


COMMANDS = {"list": list_models, "path": path, "verify": verify, "remove": remove, "prune": prune}


def chosen(names: Sequence[str] | None) -> "list[Model]":
    """The models of those names, all without names. Raises PixtralError for a name that is not there."""
    from weights_cache import inventory

    found = inventory.models()
    if names is None or not names:
        return found
    wanted = {name: _named(found, name) for name in names}
    if absent := [name for name, models in wanted.items() if not models]:
        raise PixtralError(f"There is no {absent[0]!r} in the caches.", "`pixtral cache list` shows what there is.")
    return [model for model in found if any(model in models for models in wanted.values())]


def _named(models: "Sequence[Model]", name: str) -> "list[Model]":
    """The models of that name; where there are none, the serialized model at that path."""
    path = Path(os.path.expanduser(name)).absolute()
    return [m for m in models if m.name == name] or [m for m in models if m.repo is None and m.path == path.resolve()]


def _remove(models: "list[Model]", yes: bool, console: Console) -> None:
    """Ask, unless `yes`, and remove."""
    from weights_cache import inventory

    if models and not yes:
        _ask(models, console)
    for model in models:
        try:
            inventory.remove(model)
        except OSError as error:
            where = error.filename or model.path
            raise PixtralError(f"{where} cannot be removed: {error.strerror}.", "Check whose it is.") from error
    freed = sum(model.nbytes for model in models)
    if console.json:
        console.object({"removed": [model.name for model in models], "bytes": freed})
    elif models:
        console.write("".join(f"removed {model.name} ({model.format}, {size(model.nbytes)})\n" for model in models))
    else:
        console.notice("nothing to remove.")


def _ask(models: "list[Model]", console: Console) -> None:
    """Raises UsageError where nobody can be asked, and PixtralError when the answer is no."""
    if not is_terminal(sys.stdin):
        raise UsageError("Nobody can be asked here whether to remove that.", "Add --yes.")
    if not console.confirm(f"{as_table(models, time.time())}Remove {counted(len(models), 'model')}?"):
        raise PixtralError("Nothing was removed.")


def as_object(model: "Model") -> dict[str, Any]:
    """The object that `--json` prints for a model; sizes in bytes, times in seconds since 1970."""
    return {
        "name": model.name,
        "format": model.format,
        "encoding": model.encoding,
        "bytes": model.nbytes,
        "last_used": round(model.used),
        "path": str(model.path),
    }


def as_table(models: "Sequence[Model]", now: float) -> str:
    """Columns as wide as what stands in them, and a line with the sum."""
    rows = [("NAME", "FORMAT", "ENCODING", "SIZE", "LAST USED")]
    rows += [(m.name, m.format, m.encoding or "-", size(m.nbytes), ago(now - m.used)) for m in models]
    total = f"{counted(len(models), 'model')}, {size(sum(model.nbytes for model in models))}"
    return "\n".join([*table(rows, "<<<><"), total]) + "\n"


def ago(seconds: float) -> str:
    """`3 days ago`: a span of time for people."""
    for unit, length in (("day", DAY), ("hour", 3600.0), ("minute", 60.0)):
        if number := int(seconds // length):
            return f"{counted(number, unit)} ago"
    return "just now"
