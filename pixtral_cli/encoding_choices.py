"""The encodings of weights, and of keys and values, that a user can choose, and what is wrong with a choice.

Imports no torch, so that `--help` can read it; what each encoding costs is in weights_cache.encodings.
"""

from __future__ import annotations

from dataclasses import replace

from pixtral_cli.errors import ModelError
from weights_cache.encodings import ENCODINGS, Encoding

CHOICES = ("float32", "bfloat16", "fp8", "q6_k", "q4_0", "q4_k", "nf4")
KV_CACHE_DTYPES = ("auto", "fp8")
"""How keys and values are kept: as the model computes, or as e4m3 codes and a scale for each token and head."""


def find(name: str) -> Encoding:
    """The encoding of that name. Raises ModelError when it is not among CHOICES."""
    if name not in CHOICES:
        raise ModelError(f"The encoding {name!r} is not known.", hint=f"Known encodings: {', '.join(CHOICES)}.")
    return ENCODINGS[name]


def kv_encoding(wanted: str, computed_in: str) -> str:
    """How keys and values are kept: "fp8", or as the model computes. Raises ModelError when it is not among
    KV_CACHE_DTYPES."""
    if wanted not in KV_CACHE_DTYPES:
        known = ", ".join(KV_CACHE_DTYPES)
        raise ModelError(f"Keys and values cannot be kept as {wanted!r}.", hint=f"--kv-cache-dtype can be: {known}.")
    return computed_in if wanted == "auto" else wanted


def asked_for(name: str | None, double_quantization: bool = False) -> Encoding | None:
    """The encoding asked for, None where none is. Raises ModelError when it cannot be had in that way."""
    if double_quantization and name != "nf4":
        raise ModelError(
            f"Double quantisation is a form of nf4, and {name or 'no encoding'} is asked for.",
            hint="Ask for --quantization-encoding nf4, or leave --double-quantization out.",
        )
    return None if name is None else replace(find(name), double_quantization=double_quantization)
