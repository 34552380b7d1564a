"""`pixtral verify`: checks that every byte of a serialized model is as it was written. Loads no model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli.cli.completions import SERIALIZED
from pixtral_cli.cli.options import OutputFlags

EXAMPLES = """\
Example:

\b
  pixtral verify pixtral.q4
"""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """What is checked."""

    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", autocompletion=SERIALIZED.offered, help="A file that `pixtral export` wrote."),
    ]


def verify(arguments: VerifyArguments, output: OutputFlags) -> None:
    """Check every hash in a serialized model."""
    from weights_cache.formats.serialized import verify_path

    console = output.console()
    with console.waiting("reading every byte"):
        manifest = verify_path(arguments.file).manifest
    found = {"file": str(arguments.file), "model": manifest.model, "encoding": manifest.encoding, "whole": True}
    text = f"{found['file']}: {found['model']} in {found['encoding']}, whole\n"
    console.result(found | {"tensors": len(manifest.tensors)}, text)
