"""`pixtral run`: answers one request and streams the answer. Knows flags and the Python API, nothing below it."""

from __future__ import annotations

from pixtral_cli.cli import reply as replies
from pixtral_cli.cli.loading import NO_REMOTE_CODE, load
from pixtral_cli.cli.options import (
    OutputFlags,
    ReportFlags,
    RequestFlags,
    SamplingFlags,
    SourceFlags,
    ThinkingFlags,
    WeightFlags,
)
from pixtral_cli.cli.user_input import PendingInput

EXAMPLES = """\
Examples:

\b
  pixtral run --model-path tiny -i picture.png -p "What shape is it?"
  pdftotext letter.pdf - | pixtral run -p "Summarise this in one sentence."
  curl -s https://example.org/cat.jpg | pixtral run -i - -p "What is this?" --json

Text on standard input goes before the prompt. Without -p, it is the whole prompt, and pixtral waits for it.
With -p, pixtral does not wait long for an empty pipe. `pixtral run --serve` means `pixtral serve`.
"""


def run(
    request: RequestFlags,
    thinking: ThinkingFlags,
    source: SourceFlags,
    sampling: SamplingFlags,
    output: OutputFlags,
    report: ReportFlags,
    weights: WeightFlags,
) -> None:
    """Ask a model about pictures and text, and stream the answer."""
    console = output.console()
    if source.trust_remote_code:
        console.notice(NO_REMOTE_CODE)
    thinking.check(request)
    pending = PendingInput(request)
    model = load(source, weights, console)
    model.processor.tell = console.notice
    options = {**sampling.options(), **thinking.options(), "logprobs": report.logprobs}
    events = pending.finish(console, model.system_message).stream(model, **options)
    replies.tell(console.stream(events, thoughts=not report.no_reasoning), model.kernels, console, report)
