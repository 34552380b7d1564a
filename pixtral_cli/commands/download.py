"""`pixtral download`: fetches a model and prints its folder. Loads nothing."""

from dataclasses import dataclass
from typing import Annotated

import typer

from pixtral_cli.cli.completions import MODEL
from pixtral_cli.cli.options import FetchFlags, OutputFlags

EXAMPLES = """\
Examples:

\b
  pixtral download mistral-community/pixtral-12b
  pixtral download owner/name:model-Q4_K_M.gguf
  pixtral run --model-path "$(pixtral download owner/name)" -p "Hello"

To continue an interrupted download, run the same command again.
"""


@dataclass(frozen=True, kw_only=True)
class DownloadArguments:
    """What is fetched."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=MODEL.offered,
            help="owner/name, owner/name@revision, owner/name:file.gguf, or the address of its page on the Hub.",
        ),
    ]


def download(arguments: DownloadArguments, fetch: FetchFlags, output: OutputFlags) -> None:
    """Download a model and print its folder."""
    console = output.console()
    with console.progress(f"looking for {arguments.model}") as progress:
        notes: list[str] = []
        from pixtral_cli.source import Source

        path = Source.fetch(
            arguments.model,
            weights_format=fetch.form,
            force_download=fetch.force_download,
            progress=progress,
            tell=notes.append,
        )
    for note in notes:
        console.notice(note)
    console.result({"model": arguments.model, "path": str(path)}, f"{path}\n")
