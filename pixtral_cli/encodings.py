"""The names of the weight encodings and what each costs. Knows no tensors, so that `--help` can read it."""

from __future__ import annotations

from dataclasses import dataclass

from pixtral_cli.errors import ModelError


@dataclass(frozen=True)
class Encoding:
    """`bits` a weight, scales included; `ready` once it can be run."""

    name: str
    bits: float
    ready: bool


ENCODINGS = {
    encoding.name: encoding
    for encoding in (
        Encoding("float32", 32, ready=True),
        Encoding("bfloat16", 16, ready=True),
        Encoding("q6_k", 6.5625, ready=False),
        Encoding("q4_0", 4.5, ready=False),
        Encoding("q4_k", 4.5, ready=False),
        Encoding("nf4", 4.5, ready=False),
    )
}
READY = tuple(name for name, encoding in ENCODINGS.items() if encoding.ready)


def find(name: str) -> Encoding:
    """The encoding of that name. Raises ModelError when it is unknown or cannot be run yet."""
    encoding = ENCODINGS.get(name)
    if encoding is None:
        raise ModelError(f"The encoding {name!r} is not known.", hint=f"Known encodings: {', '.join(ENCODINGS)}.")
    if not encoding.ready:
        raise ModelError(f"The encoding {name} does not work yet.", hint=f"Use {' or '.join(READY)}.")
    return encoding
