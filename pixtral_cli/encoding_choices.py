"""The encodings that a user can choose, and what is wrong with a choice. Imports no torch, so that `--help` can read
it; what each encoding costs is in weights_cache.encodings."""

from __future__ import annotations

from dataclasses import replace

from pixtral_cli.errors import ModelError
from weights_cache.encodings import ENCODINGS, Encoding

CHOICES = ("float32", "bfloat16", "q6_k", "q4_0", "q4_k", "nf4")


def find(name: str) -> Encoding:
    """The encoding of that name. Raises ModelError when it is not among CHOICES."""
    if name not in CHOICES:
        raise ModelError(f"The encoding {name!r} is not known.", hint=f"Known encodings: {', '.join(CHOICES)}.")
    return ENCODINGS[name]


def asked_for(name: str | None, double_quantization: bool = False) -> Encoding | None:
    """The encoding asked for, None where none is. Raises ModelError when it cannot be had in that way."""
    if double_quantization and name != "nf4":
        raise ModelError(
            f"Double quantisation is a form of nf4, and {name or 'no encoding'} is asked for.",
            hint="Ask for --quantization-encoding nf4, or leave --double-quantization out.",
        )
    return None if name is None else replace(find(name), double_quantization=double_quantization)
