"""`pixtral run`: one request in, one answer streamed out. Knows flags and the Python API, nothing below it."""

from __future__ import annotations

from typing import Any

from pixtral_cli import encodings
from pixtral_cli.commands import result
from pixtral_cli.commands.request import PendingRequest, Request
from pixtral_cli.console import Console
from pixtral_cli.errors import PixtralError
from pixtral_cli.options import OutputFlags, ReportFlags, RequestFlags, SamplingFlags, SourceFlags, WeightFlags

EXAMPLES = """\
Examples:

\b
  pixtral run --model-path tiny -i picture.png -p "What shape is it?"
  pdftotext letter.pdf - | pixtral run -p "Summarise this in one sentence."
  curl -s https://example.org/cat.jpg | pixtral run -i - -p "What is this?" --json

Text on standard input goes before the prompt. Without -p it is the prompt and is waited for; with -p, a
pipe in which nothing comes is not.
"""
NO_REMOTE_CODE = "--trust-remote-code has no effect: code from a repository is never run."
SILENT_PIPE = (
    "nothing came on standard input in time, so the prompt goes alone. "
    "To wait however long it takes, send the prompt that way too, without -p."
)


def run(
    request: RequestFlags,
    source: SourceFlags,
    sampling: SamplingFlags,
    output: OutputFlags,
    report: ReportFlags,
    weights: WeightFlags,
) -> None:
    """Ask a model about pictures and text, and stream its answer."""
    console = Console(json=output.json, quiet=output.quiet)
    refuse_not_yet(weights)
    if source.trust_remote_code:
        console.notice(NO_REMOTE_CODE)
    pending = PendingRequest(request)
    model = load(source, weights, console)
    asked = pending.finish()
    if pending.silent_writer:
        console.notice(SILENT_PIPE)
    reply = console.stream(answer(model, asked, sampling.options() | {"logprobs": report.logprobs}))
    tell(reply, console, report)


def refuse_not_yet(weights: WeightFlags) -> None:
    """Raise PixtralError for flags whose work is still to be done, before anything is loaded."""
    if weights.quantization_encoding:
        encodings.find(weights.quantization_encoding)
    for flag, path in (
        ("--save-to-serialized-model-path", weights.save_to_serialized_model_path),
        ("--serialized-model-path", weights.serialized_model_path),
    ):
        if path:
            raise PixtralError(f"{flag} does not work yet.", "Leave it out: the checkpoint is read directly.")


def load(source: SourceFlags, weights: WeightFlags, console: Console) -> Any:
    """The model that the flags name, with bars while it downloads and loads."""
    with console.progress(f"loading {source.model_path}") as progress:
        from pixtral_cli import Pixtral

        return Pixtral.load(
            source.model_path,
            weight_paths=tuple(weights.weight_path or ()),
            quantization_encoding=weights.quantization_encoding,
            devices=weights.devices,
            max_length=weights.max_length,
            max_batch_size=weights.max_batch_size,
            max_ce_batch_size=weights.max_ce_batch_size,
            image_preprocessing=source.image_preprocessing,
            force_download=source.force_download,
            progress=progress,
        )


def answer(model: Any, request: Request, options: dict[str, Any]) -> Any:
    """The events of the answer, as the model makes them."""
    if request.messages is None:
        return model.stream_complete(request.prompt, request.pictures, **options)
    return model.stream(request.messages, **options)


def tell(reply: Any, console: Console, report: ReportFlags) -> None:
    """What comes after the answer: the JSON object, log-probabilities, statistics."""
    if console.json:
        console.object(result.as_object(reply))
    elif report.logprobs:
        console.detail(result.logprob_table(reply))
    if report.stats:
        console.detail(result.statistics(reply))
