"""`pixtral export`: writes a model as one serialized file, encoded tensor by tensor. Loads no model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli.cli import completions
from pixtral_cli.cli.options import EncodingFlags, FetchFlags, OutputFlags
from weights_cache.wording import size

EXAMPLES = """\
Examples:

\b
  pixtral export mistral-community/pixtral-12b pixtral.q4 --quantization-encoding q4_k
  pixtral run --serialized-model-path pixtral.q4 -i photo.jpg -p "What is this?"
"""


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """What is written where."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=completions.MODEL.offered,
            help="A Hugging Face name, a local folder, a .gguf file, a file that export wrote, or tiny.",
        ),
    ]
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            autocompletion=completions.FILES.offered,
            help="The file to write. An existing file is replaced.",
        ),
    ]


def export(arguments: ExportArguments, encoding: EncodingFlags, fetch: FetchFlags, output: OutputFlags) -> None:
    """Write a model as one file that loads immediately."""
    from pixtral_cli.encoding_choices import asked_for
    from pixtral_cli.source import Source

    encoding.check()
    console = output.console()
    wanted = asked_for(encoding.quantization_encoding, encoding.double_quantization)
    with console.progress(f"exporting {arguments.model}") as progress:
        if Source.is_serialized(arguments.model) and not encoding.weight_path:
            source = Source.open_serialized(arguments.model, progress=progress)
        else:
            source = Source.open(
                arguments.model,
                tuple(encoding.weight_path or ()),
                weights_format=fetch.form,
                force_download=fetch.force_download,
                progress=progress,
            )
        _ = source.config, source.processor  # what cannot be run later is refused now
        placement = source.placement(wanted, encoding.quantize_vision)
        source.save(arguments.file, placement, progress=progress)
    chosen = None if source.format == "serialized" else source.checkpoint.note  # else it tells of what is mended here
    for note in (chosen, *placement.notes):
        if note:
            console.notice(note)
    file, nbytes = str(arguments.file), arguments.file.stat().st_size
    written = {"file": file, "encoding": placement.label, "bytes": nbytes}
    console.result(written, f"{file}: {placement.label}, {size(nbytes)}\n")
