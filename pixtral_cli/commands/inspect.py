"""`pixtral inspect`: a model's headers in, what it is and what it needs out. Reads no weights, imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixtral_cli.cli.completions import ANY_MODEL
from pixtral_cli.cli.console import Console
from pixtral_cli.cli.flags import one_of
from pixtral_cli.cli.options import FORMATS, OutputFlags
from weights_cache.errors import size

if TYPE_CHECKING:
    from pixtral_cli.source import Source

VERDICTS = {True: "fits", False: "does not fit", None: "?"}
EXAMPLES = """\
Examples:

\b
  pixtral inspect mistral-community/pixtral-12b
  pixtral inspect owner/name:model-Q4_K_M.gguf --json

Of a model that is not here only the small files and the headers are fetched.
"""


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """What is looked at."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=ANY_MODEL.offered,
            help="A Hugging Face name, a local folder or file, or tiny.",
        ),
    ]
    weights_format: Annotated[
        str | None,
        typer.Option(
            "--weights-format",
            metavar="hf|native|gguf",
            help="Which form to look at where a model comes in several.",
            **one_of(FORMATS),
        ),
    ] = None


def inspect(arguments: InspectArguments, output: OutputFlags) -> None:
    """Show what a model is and what memory it needs, before its weights are fetched."""
    console = Console(json=output.json, quiet=output.quiet)
    with TemporaryDirectory(prefix="pixtral-") as folder:
        with console.progress(f"looking at {arguments.model}") as progress:
            from pixtral_cli.source import Source

            source = Source.open_headers(
                arguments.model, Path(folder), weights_format=arguments.weights_format, progress=progress
            )
        found = as_object(arguments.model, source)
        if source.checkpoint.note:
            console.notice(source.checkpoint.note)
    if console.json:
        console.object(found)
    else:
        console.write(as_text(found))


def as_object(name: str, source: "Source") -> dict[str, Any]:
    """The object that `--json` prints. Sizes are in bytes, lengths in tokens, pictures in pixels."""
    config, tensors = source.config, source.checkpoint.tensors
    text, vision = config.text, config.vision
    needs, devices = source.needs(), source.devices()
    return {
        "model": name,
        "architecture": config.architecture,
        "format": source.format,
        "parameters": sum(prod(tensor.shape) for tensor in tensors.values()),
        "context": text.max_length,
        "layers": text.num_layers,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
        "vision": vision
        and {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layers": vision.num_layers,
            "parameters": sum(prod(t.shape) for n, t in tensors.items() if n.startswith(("vision_", "multi_modal"))),
        },
        "bytes_on_disk": sum(path.stat().st_size for path in {tensor.file for tensor in tensors.values()}),
        "devices": [{"name": device.name, "free_bytes": device.free} for device in devices],
        "encodings": [
            {
                "name": need.encoding,
                "weights_bytes": need.weights,
                "lengths": [
                    {
                        "tokens": tokens,
                        "kv_cache_bytes": cache,
                        "total_bytes": need.total(tokens),
                        "fits": {device.name: need.fits(device, tokens) for device in devices},
                    }
                    for tokens, cache in need.cache.items()
                ],
            }
            for need in needs
        ],
    }


def as_text(found: dict[str, Any]) -> str:
    """What `as_object` gave, for people: a list, then a table of encodings and lengths for each device."""
    vision = found["vision"]
    facts = {
        "model": found["model"],
        "architecture": found["architecture"],
        "parameters": f"{found['parameters'] / 1e9:.2f} billion" if found["parameters"] >= 1e7 else found["parameters"],
        "context": f"{found['context']} tokens",
        "pictures": f"up to {vision['image_size']} px, in patches of {vision['patch_size']} px" if vision else "none",
        "format": found["format"],
        "on disk": size(found["bytes_on_disk"]),
    }
    lines = [f"{label + ':':<14}{value}" for label, value in facts.items()]
    return "\n".join([*lines, "", *_weights_table(found), *_fit_tables(found)]) + "\n"


def _weights_table(found: dict[str, Any]) -> list[str]:
    """Memory for the weights, and beside it for a cache of each length."""
    lengths = [row["tokens"] for row in found["encodings"][0]["lengths"]]
    rows = [["memory", "weights", *(f"+ {tokens} tokens" for tokens in lengths)]]
    for encoding in found["encodings"]:
        caches = [size(row["kv_cache_bytes"]) for row in encoding["lengths"]]
        rows.append([encoding["name"], size(encoding["weights_bytes"]), *caches])
    return _columns(rows)


def _fit_tables(found: dict[str, Any]) -> Iterable[str]:
    for device in found["devices"]:
        free = "nobody says how much is free" if device["free_bytes"] is None else f"{size(device['free_bytes'])} free"
        rows = [[device["name"], *(f"{row['tokens']} tokens" for row in found["encodings"][0]["lengths"])]]
        for encoding in found["encodings"]:
            rows.append([encoding["name"], *(VERDICTS[row["fits"][device["name"]]] for row in encoding["lengths"])])
        yield from ["", f"{device['name']}: {free}", *_columns(rows)]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
