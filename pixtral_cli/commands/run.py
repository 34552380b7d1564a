"""`pixtral run`: one request in, one answer streamed out. Knows flags and the Python API, nothing below it."""

from __future__ import annotations

from typing import Any

from pixtral_cli.cli.console import Console
from pixtral_cli.cli.options import OutputFlags, ReportFlags, RequestFlags, SamplingFlags, SourceFlags, WeightFlags
from pixtral_cli.commands import result
from pixtral_cli.commands.loading import NO_REMOTE_CODE, load
from pixtral_cli.commands.request import PendingRequest, Request

EXAMPLES = """\
Examples:

\b
  pixtral run --model-path tiny -i picture.png -p "What shape is it?"
  pdftotext letter.pdf - | pixtral run -p "Summarise this in one sentence."
  curl -s https://example.org/cat.jpg | pixtral run -i - -p "What is this?" --json

Text on standard input goes before the prompt. Without -p it is the prompt and is waited for; with -p, a
pipe in which nothing comes is not. `pixtral run --serve` means `pixtral serve`.
"""
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
    if source.trust_remote_code:
        console.notice(NO_REMOTE_CODE)
    pending = PendingRequest(request)
    model = load(source, weights, console)
    asked = pending.finish()
    if pending.silent_writer:
        console.notice(SILENT_PIPE)
    reply = console.stream(answer(model, asked, sampling.options() | {"logprobs": report.logprobs}))
    tell(reply, console, report)


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
