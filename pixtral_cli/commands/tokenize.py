"""`pixtral tokenize`: shows a request's token ids and what its pictures cost. Loads no weights and no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pixtral_cli.cli.console import counted
from pixtral_cli.cli.loading import NO_REMOTE_CODE
from pixtral_cli.cli.options import OutputFlags, RequestFlags, SourceFlags, ThinkingFlags
from pixtral_cli.cli.user_input import PendingInput

if TYPE_CHECKING:
    from pixtral_cli.prompt.processor import Prompt

EXAMPLES = """\
Examples:

\b
  pixtral tokenize --model-path tiny -p "How many tokens is this?"
  pixtral tokenize --model-path tiny -i picture.png -p "What is this?" --json
"""


def tokenize(request: RequestFlags, thinking: ThinkingFlags, source: SourceFlags, output: OutputFlags) -> None:
    """Show the tokens of a request and what each picture costs."""
    console = output.console()
    if source.trust_remote_code:
        console.notice(NO_REMOTE_CODE)
    thinking.check(request)
    pending = PendingInput(request)
    with console.progress(f"loading {source.name}") as progress:
        from pixtral_cli.prompt.model_settings import ModelSettings
        from pixtral_cli.source import Source

        model = Source.open(
            source.name,
            weights=False,
            weights_format=source.form,
            image_preprocessing=source.image_preprocessing,
            force_download=source.force_download,
            progress=progress,
        )
    model.processor.sizes_only = True
    asked = pending.finish(console, model.system_message)
    if asked.messages is None:
        prompt = model.complete(asked.prompt, asked.images)
    else:
        prompt = model.chat(asked.messages, settings=ModelSettings(thinking.reasoning_effort))
    console.result(as_object(source.name, prompt), as_text(prompt))


def as_object(model: str, prompt: Prompt) -> dict[str, Any]:
    """The object that `--json` prints. Sizes are in pixels, rows and columns in image tokens."""
    return {
        "model": model,
        "token_ids": list(prompt.token_ids),
        "tokens": len(prompt.token_ids),
        "images": [
            {
                "original_width": image.original_size[0],
                "original_height": image.original_size[1],
                "width": image.width,
                "height": image.height,
                "scaled_down": image.is_scaled_down,
                "rows": image.rows,
                "columns": image.columns,
                "tokens": image.tokens,
            }
            for image in prompt.images
        ],
    }


def as_text(prompt: Prompt) -> str:
    """The ids on one line, then a line for each picture, then the sum."""
    lines = [" ".join(str(token) for token in prompt.token_ids)]
    for number, image in enumerate(prompt.images, start=1):
        width, height = image.original_size
        whole = "with row ends" if image.spec.has_rows else "in all"
        resized = "scaled down" if image.is_scaled_down else "resized"
        lines.append(
            f"picture {number}: {width}x{height} px, {resized} to {image.width}x{image.height} px, "
            f"{counted(image.rows, 'row')} of {counted(image.columns, 'token')}, {image.tokens} {whole}"
        )
    lines.append(counted(len(prompt.token_ids), "token"))
    return "\n".join(lines) + "\n"
