"""`pixtral bench`: measures a model on this machine, beside what the machine allows and what others reach."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixtral_cli.bench.shapes import ENCODINGS, SHAPES
from pixtral_cli.cli import completions
from pixtral_cli.cli.console import Console
from pixtral_cli.cli.flags import UsageError, device_text, one_of, within
from pixtral_cli.errors import PixtralError

if TYPE_CHECKING:
    from pixtral_cli.bench.bench import Bench

DEFAULT_SHAPE, DEFAULT_ENCODING = "1b", "q4_k"
STANDARD_OUTPUT = Path("-")
EXAMPLES = """\
Examples:

\b
  pixtral bench
  pixtral bench --shape nemo-12b --quantization-encoding q4_k --compare
  pixtral bench --model-path model-Q4_K_M.gguf --compare --json -

Random weights of a shape are as fast as a model's. Ctrl-C shows what has been measured.
"""


def _batch_sizes(value: str) -> str:
    """A check for ``1,4``: positive whole numbers."""
    if not all(part.strip().isdecimal() and int(part) for part in value.split(",")):
        raise typer.BadParameter(f"{value!r} are no batch sizes; write 1,4.")
    return value


def _pixels(value: str | None) -> str | None:
    """A check for ``1024x768``, sides in pixels."""
    sides = [] if value is None else value.lower().split("x")
    if value is not None and not (len(sides) == 2 and all(side.isdecimal() and int(side) for side in sides)):
        raise typer.BadParameter(f"{value!r} is no size of a picture; write 1024x768.")
    return value


def _encodings(values: list[str] | None) -> list[str] | None:
    """A check that weights can be had in each."""
    for value in values or ():
        if value not in ENCODINGS:
            raise typer.BadParameter(f"{value!r} is not known; known are {', '.join(ENCODINGS)}.")
    return values


def _writable(value: Path | None) -> Path | None:
    """A check that the figures can be put there when they are all known, perhaps after an hour."""
    if value not in (None, STANDARD_OUTPUT) and (value.is_dir() or not value.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{str(value)!r} cannot be a file: its folder is not there, or it is a folder.")
    return value


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """What is measured."""

    model_path: Annotated[
        str | None,
        typer.Option(
            "--model-path",
            metavar="MODEL",
            autocompletion=completions.MODEL.offered,
            help="A Hugging Face name, a local folder, a .gguf or an exported file, or tiny.",
        ),
    ] = None
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="|".join(SHAPES),
            help=f"Measure random weights of this size instead: no download. Default: {DEFAULT_SHAPE}.",
            **one_of(tuple(SHAPES)),
        ),
    ] = None
    quantization_encoding: Annotated[
        list[str] | None,
        typer.Option(
            "--quantization-encoding",
            metavar="NAME",
            callback=_encodings,
            autocompletion=completions.Values(ENCODINGS).offered,
            help="How the weights are stored. Repeatable. Default: as in the checkpoint; "
            f"of a shape {DEFAULT_ENCODING}.",
        ),
    ] = None
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", callback=within(1), help="Length of the prompt.")
    ] = 512
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", callback=within(1), help="How many tokens are decoded.")
    ] = 64
    batch_sizes: Annotated[
        str,
        typer.Option(
            "--batch-sizes", metavar="N,N", callback=_batch_sizes, help="How many requests are decoded together."
        ),
    ] = "1,4"
    image: Annotated[
        str | None,
        typer.Option(
            "--image",
            metavar="WIDTHxHEIGHT",
            callback=_pixels,
            help="Measure a picture of this size too, in pixels; a shape gets the vision tower of its family for it.",
        ),
    ] = None
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", callback=within(1), help="Rounds, whose median counts.")
    ] = 5
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="NAMES",
            callback=device_text,
            autocompletion=completions.DEVICES.offered,
            help="cpu, gpu or gpu-N. Default: the first GPU, else cpu.",
        ),
    ] = None
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Measure transformers and llama.cpp (llama-cpp-python) beside it, where installed."
        ),
    ] = False
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            callback=_writable,
            autocompletion=completions.FILES.offered,
            help="Write the figures as one JSON object; - is standard output, without the table.",
        ),
    ] = None


def bench(arguments: BenchArguments) -> None:
    """Measure speed and memory on this machine."""
    if arguments.model_path is not None and arguments.shape is not None:
        raise UsageError("--shape is a model of random weights: leave --model-path out.", "See: pixtral bench --help")
    console = Console()
    with console.doing("starting") as doing:
        from pixtral_cli.bench.bench import Bench
        from pixtral_cli.bench.runs import Sizes

        width, _, height = (arguments.image or "").lower().partition("x")
        sizes = Sizes(
            arguments.prompt_tokens,
            arguments.new_tokens,
            tuple(dict.fromkeys(int(part) for part in arguments.batch_sizes.split(","))),
            (int(width), int(height)) if arguments.image else None,
            arguments.repeats,
        )
        run = Bench(sizes, arguments.devices, arguments.compare, console.notice, doing)
        with _told_to_end_as_interrupted():
            try:
                _measure(run, arguments)
            finally:
                _show(run, arguments.json, console)


@contextmanager
def _told_to_end_as_interrupted() -> Iterator[None]:
    """A signal to end unwinds as Ctrl-C does: models of gigabytes are not left behind. Ignored ones stay so (nohup)."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    ends = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
    taken = [number for number in ends if number and signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _measure(run: "Bench", arguments: BenchArguments) -> None:
    from pixtral_cli.bench import model_files
    from pixtral_cli.bench.model_files import Subject

    name, shape = arguments.model_path, arguments.shape or DEFAULT_SHAPE

    def of_model(encoding: str | None, folder: Path) -> Subject:
        return model_files.of_model(name or "", encoding, folder)

    def of_shape(encoding: str | None, folder: Path) -> Subject:
        return model_files.of_shape(shape, encoding or DEFAULT_ENCODING, run.sizes.image is not None, folder)

    encodings = tuple(dict.fromkeys(arguments.quantization_encoding or (None,)))
    run.run(name or shape, of_model if name else of_shape, encodings)


def _show(run: "Bench", file: Path | None, console: Console) -> None:
    """The table, and the object in a file; only the object where that goes to standard output."""
    if not run.rows:
        return
    found = run.as_object()
    if file == STANDARD_OUTPUT:
        console.object(found)
        return
    console.write(run.as_text())
    if file is not None:
        _write(file, json.dumps(found, indent=1) + "\n")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise PixtralError(f"{file} cannot be written: {error.strerror}.", "Choose another file for --json.") from error
