"""Run Mistral's vision-language models on your own machine.

>>> from pixtral_cli import Pixtral
>>> model = Pixtral.load("tiny")
>>> model.chat([{"role": "user", "content": "What can you do?"}]).text  # doctest: +SKIP

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Pixtral": "pixtral_cli.api",
    "GenerationOptions": "pixtral_cli.generation",
    "Reply": "pixtral_cli.generation",
    "TextEvent": "pixtral_cli.generation",
    "TokenLogprob": "pixtral_cli.generation",
    "Usage": "pixtral_cli.generation",
    "Timings": "pixtral_cli.generation",
    "PixtralError": "pixtral_cli.errors",
}
__all__ = sorted(_PUBLIC)  # noqa: PLE0605  the table above is the one list


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
