"""`pixtral inspect`: shows from headers what a model is and needs. Reads no weights, imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pixtral_cli.cli.completions import ANY_MODEL
from pixtral_cli.cli.console import table
from pixtral_cli.cli.flags import one_of
from pixtral_cli.cli.loading import notes_instead_of_log
from pixtral_cli.cli.options import FORMATS, KV_CACHE_DTYPE, OutputFlags
from weights_cache.names import VISION
from weights_cache.wording import size

if TYPE_CHECKING:
    from pixtral_cli.source import Device, Need, Source
    from weights_cache.layout import Form

VERDICTS = {True: "fits", False: "does not fit", None: "?"}
EXAMPLES = """\
Examples:

\b
  pixtral inspect mistral-community/pixtral-12b
  pixtral inspect owner/name:model-Q4_K_M.gguf --json

If the model is not on this machine, only its small files and headers are downloaded.
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
            help="Which format to look at if the model has several.",
            **one_of(FORMATS),
        ),
    ] = None
    kv_cache_dtype: Annotated[str, KV_CACHE_DTYPE] = "auto"


def inspect(arguments: InspectArguments, output: OutputFlags) -> None:
    """Show what a model is and how much memory it needs, before it is downloaded."""
    console = output.console()
    with TemporaryDirectory(prefix="pixtral-") as folder:
        with console.progress(f"looking at {arguments.model}") as progress:
            from pixtral_cli.source import Source

            form = cast("Form | None", arguments.weights_format)  # which one_of has checked
            source = Source.open_headers(arguments.model, Path(folder), weights_format=form, progress=progress)
        found = as_object(arguments.model, source, arguments.kv_cache_dtype)
        if source.checkpoint.note:
            console.notice(source.checkpoint.note)
        with notes_instead_of_log():
            slower = source.device_notes()
        for note in slower:
            console.notice(note)
    console.result(found, as_text(found))


def as_object(name: str, source: "Source", kv_cache_dtype: str = "auto") -> dict[str, Any]:
    """The object that `--json` prints. Sizes are in bytes, lengths in tokens, pictures in pixels."""
    config, tensors = source.config, source.checkpoint.tensors
    text, vision, images = config.text, config.vision, config.image_layout
    devices = source.devices()
    return {
        "model": name,
        "architecture": config.architecture,
        "format": source.format,
        "parameters": sum(prod(tensor.shape) for tensor in tensors.values()),
        "context": text.max_length,
        "original_context": text.yarn and text.yarn.original_length,
        "layers": text.num_layers,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
        "vision": vision
        and images
        and {
            "image_size": images.longest_side,
            "patch_size": vision.patch_size,
            "token_size": images.token_size,
            "cropped": images.cropped,
            "layers": vision.num_layers,
            "parameters": sum(prod(t.shape) for n, t in tensors.items() if n.startswith(VISION)),
        },
        "bytes_on_disk": sum(path.stat().st_size for path in {tensor.file for tensor in tensors.values()}),
        "devices": [
            {"name": device.name, "free_bytes": device.free, "kernels": source.kernels(device)} for device in devices
        ],
        "encodings": [_needed(need, devices) for need in source.needs(kv_cache_dtype)],
    }


def _needed(need: "Need", devices: "list[Device]") -> dict[str, Any]:
    """What the model takes in one encoding, by itself and with a cache of each length, and where that fits."""
    lengths = [
        {
            "tokens": tokens,
            "kv_cache_bytes": cache,
            "total_bytes": need.total(tokens),
            "needed_bytes": {device.name: need.on(device, tokens) for device in devices},
            "fits": {device.name: need.fits(device, tokens) for device in devices},
        }
        for tokens, cache in need.cache.items()
    ]
    return {"name": need.encoding, "weights_bytes": need.weights, "lengths": lengths}


def as_text(found: dict[str, Any]) -> str:
    """What `as_object` gave, for people: a list, then a table of encodings and lengths for each device."""
    vision = found["vision"]
    facts = {
        "model": found["model"],
        "architecture": found["architecture"],
        "parameters": f"{found['parameters'] / 1e9:.2f} billion" if found["parameters"] >= 1e7 else found["parameters"],
        "context": f"{found['context']} tokens"
        + (f", beyond {found['original_context']} by YaRN" if found["original_context"] else ""),
        "pictures": _pictures(vision) if vision else "none",
        "format": found["format"],
        "on disk": size(found["bytes_on_disk"]),
    }
    lines = table([(f"{label}:", value) for label, value in facts.items()], gap=" ")
    return "\n".join([*lines, "", *_weights_table(found), *_fit_tables(found)]) + "\n"


def _pictures(vision: dict[str, Any]) -> str:
    merged = vision["token_size"] // vision["patch_size"]
    squares = f", a token for each {merged}x{merged} of them" if merged > 1 else ""
    side = vision["image_size"]
    sides = f"cropped to {side}x{side}" if vision["cropped"] else f"up to {side}"
    return f"{sides} px, in patches of {vision['patch_size']} px{squares}"


def _weights_table(found: dict[str, Any]) -> list[str]:
    """Memory for the weights, and beside it for a cache of each length."""
    lengths = [row["tokens"] for row in found["encodings"][0]["lengths"]]
    rows = [["memory", "weights", *(f"+ {tokens} tokens" for tokens in lengths)]]
    for encoding in found["encodings"]:
        caches = [size(row["kv_cache_bytes"]) for row in encoding["lengths"]]
        rows.append([encoding["name"], size(encoding["weights_bytes"]), *caches])
    return table(rows, "<>")


def _fit_tables(found: dict[str, Any]) -> Iterable[str]:
    """What each device needs in all, activations and a card's own memory included, and whether it has that."""
    for device in found["devices"]:
        free = "nobody says how much is free" if device["free_bytes"] is None else f"{size(device['free_bytes'])} free"
        name = device["name"]
        rows = [[name, *(f"{row['tokens']} tokens" for row in found["encodings"][0]["lengths"])]]
        rows += [
            [
                each["name"],
                *(f"{size(row['needed_bytes'][name])} {VERDICTS[row['fits'][name]]}" for row in each["lengths"]),
            ]
            for each in found["encodings"]
        ]
        kernels = f", kernels: {device['kernels']}" if device["kernels"] else ""
        yield from ["", f"{name}: {free}{kernels}", *table(rows, "<>")]
